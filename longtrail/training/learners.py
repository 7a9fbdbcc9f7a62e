"""What a step of training and a pass over the validation split are, for each stage. Nothing here knows files or devices.

B requests, L history, C candidates, D width, N items.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from longtrail.config import EncoderSettings, RankerSettings
from longtrail.errors import LongtrailError, ModelError
from longtrail.examples import RankingBatch, SequenceBatch, TargetBatch
from longtrail.losses import mean_over, next_item_loss, ranking_loss
from longtrail.metrics import auc, gauc, log_loss, retrieval_metrics
from longtrail.models.contracts import Watched, WithAuxiliary
from longtrail.models.masks import padding_mask
from longtrail.retrieval.exact import exact_index
from longtrail.retrieval.index import Exclusion

_LOSSES_BETWEEN_CHECKS = 32  # our choice: reading a loss makes a GPU wait, so they are looked at in bundles
_WATCHED_BATCHES = 32  # of a pass over the validation split: health costs nearly what scoring does


class DivergedError(LongtrailError):
    """The loss, or what the model says of the validation split, is no longer a number."""


class Learner(lightning.LightningModule):
    """A model, its optimiser and its loss. `metrics` are those of the newest pass over the validation split.

    A step's loss is a mean over all that its batch holds. Where the batch is cut into pieces (several processes, accumulation), each piece's loss is
    weighed by what it is the mean of, and the sum of gradients divided by the whole step's weight: that step is the step of the uncut batch, whatever
    the sizes of the pieces. Lightning alone would average the means of the pieces.
    """

    def __init__(self, model: nn.Module, settings: RankerSettings | EncoderSettings) -> None:
        super().__init__()
        self.model: Any = model
        self.settings = settings
        self.epoch = 1  # counted over all runs of a resumed training
        self.first_step = 0  # of this epoch in this run: those before it were an earlier run's
        self.metrics: dict[str, float] = {}
        self.examples = 0
        self.optimiser_state: Mapping[int, Mapping[str, Tensor]] = {}  # what a resumed training starts from
        self.totals: tuple[float, float] = (0.0, 0.0)  # of this epoch's earlier part: Σ loss · weight, Σ weight
        self._losses: list[Tensor] = []
        self._weights: list[int] = []
        self._checked = self._before = 0
        self._step_weight = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; weight decay spares biases, whatever their shape, scales and the other vectors (our choice, as is usual)."""
        decayed: list[nn.Parameter] = []
        spared: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (decayed if parameter.ndim > 1 and "bias" not in name else spared).append(parameter)
        groups = [{"params": decayed, "weight_decay": self.settings.weight_decay}, {"params": spared, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.settings.learning_rate)
        if self.optimiser_state:
            optimiser.load_state_dict({**optimiser.state_dict(), "state": {i: dict(state) for i, state in self.optimiser_state.items()}})
            self.optimiser_state = {}
        return optimiser

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device)

    def on_train_epoch_start(self) -> None:
        self._losses, self._weights, self._checked, self._before, self.examples, self._step_weight = [], [], 0, 0, 0, 0

    @property
    def pieces(self) -> int:
        """Into how many a step's batch is cut, all processes counted."""
        return 1 if self._trainer is None else self._trainer.world_size * self._trainer.accumulate_grad_batches

    def account(self, loss: Tensor, examples: int) -> Tensor:
        """Remember a piece's loss, the mean over its `examples`; what is to be differentiated. Raises DivergedError."""
        self._losses.append(loss.detach().float())
        self._weights.append(examples)
        self.examples += examples
        if len(self._losses) - self._checked >= _LOSSES_BETWEEN_CHECKS:
            self.check()
        if self.pieces == 1:
            return loss
        self._step_weight += examples
        return loss * examples

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """From the mean over pieces, which Lightning and DDP have made, of loss · weight to the mean over the whole step."""
        if self.pieces == 1:
            return
        weight = self._over_processes(torch.tensor(self._step_weight, dtype=torch.float64))
        self._step_weight = 0
        torch._foreach_mul_([p.grad for p in self.parameters() if p.grad is not None], self.pieces / max(float(weight), 1.0))

    def _over_processes(self, x: Tensor) -> Tensor:
        """The sum of `x` over all processes."""
        if self._trainer is None or self._trainer.world_size == 1:
            return x
        total: Tensor = self._trainer.strategy.reduce(x.to(self.device), reduce_op="sum")
        return total.cpu()

    def check(self) -> None:
        """Raises DivergedError naming the first step of this epoch whose loss is not finite."""
        fresh = torch.stack(self._losses[self._checked :]) if len(self._losses) > self._checked else torch.zeros(1)
        bad = (~torch.isfinite(fresh)).nonzero()
        if len(bad):
            of_a_step = 1 if self._trainer is None else self._trainer.accumulate_grad_batches
            step = (self._before + self._checked + int(bad[0])) // of_a_step + 1
            raise self._diverged(f", step {self.first_step + step}: the loss is {float(fresh[bad[0]]):g}")
        self._checked = len(self._losses)

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"epoch {self.epoch}{what}; try a smaller learning_rate (now {self.settings.learning_rate:g}) or training.gradient_clip, "
            "training.precision: fp32 if it was bf16, and look for extreme values in the features"
        )

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """Around what asks the model about the validation split: where it has been trained, ModelError becomes DivergedError."""
        trainer = self._trainer
        try:
            yield
        except ModelError as error:
            if trainer is not None and (trainer.state.fn != "fit" or trainer.sanity_checking):
                raise ModelError(f"before training: {error}") from None  # counts, or the weights of an earlier model
            raise self._diverged(f": {error}") from None

    def train_loss(self) -> float:
        """Mean loss of this epoch over its examples, those of all processes."""
        self.settle()
        total, weight = self.totals
        return total / weight if weight else float("nan")

    def settle(self) -> None:
        """Add what this process has accounted since to `totals`, which then are the same in all processes. Raises DivergedError."""
        self.check()
        losses = torch.stack(self._losses).cpu().double() if self._losses else torch.zeros(0, dtype=torch.float64)
        weights = torch.tensor(self._weights, dtype=torch.float64)
        total, weight = self._over_processes(torch.stack([(losses * weights).sum(), weights.sum()])).tolist()
        self.totals = (self.totals[0] + total, self.totals[1] + weight)
        self._before += len(self._losses)
        self._losses, self._weights, self._checked = [], [], 0

    def on_validation_epoch_start(self) -> None:
        self.check()  # a model of NaNs is not worth a pass


