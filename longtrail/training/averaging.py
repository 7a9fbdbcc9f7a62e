"""Running means of a model's weights, which are what is judged and kept: what a falling learning rate is for, without knowing when training ends.

    after step t:   mean ← mean + max(1 - decay, 9 / (t + 9)) · (weights - mean)

Early on that is a mean over about the newest tenth of the steps (polynomial-decay averaging, Shamir & Zhang, ICML 2013), later an exponential one
over the newest 1 / (1 - decay). Our choice: the two joined, and running statistics of normalisation averaged as the weights are.
"""

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from longtrail.training.checkpoints import Progress

_FIRST = 9.0


class WeightAverage(Callback):
    """Keeps the means in `progress.average`, and puts them in the model's place while the validation split is judged.

    A copy of the model in memory. Every process of a training keeps its own: they see the same weights.
    """

    def __init__(self, progress: Progress, decay: float, accumulate: int = 1) -> None:
        self.progress, self.decay, self.accumulate = progress, decay, accumulate
        self.weights: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.weights:
            return
        # Not before: the first process's buffers have been given to all since training began.
        assert isinstance(pl_module.model, nn.Module)
        self.weights = changing(pl_module.model)
        places = [tensor.data_ptr() for tensor in self.weights.values() if tensor.numel()]
        assert len(set(places)) == len(places), "tensors that share memory would be exchanged twice"
        kept = self.progress.average
        self.progress.average = {name: kept.get(name, tensor).to(tensor.device, copy=True) for name, tensor in self.weights.items()}

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.accumulate:
            return
        self.progress.averaged += 1
        share = max(1 - self.decay, _FIRST / (self.progress.averaged + _FIRST))
        torch._foreach_lerp_(list(self.progress.average.values()), list(self.weights.values()), share)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        exchange(self.weights, self.progress.average)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        exchange(self.weights, self.progress.average)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.weights = {}  # of the device; Lightning moves the model away from there
        self.progress.average = {name: tensor.cpu() for name, tensor in self.progress.average.items()}


def changing(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors by name, those that training may change and a mean can be taken of: no frozen weights, no codes, no counters."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point() and name not in frozen}


@torch.no_grad()
def exchange(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Swap the contents of tensors of the same names, in place and one by one."""
    for name, tensor in one.items():
        kept = tensor.clone()
        tensor.copy_(other[name])
        other[name].copy_(kept)
