"""What IFA (ifa.py) does with a read of the history, and what its candidates say of each other.

B requests, C candidates, D width. A reconstruction, as all of IFA (docs/models/ifa.md); the exact branch and the start of the weights are ours.
"""

import torch
from torch import Tensor, nn

from longtrail.config import IFASettings
from longtrail.models.attention.cross import CrossAttention
from longtrail.models.attention.linear import LinearAttention


class Relation(nn.Module):
    """What candidates say of each other: attention among the real ones of a set, without places, so that their order means nothing."""

    def __init__(self, width: int, heads: int, kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.softmax = CrossAttention(width, heads) if kind == "softmax" else None
        self.linear = LinearAttention(width, heads=heads, features=width // heads) if kind == "linear" else None
        self.output = nn.Linear(width, width)

    def forward(self, x_BCD: Tensor, mask_BC: Tensor) -> Tensor:
        """[B, C, D], to be added to `x`."""
        x_BCD = self.norm(x_BCD).masked_fill(~mask_BC.unsqueeze(-1), 0)
        if self.softmax is not None:
            return self.output(self.softmax(x_BCD, x_BCD, mask_BC))
        assert self.linear is not None
        return self.output(self.linear.read(x_BCD, self.linear.state(x_BCD, mask_BC), 0))


class Layer(nn.Module):
    """What becomes of a read: it is added to the candidate's vector, and so is what a feed-forward net makes of that."""

    def __init__(self, settings: IFASettings, width: int) -> None:
        super().__init__()
        alone = settings.feature_map == "clusters" and not settings.recent_events  # nobody asks for LN x
        self.norm = None if alone else nn.LayerNorm(width)
        self.output = nn.Linear(width, width)
        self.whole = CrossAttention(width, settings.exact_heads) if settings.feature_map == "softmax" else None
        self.recent = CrossAttention(width, settings.exact_heads) if settings.recent_events else None
        self.recent_output = nn.Linear(width, width, bias=False) if settings.recent_events else None
        inner = (nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(settings.dropout), nn.Linear(4 * width, width))
        self.feed = nn.Sequential(*inner)
        with torch.no_grad():
            self.output.weight.copy_(torch.eye(width))
            if self.whole is not None:
                self.whole.keys_values.weight[width:] = torch.eye(width)

    def normal(self, x_BCD: Tensor) -> Tensor:
        """LN x; x itself where nobody asks for it."""
        return x_BCD if self.norm is None else self.norm(x_BCD)

    def forward(self, x_BCD: Tensor, normal_BCD: Tensor, read_BCD: Tensor, recent: tuple[Tensor, Tensor] | None) -> Tensor:
        """`read` is what x read of the whole history; the exact branch reads the keys and mask of `recent`."""
        x_BCD = x_BCD + self.output(read_BCD)
        if recent is not None and self.recent is not None and self.recent_output is not None:
            x_BCD = x_BCD + self.recent_output(self.recent(normal_BCD, *recent))
        return x_BCD + self.feed(x_BCD)
