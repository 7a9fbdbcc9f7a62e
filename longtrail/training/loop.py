"""The loop around a learner: Lightning's trainer with early stopping, best weights, resume files and progress."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from tqdm import tqdm

from longtrail.config import TrainingSettings
from longtrail.errors import ConfigError
from longtrail.training.checkpoints import Checkpoint, Progress, Row
from longtrail.training.learners import Learner
from longtrail.training.pieces import Pieces

log = logging.getLogger(__name__)

Report = Callable[[Row], None]


class EpochKeeper(Callback):
    """Seeds each epoch; after it, judges it, writes the resume file, reports a row of the curve and stops when patience is out.

    Randomness inside an epoch (dropout, sampled negatives) depends on (seed, epoch, process) alone, so an epoch needs no memory of the ones before it
    but the weights, the optimiser's state and the Progress. With `checkpoint_steps` a resume file is written after so many steps too, and randomness
    starts anew there, so that the steps after it need no memory either.
    """

    def __init__(
        self,
        progress: Progress,
        checkpoint: Checkpoint | None,
        pieces: Pieces,
        *,
        metric: str,
        patience: int,
        epochs: int,
        seed: int,
        report: Report | None,
        checkpoint_steps: int | None = None,
    ) -> None:
        self.progress, self.checkpoint, self.pieces, self.checkpoint_steps = progress, checkpoint, pieces, checkpoint_steps
        self.metric, self.patience, self.epochs, self.seed, self.report = metric, patience, epochs, seed, report
        self._began = 0.0
        self._trained = float("inf")

    def on_sanity_check_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The weights that training goes on from are epoch 0: one after it has to be better to take their place."""
        assert isinstance(pl_module, Learner)
        row = self._judge(0, trainer.strategy.broadcast(_judged(pl_module)), pl_module)
        if trainer.is_global_zero:
            log.info("epoch 0, the weights it goes on from: valid %s %.4f", self.metric, row.get(f"valid_{self.metric}", float("nan")))
            if self.report is not None:
                self.report(row)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The first process's buffers for all: afterwards each changes them as the others do, from statistics over all processes."""
        for buffer in pl_module.buffers() if trainer.world_size > 1 else ():
            distributed.broadcast(buffer, src=0)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Learner)
        pl_module.epoch = self.progress.epochs + 1
        pl_module.totals = self.progress.loss
        pl_module.first_step = self._first_step = self.progress.step
        self._start_randomness(trainer)
        self._began, self._trained = time.perf_counter(), float("inf")

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, Learner)
        steps, rest = divmod(batch_idx + 1, self.pieces.accumulate)
        done = self._first_step + steps
        if rest == 0 and self.checkpoint_steps is not None and done % self.checkpoint_steps == 0 and done < self.pieces.steps:
            pl_module.settle()
            self.progress.step, self.progress.loss = done, pl_module.totals
            self._save(trainer, pl_module)
            self._start_randomness(trainer)

    def _start_randomness(self, trainer: lightning.Trainer) -> None:
        # Not only by epoch and step: processes of one training must not draw the same dropout masks.
        torch.manual_seed(_seed(self.seed, self.progress.epochs, trainer.global_rank, self.progress.step))

    def _save(self, trainer: lightning.Trainer, learner: Learner) -> None:
        if self.checkpoint is not None and trainer.is_global_zero:
            self.checkpoint.save(self.progress, learner.model.state_dict(), trainer.optimizers[0].state_dict())

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        learner = pl_module
        assert isinstance(learner, Learner)
        learner.check()
        # One process decides for all: were each to decide from its own rounding, one might stop and leave the others waiting.
        found: Row = trainer.strategy.broadcast({"train_loss": learner.train_loss(), **_judged(learner)})
        progress = self.progress
        progress.epochs, progress.step, progress.loss, progress.waited = progress.epochs + 1, 0, (0.0, 0.0), progress.waited + 1
        row = self._judge(progress.epochs, found, learner)
        self.pieces.set_epoch(progress.epochs)  # the next one's
        self._save(trainer, learner)
        if trainer.is_global_zero:
            self._tell(trainer, learner, row)
            if self.report is not None:
                self.report(row)
        if progress.exhausted(self.patience):
            trainer.should_stop = True

    def _judge(self, epoch: int, found: Row, learner: Learner) -> Row:
        """A row of the curve. Where its value is the best so far, the weights that were judged are kept."""
        progress, row = self.progress, {"epoch": epoch, **found}
        progress.curve.append(row)
        value = row.get(f"valid_{self.metric}", float("nan"))
        if value == value and (progress.best_value is None or value > progress.best_value):
            progress.best_value, progress.best_epoch, progress.waited = value, epoch, 0
            judged = {**learner.model.state_dict(), **progress.average}
            progress.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in judged.items()}
        return row

    def _tell(self, trainer: lightning.Trainer, learner: Learner, row: Row) -> None:
        seconds = time.perf_counter() - self._began
        training = max(min(self._trained, time.perf_counter()) - self._began, 1e-9)
        value = row.get(f"valid_{self.metric}", float("nan"))
        log.info(
            "epoch %d/%d: loss %.4f, valid %s %.4f%s, %.1f s, %s examples/s",
            self.progress.epochs,
            self.epochs,
            row["train_loss"],
            self.metric,
            value,
            " (best)" if self.progress.waited == 0 else "",
            seconds,
            f"{learner.examples * trainer.world_size / training:,.0f}",
        )


