"""Exact multi-head cross attention: what linear attention is compared with. B requests, L keys, C queries, D width, H heads, E = D / H."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class CrossAttention(nn.Module):
    """softmax(q · k / sqrt(E)) by torch's scaled-dot-product kernels: O(C · L · D) time, and no tensor of C · L numbers on their fused paths."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Linear(width, width, bias=False)
        self.keys_values = nn.Linear(width, 2 * width, bias=False)

    def forward(self, query_BCD: Tensor, keys_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, C, D], zeros where no key is real."""
        empty_B111 = (~mask_BL.any(1)).view(-1, 1, 1, 1)  # they look at everything and are then set to zero: never a softmax over nothing
        query_BHCE = self._split(self.queries(query_BCD))
        key_BHLE, value_BHLE = (self._split(x) for x in self.keys_values(keys_BLD).chunk(2, dim=-1))
        seen_B11L = mask_BL[:, None, None] | empty_B111
        read_BHCE = functional.scaled_dot_product_attention(query_BHCE, key_BHLE, value_BHLE, attn_mask=seen_B11L)
        return read_BHCE.masked_fill(empty_B111, 0).transpose(1, 2).flatten(2)

    def weights(self, query_BCD: Tensor, keys_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, C, L], the mean over heads; all zeros where no key is real. To explain, not to train: it builds every pair."""
        keys_BLD = self.keys_values(keys_BLD)[..., : keys_BLD.shape[-1]]
        query_BHCE, key_BHLE = self._split(self.queries(query_BCD)), self._split(keys_BLD)
        scores_BHCL = query_BHCE @ key_BHLE.transpose(2, 3) * query_BHCE.shape[-1] ** -0.5
        padded_B11L = ~mask_BL[:, None, None]
        return scores_BHCL.masked_fill(padded_B11L, torch.finfo(scores_BHCL.dtype).min).softmax(-1).masked_fill(padded_B11L, 0).mean(1)

    def _split(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.heads, -1)).transpose(1, 2)
