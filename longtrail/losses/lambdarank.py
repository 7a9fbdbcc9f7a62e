"""LambdaRank (Burges, 2010) as the GRU4Rec of the RecJPQ paper is trained with it.

W lists, T targets, D width, N items, P places of a list, J places of its head. The gradient is given, not derived from a loss. In the order of the
predicted scores s, with gains g = 2^y - 1 and discounts d_p = 1 / log2(p + 1):

    z_ij = (s_i - s_j) · sign(g_i - g_j)      Δ_ij = (g_i - g_j) · |d_i - d_j| / IDCG
    λ_ij = -Δ_ij / (|z_ij| + 0.01) / (1 + e^z_ij)       for i among the first P = 3,000 places and j among the first J = 50;
                                                        not divided by |z_ij| + 0.01 where all scores of a list are equal
    λ_j = -Σ_i λ_ij for j in the head, λ_i = Σ_j λ_ij below it; then each list is scaled by log2(1 + Σ|λ|) / Σ|λ|

The equations, P, J and what is relevant (all that follows a random place of a sequence) are those of the RecJPQ authors' code; as there, items past
place P have no gradient. Ours: the mean over lists; equal scores go by lower item id; and the value, which there has no meaning, is 1 - NDCG@50.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrail.models.precision import at_least_float32

HEAD = 50  # places of NDCG
TRUNCATE = 3_000  # places that get a gradient
MAX_PAIRS = 1 << 21  # of a block of lists


def lambdarank_loss(
    states_TD: Tensor, vectors_ND: Tensor, targets_T: Tensor, windows_T: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """Mean 1 - NDCG@50 over lists, with LambdaRank's gradient: a list a window, at one of its targets drawn at random.

    Relevant are the targets of the window from there on (`targets_T` are in the order of the window's places). `vectors_ND` is [N + 1, D], row 0
    is padding and no choice. Every list scores and sorts the whole catalogue: for catalogues of up to some 100,000 items.
    """
    if len(targets_T) == 0:
        return at_least_float32(states_TD).sum() * 0
    chosen_W, relevant_WN = draw_lists(targets_T, windows_T, len(vectors_ND) - 1, generator=generator)
    scores_WN = at_least_float32(states_TD[chosen_W] @ vectors_ND[1:].T)
    loss: Tensor = _LambdaRank.apply(scores_WN, relevant_WN)  # type: ignore[no-untyped-call]
    return loss


def draw_lists(targets_T: Tensor, windows_T: Tensor, items: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """(chosen int64 [W]: the target drawn in each window that has any; relevant bool [W, N]: column i is item i + 1)."""
    T, device = len(targets_T), targets_T.device
    present, list_T = torch.unique(windows_T, return_inverse=True)
    drawn_T = torch.randperm(T, device=device, generator=generator)
    # In a random order of all targets, the first of each window is uniform over the window's.
    first_W = torch.full((len(present),), T, device=device).scatter_reduce_(0, list_T[drawn_T], torch.arange(T, device=device), "amin")
    chosen_W = drawn_T[first_W]
    after_T = torch.arange(T, device=device) >= chosen_W[list_T]
    relevant_WN = torch.zeros(len(present), items, dtype=torch.bool, device=device)
    relevant_WN[list_T[after_T], targets_T[after_T] - 1] = True
    return chosen_W, relevant_WN


class _LambdaRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_WN: Tensor, relevant_WN: Tensor) -> Tensor:
        N = scores_WN.shape[1]
        lists = max(1, MAX_PAIRS // (min(TRUNCATE, N) * min(HEAD, N)))
        parts = [lambdas(scores, relevant) for scores, relevant in zip(scores_WN.detach().split(lists), relevant_WN.split(lists), strict=True)]
        ctx.save_for_backward(torch.cat([part[0] for part in parts]))
        return 1 - torch.cat([part[1] for part in parts]).mean()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (lambdas_WN,) = ctx.saved_tensors
        return lambdas_WN * (gradient / len(lambdas_WN)), None


def lambdas(scores_WN: Tensor, relevant_WN: Tensor, *, head: int = HEAD, truncate: int = TRUNCATE) -> tuple[Tensor, Tensor]:
    """(λ [W, N], NDCG@head [W]). IDCG is that of the relevant items among the first `truncate` places, as in the code; 0 for a list without any."""
    order_WP = scores_WN.sort(dim=1, descending=True, stable=True).indices[:, :truncate]
    s_WP, g_WP = scores_WN.gather(1, order_WP), relevant_WN.gather(1, order_WP).to(scores_WN.dtype)
    P = order_WP.shape[1]
    J = min(head, P)
    d_P = 1 / torch.log2(torch.arange(2, P + 2, dtype=scores_WN.dtype, device=scores_WN.device))
    ideal_J1 = torch.cat([d_P.new_zeros(1), d_P[:J].cumsum(0)])
    ideal_W = ideal_J1[g_WP.sum(1).long().clamp(max=J)]
    inverse_W = torch.where(ideal_W > 0, 1 / ideal_W, 0)

    gain_WPJ = g_WP[:, :, None] - g_WP[:, None, :J]  # -1, 0 or 1: its own sign
    z_WPJ = (s_WP[:, :, None] - s_WP[:, None, :J]) * gain_WPJ
    delta_WPJ = gain_WPJ * (d_P[:, None] - d_P[:J]).abs() * inverse_W[:, None, None]
    ranged_W11 = (s_WP[:, 0] != s_WP[:, -1])[:, None, None]
    delta_WPJ = torch.where(ranged_W11, delta_WPJ / (z_WPJ.abs() + 0.01), delta_WPJ)
    lambda_WPJ = -delta_WPJ * torch.sigmoid(-z_WPJ)

    lambda_WP = lambda_WPJ.sum(2)
    lambda_WP[:, :J] = -lambda_WPJ.sum(1)
    size_W1 = lambda_WP.abs().sum(1, keepdim=True)
    lambda_WP = lambda_WP * torch.where(size_W1 > 0, torch.log2(1 + size_W1) / size_W1, 0)
    ndcg_W = (g_WP[:, :J] * d_P[:J]).sum(1) * inverse_W  # no matrix product: autocast would take it in half precision
    return torch.zeros_like(scores_WN).scatter_(1, order_WP, lambda_WP), ndcg_W
