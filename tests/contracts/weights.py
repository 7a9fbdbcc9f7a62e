"""Weights that are not those a model starts from."""

from typing import Any

import torch

from tests.contracts.batches import draws


@torch.no_grad()
def with_drawn_weights(model: Any, *, std: float = 0.3, seed: int = 11) -> Any:
    """In float64. A start of 0, 1 or ¼ (biases, scales, slopes, running statistics) would hide what a number is used for; rows of padding stay 0."""
    random, model = draws(seed), model.double()
    for name, value in model.named_parameters():
        value.add_(torch.randn(value.shape, generator=random, dtype=value.dtype) * std)
        if name.endswith(("table", "actions", "gaps")):
            value[0] = 0
    for name, value in model.named_buffers():
        if name.endswith("norm.mean"):
            value.normal_(generator=random)
        elif name.endswith("norm.variance"):
            value.uniform_(0.2, 3, generator=random)
    return model
