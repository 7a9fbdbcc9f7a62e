"""One case in the process that calls it: make the workload, train for a while, report. B users or samples, L history, C candidates."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from pydantic import TypeAdapter
from torch import Tensor

from benchmarks.ranker_latency import cpu_ms, make_request, request_cpu_ms
from benchmarks.training.twins import PaddedSASRec, TiledDIN
from longtrail.config import Model, RankerSettings, TrainingSettings
from longtrail.examples import FeatureSet, RankingBatch, RankingBatches, SequenceBatch, SequenceBatches
from longtrail.models.contracts import Candidates, Context, History
from longtrail.models.registry import build_model
from longtrail.retrieval.index import Exclusion
from longtrail.training.averaging import WeightAverage
from longtrail.training.checkpoints import Progress
from longtrail.training.learners import Learner, RankerLearner, RetrieverLearner
from longtrail.training.loop import make_trainer
from longtrail.training.memory import freed_memory_is_kept

WARM_UP = 2  # steps before the clock starts


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained on, and for how long."""

    folder: str  # the workload, as a features folder
    length: int  # L
    batch: int  # users, or samples, a step
    seconds: float  # of processor time, warm-up not counted; at least three steps
    threads: int
    request: int = 0  # candidates of the one request that a trained ranker then scores; 0: none


