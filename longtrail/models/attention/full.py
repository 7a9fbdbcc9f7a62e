"""Causal self-attention over the whole history. B users, L history, D width, H heads."""

from torch import Tensor, nn
from torch.nn import functional


class FullAttention(nn.Module):
    """Multi-head causal attention through torch's scaled-dot-product kernels.

    The mask is `is_causal`, never an L×L tensor. Histories are right-padded, so a real place never looks at padding and no padding mask is needed;
    what stands in padded places is undefined. There is no dropout on the attention weights (our choice): torch's CPU flash kernel has none,
    and the fallback would build the L×L weights.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}")
        self.heads = heads
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        query, key, value = self.inputs(x_BLD).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed_BHLd = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed_BHLd.transpose(1, 2).reshape(B, L, D))
