"""A start for attention by a small MLP: what is like the candidate weighs more. D width, H hidden units. Ours, no paper's.

With weights at random, the sum over a history is a mean of its events plus a hundredth of what tells them apart, and what that should be has to be
found through two sigmoids: training stood still for epochs (docs/models/sam.md). Candidates and events share their tables, so that their inner
product means something before the first step.
"""

import torch
from torch import Tensor


@torch.no_grad()
def start_alike(
    first_4DH: Tensor, bias_H: Tensor, last_H: Tensor, last_bias: Tensor | None, similarity: tuple[float, float], *, product: int, squashed: bool
) -> None:
    """Half of the units become sigmoid(2 s - 2), s = (q · k - mean) / spread; the other half stays as it is.

    `product` is the place of q * k among the first layer's four blocks. What those units say of a pair runs from 0 to 1, or from -3 to 3 where the
    scores are `squashed` into weights afterwards.
    """
    mean, spread = similarity
    half = max(1, len(last_H) // 2)
    first_4DH[:, :, :half] = 0
    first_4DH[product, :, :half] = 2 / spread
    bias_H[:half] = -2 * mean / spread - 2
    last_H[:half] = (6 if squashed else 1) / half
    if squashed and last_bias is not None:
        last_bias.fill_(-3)