class RankerLearner(Learner):
    """Cross-entropy of clicks over the exposed candidates, and `listwise` over the sets; judged by AUC, GAUC and log loss of the whole split."""

    settings: RankerSettings

    def logits(self, batch: RankingBatch) -> Tensor:
        return self.model(batch.history, batch.candidates, batch.context)

    def training_step(self, batch: RankingBatch, index: int) -> Tensor:
        exposed_BC, lengths_B = batch.exposed, batch.candidates.lengths_B
        model = self.model
        each = model.training_logits(batch.history, batch.candidates, batch.context) if isinstance(model, WithAuxiliary) else [self.logits(batch)]
        listwise = self._listwise(batch)
        losses = [ranking_loss(logits_BC, batch.clicks_BC, lengths_B, exposed_BC=exposed_BC, listwise=listwise) for logits_BC in each]
        return self.account(torch.stack(losses).sum(), batch.exposures)

    def _listwise(self, batch: RankingBatch) -> float:
        """Its weight. The listwise loss is a mean over clicks, but a piece is weighed by what was exposed: here the one is turned into the other."""
        if not self.settings.listwise or not batch.step_click_rate:
            return self.settings.listwise
        return self.settings.listwise * batch.clicks / max(batch.exposures, 1) / batch.step_click_rate

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._health: dict[str, float] = {}  # Σ figure · weight
        self._watched = 0
        # Batches are sorted by length: the first ones hold the shortest histories.
        batches = 1 if self._trainer is None else int(sum(self._trainer.num_val_batches))
        self._watched_every = -(-batches // _WATCHED_BATCHES)

    def validation_step(self, batch: RankingBatch, index: int) -> None:
        if index % self._watched_every == self._watched_every // 2 and isinstance(self.model, Watched):
            self._watch(self.model, batch)
        logits_BC = self.logits(batch)
        real_BC = padding_mask(batch.candidates.lengths_B, logits_BC.shape[1])
        users_BC = batch.users_B[:, None].expand_as(real_BC)
        users, clicks, logits = (_kept(x[real_BC]) for x in (users_BC, batch.clicks_BC, logits_BC.float()))
        self._rows.append((users, clicks, logits))

    def _watch(self, model: Watched, batch: RankingBatch) -> None:
        weight = int((batch.candidates.lengths_B * (batch.history.lengths_B > 0)).sum())
        for name, value in model.health(batch.history, batch.candidates, batch.context).items():
            self._health[name] = self._health.get(name, 0.0) + value * weight
        self._watched += weight

    def on_validation_epoch_end(self) -> None:
        users, clicks, logits = (np.concatenate(parts) for parts in zip(*self._rows, strict=True))
        with self._judged():
            if wrong := int(np.count_nonzero(~np.isfinite(logits))):
                raise ModelError(f"{wrong} of {len(logits)} scores of the validation split are not finite")
        values = {"gauc": gauc(users, clicks, logits), "auc": auc(clicks, logits), "log_loss": log_loss(clicks, logits)}
        self.metrics = {name: value for name, value in values.items() if value is not None}
        self.metrics |= {name: total / self._watched for name, total in self._health.items()}


class RetrieverLearner(Learner):
    """Next item of SequenceBatches; judged by unsampled NDCG@10 and recall@10 of TargetBatches, what `exclude` says of a batch left out."""

    settings: EncoderSettings

    def __init__(self, model: nn.Module, settings: EncoderSettings, exclude: Callable[[TargetBatch], Exclusion | None]) -> None:
        super().__init__(model, settings)
        self.exclude = exclude

    def training_step(self, batch: SequenceBatch, index: int) -> Tensor:
        pairs = self.model.training_pairs(batch)
        return self.account(next_item_loss(pairs, self.model.items, self.settings), mean_over(pairs, self.settings))

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        with self._judged():
            self._index = exact_index(self.model)
        self._ranks: list[np.ndarray] = []

    def validation_step(self, batch: TargetBatch, index: int) -> None:
        users_BD = self.model.user_vectors(batch.history)
        with self._judged():
            *_, ranks_B = self._index.topk_and_ranks(users_BD, batch.targets_B, 10, exclude=self.exclude(batch))
        self._ranks.append(_kept(ranks_B))

    def on_validation_epoch_end(self) -> None:
        values = retrieval_metrics(np.concatenate(self._ranks), (10,))
        self.metrics = {name: value for name, value in values.items() if value is not None}


def _kept(x: Tensor) -> NDArray[Any]:
    """A copy for the rest of a pass, made when the batch's large blocks are free again.

    A small tensor made among them and kept splits what they leave, and the next batch asks there for a block of theirs in vain: while ranks were
    kept, a process grew from 750 MB to 1.8 GB by 242 batches of scores over 23,715 items.
    """
    return x.cpu().numpy().copy()