class Meter:
    """Processor and wall seconds, rows and losses, from the step after the warm-up until the time is used up."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.steps, self.rows = seconds, 0, 0
        self.losses: list[float] = []
        self.cpu = self.wall = 0.0
        self.base_bytes = _peak_bytes()

    def step(self, rows: int, loss: float) -> bool:
        """Called after each step; True when it is time to stop."""
        self.steps += 1
        self.losses.append(loss)
        if self.steps == WARM_UP:
            self._cpu, self._wall = time.process_time(), time.perf_counter()
        elif self.steps > WARM_UP:
            self.rows += rows
            self.cpu, self.wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        return self.steps >= WARM_UP + 3 and self.cpu >= self.seconds

    def result(self, module: torch.nn.Module) -> dict[str, Any]:
        """The figures; `peak_bytes` of this process, of which `base_bytes` before the workload was opened."""
        return {
            "steps": self.steps - WARM_UP,
            "per_cpu_second": self.rows / self.cpu,
            "per_second": self.rows / self.wall,
            "loss_at": {str(step): float(np.mean(self.losses[max(0, step - 5) : step])) for step in (10, 20, 40, 80, 160) if step <= self.steps},
            "parameters": sum(p.numel() for p in module.parameters()),
            "base_bytes": self.base_bytes,
            "peak_bytes": _peak_bytes(),
        }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Watch(Callback):
    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        rows = len(batch.users_B) if isinstance(batch, SequenceBatch) else int(batch.candidates.lengths_B.sum())
        trainer.should_stop = self.meter.step(rows, float(outputs["loss"].detach()))


def train_ours(task: Task, settings: dict[str, Any]) -> dict[str, Any]:
    """Longtrail's own training, as longtrail.training.fitting puts it together, of the model that `settings` (as in params.yaml) describe.

    Reading of data, Lightning and running means of weights are included; validation and resume files, once an epoch, are not.
    """
    meter, features = _begin(task)
    model: Any = TypeAdapter[Any](Model).validate_python(settings)
    batches, learner_of = _ranking(task, features) if isinstance(model, RankerSettings) else _next_item(task, features)
    learner = learner_of(build_model(model, features.sizes), model)
    means = [WeightAverage(Progress(), model.weight_average)] if model.weight_average else []
    trainer = make_trainer(TrainingSettings(accelerator="cpu", threads=task.threads), [*means, _Watch(meter)], epochs=10_000)
    with freed_memory_is_kept():
        trainer.fit(learner, batches)
    figures = meter.result(learner)
    if task.request and isinstance(model, RankerSettings):
        figures["request_cpu_ms"] = request_cpu_ms(learner.model, make_request(task.length, task.request, features.sizes))
    return figures


def _next_item(task: Task, features: FeatureSet) -> tuple[Any, Callable[..., Learner]]:
    none = Exclusion(np.zeros(1, np.int64), np.zeros(0, np.int64))
    batches = SequenceBatches(features, max_history=task.length, batch_size=task.batch, seed=0)
    return batches, lambda module, settings: RetrieverLearner(module, settings, lambda batch: none)


def _ranking(task: Task, features: FeatureSet) -> tuple[Any, Callable[..., Learner]]:
    table = features.examples("train")
    requests = max(1, task.batch * features.users // table.num_rows)  # a request of C candidates is C samples
    return RankingBatches(features, "train", max_history=task.length, batch_size=requests, seed=0), RankerLearner


def train_padded_sasrec(task: Task, settings: dict[str, Any]) -> dict[str, Any]:
    """The twin of `sasrec`: the same windows, padded to L at the left, in shuffled order."""
    meter, features = _begin(task)
    events = features.history.gather(np.arange(1, features.users + 1), features.train_lengths[1:], task.length + 1)
    back_UL = np.arange(task.length + 1) - (task.length + 1 - events.lengths_B[:, None])  # right padding to left padding
    rows_UL = torch.from_numpy(np.where(back_UL >= 0, np.take_along_axis(events.items_BL, np.maximum(back_UL, 0), axis=1), 0))
    model = PaddedSASRec(features.sizes, length=task.length, **settings).train()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows_UL), batch_size=task.batch, shuffle=True)
    _loop(model, loader, lambda batch: (model.loss(batch[0][:, :-1], batch[0][:, 1:]), len(batch[0])), meter)
    return meter.result(model)


def train_tiled_din(task: Task, settings: dict[str, Any]) -> dict[str, Any]:
    """The twin of `din`: the same requests, cut into one row a sample, each with a copy of the history."""
    meter, features = _begin(task)
    model = TiledDIN(features.sizes, **settings).train()
    _loop(model, _ranking(task, features)[0], lambda batch: (_tiled_loss(model, batch), int(batch.candidates.lengths_B.sum())), meter)
    figures = meter.result(model)
    if task.request:
        rows = _tiled(*make_request(task.length, task.request, features.sizes))
        with torch.inference_mode():
            figures["request_cpu_ms"] = cpu_ms(lambda: model.logits(*rows))
    return figures


def _begin(task: Task) -> tuple[Meter, FeatureSet]:
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    return Meter(task.seconds), FeatureSet.open(Path(task.folder))


def _tiled_loss(model: TiledDIN, batch: RankingBatch) -> Tensor:
    return model.loss(*_tiled(batch.history, batch.candidates, batch.context), batch.clicks_BC.flatten())


def _tiled(history: History, shown: Candidates, context: Context) -> tuple[Any, Tensor, Any, Tensor]:
    """A row a candidate, each with its own copy of the history."""
    B, C = shown.items_BC.shape
    rows = tuple(x_BL.repeat_interleave(C, dim=0) for x_BL in (history.items_BL, history.categories_BL, history.actions_BL))
    rest_BCS = torch.cat([shown.statistics_BCF, context.statistics_BG.unsqueeze(1).expand(B, C, -1)], dim=-1)
    return rows, history.lengths_B.repeat_interleave(C), (shown.items_BC.flatten(), shown.categories_BC.flatten()), rest_BCS.flatten(0, 1)


def _loop(model: torch.nn.Module, batches: Any, loss_of: Callable[[Any], tuple[Tensor, int]], meter: Meter) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    while True:
        for batch in batches:
            optimiser.zero_grad()
            loss, rows = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if meter.step(rows, float(loss.detach())):
                return


CASES: dict[str, Callable[[Task, dict[str, Any]], dict[str, Any]]] = {
    "ours": train_ours,
    "padded SASRec": train_padded_sasrec,
    "tiled DIN": train_tiled_din,
}
