"""Self-attention over the whole history. B users, L history, D width, H heads."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtrail.models.attention.rope import rotate
from longtrail.models.masks import padding_mask


class FullAttention(nn.Module):
    """Multi-head attention through torch's scaled-dot-product kernels: O(L²·D) time, memory linear in L.

    Causal: place t looks at places 0..t. The mask is `is_causal`, never an L×L tensor; histories are right-padded, so a real place never looks at
    padding. Bidirectional: every place looks at every real one; the mask is [B, 1, 1, L]. What stands in padded places is undefined, but finite; a
    history without a single event mixes nothing and reads zeros. There is no dropout on the attention weights (our choice): torch's CPU flash
    kernel has none, and the fallback would build the L×L weights. With `rotary` queries and keys are turned by their places (rope.py): what attention
    sees of two places is how far apart they are.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = True, rotary: bool = False) -> None:
        """Raises ValueError where `heads` does not divide `width`, or `rotary` has pairs to turn and the heads are odd."""
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}")
        if rotary and width // heads % 2:
            raise ValueError(f"width {width} divided by heads {heads} is not an even number: positions rotate pairs")
        self.heads = heads
        self.causal = causal
        self.rotary = rotary
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """[B, L, D] of x [B, L, D] and the real places of each row, 0..L."""
        B, L, D = x_BLD.shape
        query_BLHd, key_BLHd, value_BLHd = self.inputs(x_BLD).view(B, L, 3, self.heads, D // self.heads).unbind(2)
        if self.rotary:
            wide = torch.promote_types(x_BLD.dtype, torch.float32)  # halves have no complex form on every device
            query_BLHd, key_BLHd = (rotate(part_BLHd.to(wide)).to(value_BLHd.dtype) for part_BLHd in (query_BLHd, key_BLHd))
        query, key, value = (part_BLHd.transpose(1, 2) for part_BLHd in (query_BLHd, key_BLHd, value_BLHd))
        if self.causal:
            mixed_BHLd = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            empty_B111 = (lengths_B == 0).view(B, 1, 1, 1)  # their rows look at everything, and are then set to zero: never a softmax over nothing
            keys_B11L = padding_mask(lengths_B, L).view(B, 1, 1, L) | empty_B111
            mixed_BHLd = functional.scaled_dot_product_attention(query, key, value, attn_mask=keys_B11L).masked_fill(empty_B111, 0)
        return self.output(mixed_BHLd.transpose(1, 2).reshape(B, L, D))
