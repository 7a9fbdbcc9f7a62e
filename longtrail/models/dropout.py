"""Dropout whose random numbers do not cost more than the layer around it.

torch draws one 64-bit number for every element and compares it with p: on a CPU that took 10 % of a SASRec training step. Here a 64-bit
number is cut into four, so p is rounded to 1/65,536; the kept elements are scaled by the rounded p, so the expectation is exact. Ours. On
other devices it is torch's own.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

_LEVELS = 1 << 16


class Dropout(nn.Module):
    """Sets each element to 0 with probability `p` while training and scales the others by 1 / (1 - p). Drawn from torch's global generator."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * self._noise(x) if x.device.type == "cpu" else functional.dropout(x, self.p)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """x + dropout(y), in one pass: a residual sum."""
        if self.training and self.p > 0 and y.device.type == "cpu":
            return torch.addcmul(x, y.to(x.dtype), self._noise(x))
        return x + self(y)

    def _noise(self, x: Tensor) -> Tensor:
        """0 or 1 / (1 - p) for each element of `x`."""
        dropped = min(round(self.p * _LEVELS), _LEVELS - 1)
        whole = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
        kept = whole.view(torch.int16)[: x.numel()] >= dropped - _LEVELS // 2
        return kept.view(x.shape).to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))
