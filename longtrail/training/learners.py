"""What a step of training and a pass over the validation split are, for each stage. Nothing here knows files or devices.

B requests, L history, C candidates, D width, N items.
"""

from collections.abc import Callable, Mapping
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn

from longtrail.config import EncoderSettings, RankerSettings
from longtrail.errors import LongtrailError
from longtrail.examples import RankingBatch, SequenceBatch, TargetBatch
from longtrail.losses import next_item_loss, ranking_loss
from longtrail.metrics import auc, gauc, log_loss, retrieval_metrics
from longtrail.models.contracts import Watched, WithAuxiliary
from longtrail.models.masks import padding_mask
from longtrail.retrieval.exact import exact_index
from longtrail.retrieval.index import Exclusion

_LOSSES_BETWEEN_CHECKS = 32  # our choice: reading a loss makes a GPU wait, so they are looked at in bundles


class DivergedError(LongtrailError):
    """The loss is no longer a number."""


class Learner(lightning.LightningModule):
    """A model, its optimiser and its loss. `metrics` are those of the newest pass over the validation split."""

    def __init__(self, model: nn.Module, settings: RankerSettings | EncoderSettings) -> None:
        super().__init__()
        self.model: Any = model
        self.settings = settings
        self.epoch = 1  # counted over all runs of a resumed training
        self.metrics: dict[str, float] = {}
        self.examples = 0
        self.optimiser_state: Mapping[int, Mapping[str, Tensor]] = {}  # what a resumed training starts from
        self._losses: list[Tensor] = []
        self._weights: list[int] = []
        self._checked = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; weight decay spares biases, scales and the other vectors (our choice, as is usual)."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.settings.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.settings.learning_rate)
        if self.optimiser_state:
            optimiser.load_state_dict({**optimiser.state_dict(), "state": {i: dict(state) for i, state in self.optimiser_state.items()}})
            self.optimiser_state = {}
        return optimiser

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device)

    def on_train_epoch_start(self) -> None:
        self._losses, self._weights, self._checked, self.examples = [], [], 0, 0

    def account(self, loss: Tensor, examples: int) -> Tensor:
        """Remember a step's mean loss over its `examples`. Raises DivergedError."""
        self._losses.append(loss.detach().float())
        self._weights.append(examples)
        self.examples += examples
        if len(self._losses) - self._checked >= _LOSSES_BETWEEN_CHECKS:
            self.check()
        return loss

    def check(self) -> None:
        """Raises DivergedError naming the first step of this epoch whose loss is not finite."""
        fresh = torch.stack(self._losses[self._checked :]) if len(self._losses) > self._checked else torch.zeros(1)
        bad = (~torch.isfinite(fresh)).nonzero()
        if len(bad):
            step = self._checked + int(bad[0]) + 1
            raise DivergedError(
                f"epoch {self.epoch}, step {step}: the loss is {float(fresh[bad[0]]):g}; try a smaller learning_rate "
                f"(now {self.settings.learning_rate:g}) or training.gradient_clip, training.precision: fp32 if it was bf16, "
                "and look for extreme values in the features"
            )
        self._checked = len(self._losses)

    def train_loss(self) -> float:
        """Mean loss of this epoch over its examples."""
        if not self._losses:
            return float("nan")
        return float(np.average(torch.stack(self._losses).cpu().double().numpy(), weights=self._weights))

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
        losses = [ranking_loss(logits_BC, batch.clicks_BC, lengths_B, exposed_BC=exposed_BC, listwise=self.settings.listwise) for logits_BC in each]
        return self.account(torch.stack(losses).sum(), int(exposed_BC.sum()))

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._health: dict[str, float] = {}

    def validation_step(self, batch: RankingBatch, index: int) -> None:
        if index == 0 and isinstance(self.model, Watched):
            self._health = self.model.health(batch.history, batch.candidates, batch.context)
        logits_BC = self.logits(batch)
        real_BC = padding_mask(batch.candidates.lengths_B, logits_BC.shape[1])
        users_BC = batch.users_B[:, None].expand_as(real_BC)
        users, clicks, logits = (x[real_BC].cpu().numpy() for x in (users_BC, batch.clicks_BC, logits_BC.float()))
        self._rows.append((users, clicks, logits))

    def on_validation_epoch_end(self) -> None:
        users, clicks, logits = (np.concatenate(parts) for parts in zip(*self._rows, strict=True))
        values = {"gauc": gauc(users, clicks, logits), "auc": auc(clicks, logits), "log_loss": log_loss(clicks, logits)}
        self.metrics = {name: value for name, value in values.items() if value is not None} | self._health


class RetrieverLearner(Learner):
    """Next item of SequenceBatches; judged by unsampled NDCG@10 and recall@10 of TargetBatches, items of the history excluded."""

    settings: EncoderSettings

    def __init__(self, model: nn.Module, settings: EncoderSettings, exclude: Callable[[TargetBatch], Exclusion]) -> None:
        super().__init__(model, settings)
        self.exclude = exclude

    def training_step(self, batch: SequenceBatch, index: int) -> Tensor:
        pairs = self.model.training_pairs(batch)
        return self.account(next_item_loss(pairs, self.model.items, self.settings), len(pairs.targets_T))

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._index = exact_index(self.model)
        self._ranks: list[np.ndarray] = []

    def validation_step(self, batch: TargetBatch, index: int) -> None:
        users_BD = self.model.user_vectors(batch.history)
        *_, ranks_B = self._index.topk_and_ranks(users_BD, batch.targets_B, 10, exclude=self.exclude(batch))
        self._ranks.append(ranks_B.cpu().numpy())

    def on_validation_epoch_end(self) -> None:
        values = retrieval_metrics(np.concatenate(self._ranks), (10,))
        self.metrics = {name: value for name, value in values.items() if value is not None}