class Bar(Callback):
    """One bar an epoch, on a terminal."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Learner)
        self.bar = tqdm(total=int(trainer.num_training_batches), desc=f"epoch {pl_module.epoch}", unit="step", leave=False)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        self.bar.update()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.bar.close()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.bar.close()  # where there was no validation


class Lines(Callback):
    """Where there is no terminal: a line a minute of an epoch, so that one of hours can be told from one that hangs."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._began = self._told = time.perf_counter()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *rest: Any) -> None:
        pieces = trainer.accumulate_grad_batches
        self._tell(trainer, pl_module, "steps", (rest[-1] + 1) // pieces, int(trainer.num_training_batches) // pieces)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._began = self._told = time.perf_counter()

    def on_validation_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *rest: Any) -> None:
        self._tell(trainer, pl_module, "batches judged", rest[2] + 1, int(sum(trainer.num_val_batches)))

    def _tell(self, trainer: lightning.Trainer, learner: lightning.LightningModule, what: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self._told < self.seconds or not done or not trainer.is_global_zero:
            return
        self._told, taken = now, now - self._began
        assert isinstance(learner, Learner)
        log.info("epoch %d: %d of %d %s, %.0f s, about %.0f s to go", learner.epoch, done, total, what, taken, taken / done * (total - done))


def _judged(learner: Learner) -> Row:
    return {f"valid_{name}": value for name, value in learner.metrics.items()}


def _seed(seed: int, epoch: int, rank: int, step: int) -> int:
    """One well-mixed 63-bit seed of four numbers."""
    generator = torch.Generator().manual_seed(seed)
    for number in (epoch, rank, step) if step else (epoch, rank):
        generator.manual_seed(int(torch.randint(2**62, (1,), generator=generator)) ^ number)
    return int(torch.randint(2**62, (1,), generator=generator))


def torchrun_shape(environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """(processes on this machine, machines) where torchrun started this process, as its environment says; None where it did not."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    local, world = int(environment["LOCAL_WORLD_SIZE"]), int(environment["WORLD_SIZE"])
    if world % local:
        raise ConfigError(f"torchrun: {world} processes, {local} of them here; expected as many on every machine")
    return local, world // local


def accelerator_of(training: TrainingSettings) -> tuple[str, int, str]:
    """Lightning's accelerator, devices and precision. Raises ConfigError where a GPU is asked for and not there.

    Under torchrun the devices are its processes of this machine, whatever `training.devices` says: it has started them already.
    """
    cuda = torch.cuda.is_available()
    if training.accelerator == "gpu" and not cuda:
        raise ConfigError("training.accelerator: gpu, but torch sees no GPU; expected cpu or auto on this machine")
    on_gpu = cuda and training.accelerator != "cpu"
    started = torchrun_shape()
    asked = training.devices if started is None else started[0]
    if on_gpu and asked > torch.cuda.device_count():
        name = "training.devices" if started is None else "torchrun's processes of this machine"
        raise ConfigError(f"{name}: {asked}, but torch sees {torch.cuda.device_count()} GPU(s)")
    # Where auto found no GPU, the setting was meant for GPUs.
    devices = asked if on_gpu or started is not None or training.accelerator == "cpu" else 1
    bf16 = training.precision == "bf16" or (training.precision == "auto" and on_gpu)
    return "gpu" if on_gpu else "cpu", devices, "bf16-mixed" if bf16 else "32-true"


def make_trainer(
    training: TrainingSettings, callbacks: Sequence[Callback], epochs: int, *, first_is_shorter: bool = False, judged_first: bool = False
) -> lightning.Trainer:
    """With `first_is_shorter` the trainer asks before each epoch how many batches there are: one that was resumed in the middle has fewer.

    With `judged_first` the validation split is gone through before the first step, too.
    """
    accelerator, devices, precision = accelerator_of(training)
    machines = (torchrun_shape() or (devices, 1))[1]
    return lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=machines,
        # By default DDP sends every buffer at every step: RecJPQ's codes are bytes an item. EpochKeeper sends them once.
        strategy=DDPStrategy(broadcast_buffers=False) if devices * machines > 1 else "auto",
        precision=precision,  # type: ignore[arg-type]
        max_epochs=epochs,
        gradient_clip_val=training.gradient_clip,
        accumulate_grad_batches=training.accumulate,
        reload_dataloaders_every_n_epochs=int(first_is_shorter),
        # Some GPU kernels have no deterministic form; a warning is then better than no model.
        deterministic=True if accelerator == "cpu" else "warn",
        callbacks=[*callbacks, Bar() if sys.stderr.isatty() else Lines()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=-1 if judged_first else 0,
        use_distributed_sampler=False,
    )


@contextmanager
def reproducible(training: TrainingSettings) -> Iterator[None]:
    """Seed and threads as in the settings, Lightning's chatter off; the process's own state is put back afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    chatter = logging.getLogger("lightning.pytorch")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            torch.set_num_threads(training.threads)
            torch.manual_seed(training.seed)
            yield
    finally:
        chatter.setLevel(level)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
