"""Starts for attention: what is like the candidate weighs more. D width, H hidden units, F clusters. Ours, no paper's.

With weights at random, the sum over a history is a mean of its events plus a hundredth of what tells them apart, and what that should be has to be
found through two sigmoids: training stood still for epochs (docs/models/sam.md). Candidates and events share their tables, so that their inner
product means something before the first step.
"""

import torch
from torch import Tensor


@torch.no_grad()
def start_alike(
    first_4DH: Tensor,
    bias_H: Tensor,
    last_H: Tensor,
    last_bias: Tensor | None,
    similarity: tuple[float, float],
    *,
    product: int,
    squashed: bool,
    scale: float,
) -> None:
    """Half of the units become sigmoid(2 s - 2), s = (q · k - mean) / spread; the other half stays as it is.

    `product` is the place of q * k among the first layer's four blocks. What those units say of a pair runs from 0 to 1, or from -3 to 3 where the
    scores, times `scale`, are `squashed` into weights afterwards.
    """
    mean, spread = similarity
    half = max(1, len(last_H) // 2)
    first_4DH[:, :, :half] = 0
    first_4DH[product, :, :half] = 2 / spread
    bias_H[:half] = -2 * mean / spread - 2
    last_H[:half] = (6 / scale if squashed else 1) / half
    if squashed and last_bias is not None:
        last_bias.fill_(-3 / scale)


@torch.no_grad()
def cluster_centres(x_nD: Tensor, clusters: int, *, seed: int, rounds: int = 15) -> Tensor:
    """Centres [F, D] of k-means: first centres as k-means++ draws them (Arthur & Vassilvitskii, SODA 2007), then Lloyd's rounds.

    The same for the same vectors and seed. Of fewer distinct vectors than clusters some become centres twice.
    """
    draws = torch.Generator().manual_seed(seed)
    x_nD = x_nD.detach().double().cpu()
    chosen = [x_nD[torch.randint(len(x_nD), (1,), generator=draws)]]
    distance_n = (x_nD - chosen[0]).square().sum(1)
    for _ in range(clusters - 1):
        chances_n = distance_n if bool(distance_n.any()) else torch.ones_like(distance_n)
        chosen.append(x_nD[torch.multinomial(chances_n, 1, generator=draws)])
        distance_n = torch.minimum(distance_n, (x_nD - chosen[-1]).square().sum(1))
    centres_FD = torch.cat(chosen)
    for _ in range(rounds):
        nearest_n = (centres_FD.square().sum(1) - 2 * x_nD @ centres_FD.T).argmin(1)
        members_F = torch.bincount(nearest_n, minlength=clusters).unsqueeze(1)
        sums_FD = torch.zeros_like(centres_FD).index_add_(0, nearest_n, x_nD)
        centres_FD = torch.where(members_F > 0, sums_FD / members_F.clamp(min=1), centres_FD)
    return centres_FD
