"""From what a ranker has read to a logit. B requests, C candidates, X features, F item and G user statistics.

Not published for SAM; the choice is that of the baseline code its authors name (MIMN): BatchNorm → 200 → PReLU → 80 → PReLU → 1 over
[query ; what was read ; newest actions ; statistics]. SAM's own BatchNorm over its output (eps 1e-3) and the head's are one layer here: two in a row
are one. Ours: it renormalises, so that training sees what serving sees. Its statistics are taken over the real candidates of a whole batch of
requests, on all processes that train together, never over padding, and it must be in eval mode when serving.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn

from longtrail.statistics import ITEM_FEATURES, USER_FEATURES

ITEM_CLICK_RATE, USER_CLICK_RATE = 2, 2  # their places in longtrail.statistics.item_features and user_features


class MaskedBatchNorm(nn.Module):
    """Batch renormalisation (Ioffe, NeurIPS 2017; its bounds left out) over the real places of [B, C, X].

    In training as in serving, x is normalised by the running mean and variance; only the gradient is that of batch normalisation. For our batches
    hold histories of like length (examples/buckets.py): normalised by their own statistics, whatever goes with length would be about 0 in training
    and far from it in serving. The running variance is that of all places, between batches as within. Momentum: our choice (TF's 0.001 never
    settles in our short runs).
    """

    def __init__(self, features: int, *, eps: float = 1e-3, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.scale = nn.Parameter(torch.ones(features))
        self.shift = nn.Parameter(torch.zeros(features))
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))

    def forward(self, x_BCX: Tensor, mask_BC: Tensor) -> Tensor:
        x_BCX = x_BCX.to(self.scale.dtype)
        if not self.training:
            gain_X = self.scale * torch.rsqrt(self.variance + self.eps)
            return x_BCX * gain_X + (self.shift - self.mean * gain_X)
        mean_X, variance_X = self._statistics(x_BCX, mask_BC.unsqueeze(-1))
        own_X = torch.rsqrt(variance_X + self.eps)
        with torch.no_grad():  # constants to the gradient: what turns a place normalised by its batch into one normalised by the running statistics
            running_X = torch.rsqrt(self.variance + self.eps)
            turn_X, offset_X = running_X / own_X, (mean_X - self.mean) * running_X
        gain_X = self.scale * own_X * turn_X
        return x_BCX * gain_X + (self.shift + self.scale * offset_X - mean_X * gain_X)

    def _statistics(self, x_BCX: Tensor, mask_BC1: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of this batch; the running ones have taken them in."""
        real = _total(mask_BC1.sum())
        count = real.clamp(min=1)
        mean_X = _total(x_BCX.masked_fill(~mask_BC1, 0).sum((0, 1))) / count
        variance_X = _total((x_BCX - mean_X).masked_fill(~mask_BC1, 0).square().sum((0, 1))) / count
        with torch.no_grad():
            momentum = self.momentum * (real > 0).to(mean_X.dtype)  # a batch without candidates says nothing
            between_X = (1 - momentum) * (mean_X - self.mean).square()
            self.mean.lerp_(mean_X, momentum)
            self.variance.lerp_(variance_X * (count / (count - 1).clamp(min=1)) + between_X, momentum)
        return mean_X, variance_X


def _total(x: Tensor) -> Tensor:
    """The sum of `x` over all processes that train together; gradients are summed the same way."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return x
    from torch.distributed.nn.functional import all_reduce  # not at the top: what serves needs none of it

    return all_reduce(x)  # type: ignore[no-untyped-call,no-any-return]


class Head(nn.Module):
    """Logits [B, C]: deep([what was read ; statistics]) + wide(statistics), S = F + G statistics of item and user.

    The wide part is ours: a linear layer that starts at 1 for the item's click rate and 1/2 for the user's (both are logits less the prior's),
    beside a last deep layer that starts near 0. So an untrained ranker orders as the smoothed click rate does, and learns the rest.
    """

    def __init__(self, features: int, hidden: Sequence[int], dropout: float) -> None:
        """`features` are those of `parts`, statistics not counted."""
        super().__init__()
        statistics = ITEM_FEATURES + USER_FEATURES
        features += statistics
        self.norm = MaskedBatchNorm(features)
        layers: list[nn.Module] = []
        for units in hidden:
            layers += [nn.Linear(features, units), nn.PReLU(), nn.Dropout(dropout)]
            features = units
        self.layers = nn.Sequential(*layers, last := nn.Linear(features, 1))
        self.wide = nn.Parameter(torch.zeros(statistics))
        with torch.no_grad():
            last.weight.mul_(0.1)
            self.wide[ITEM_CLICK_RATE] = 1.0
            self.wide[ITEM_FEATURES + USER_CLICK_RATE] = 0.5

    def forward(self, parts: Sequence[Tensor], item_BCF: Tensor, user_BG: Tensor, mask_BC: Tensor) -> Tensor:
        """`parts` are [B, C, *]; the statistics those of Candidates and Context. Logits are of the weights' dtype under autocast
        too. Raises ValueError for another number of statistics."""
        B, C = mask_BC.shape
        dtype = self.norm.scale.dtype
        if item_BCF.shape[-1] != ITEM_FEATURES or user_BG.shape[-1] != USER_FEATURES:
            raise ValueError(
                f"{item_BCF.shape[-1]} statistics of an item and {user_BG.shape[-1]} of a user; "
                f"expected {ITEM_FEATURES} and {USER_FEATURES}, as longtrail.statistics makes them"
            )
        statistics_BCS = torch.cat([item_BCF, user_BG.unsqueeze(1).expand(B, C, -1)], dim=-1).to(dtype)
        x_BCX = torch.cat([*(part.to(dtype) for part in parts), statistics_BCS], dim=-1)
        *deep, last = self.layers
        x_BCX = self.norm(x_BCX, mask_BC)
        for layer in deep:
            x_BCX = layer(x_BCX)
        with torch.autocast(x_BCX.device.type, enabled=False):  # logits of 8 bits would tie, and whoever ranks by them guess
            return last(x_BCX.to(dtype)).squeeze(-1) + statistics_BCS @ self.wide
