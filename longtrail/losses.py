"""What models minimise. B requests, C candidates, T targets (real places only, of any user), D width, N items, K negatives.

Losses are means over real things: padding has no say in them, and an empty batch costs 0. They are taken in float32 or float64, never lower.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from longtrail.models.masks import padding_mask

MAX_LOGITS = 1 << 25  # of the full softmax held at once: 128 MB in float32
SHARED_BY = 64  # consecutive targets that share their sampled negatives


def ranking_loss(logits_BC: Tensor, clicks_BC: Tensor, lengths_B: Tensor) -> Tensor:
    """Mean binary cross-entropy over the real candidates; what stands in padded places, NaN even, changes neither loss nor gradient."""
    real_BC = padding_mask(lengths_B, logits_BC.shape[1])
    logits_BC = _precise(logits_BC).masked_fill(~real_BC, 0)
    losses_BC = functional.binary_cross_entropy_with_logits(logits_BC, clicks_BC.to(logits_BC.dtype), reduction="none")
    return losses_BC.masked_fill(~real_BC, 0).sum() / real_BC.sum().clamp(min=1)


def softmax_loss(states_TD: Tensor, items_ND: Tensor, targets_T: Tensor) -> Tensor:
    """Mean of -log softmax(⟨state, item_1..N⟩)[target] over the whole catalogue; `items_ND` is [N + 1, D], row 0 is padding and no choice.

    Select the real places first (`states_BLD[targets_BL > 0]`). Beyond MAX_LOGITS logits the targets go in blocks whose logits are computed
    again in the backward pass, so memory does not grow with T · N.
    """
    if len(targets_T) == 0:
        return _precise(states_TD).sum() * 0
    items = items_ND[1:]
    block = max(1, MAX_LOGITS // len(items))
    if len(targets_T) <= block:
        return _cross_entropy(states_TD, items, targets_T) / len(targets_T)
    blocks = zip(states_TD.split(block), targets_T.split(block), strict=True)
    parts = [checkpoint(_cross_entropy, states, items, targets, use_reentrant=False, preserve_rng_state=False) for states, targets in blocks]
    return torch.stack(parts).sum() / len(targets_T)


def gbce_loss(
    states_TD: Tensor,
    items_ND: Tensor,
    targets_T: Tensor,
    *,
    negatives: int,
    t: float,
    shared_by: int = SHARED_BY,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean generalised binary cross-entropy (Petrov & Macdonald, RecSys 2023: gSASRec) with `negatives` sampled items a target.

    Negatives are uniform over 1..N and may hit the target, as in the authors' code. Ours: `shared_by` consecutive targets share them (1 is the
    paper), so that scoring is a matrix product instead of a gather of T · K vectors; each target still has K uniform negatives, so the expected
    loss is the same. Drawn from `generator`, or from torch's global one.
    """
    if len(targets_T) == 0:
        return _precise(states_TD).sum() * 0
    (T, D), N = states_TD.shape, len(items_ND) - 1
    groups = -(-T // shared_by)
    drawn_GK = torch.randint(1, N + 1, (groups, negatives), device=states_TD.device, generator=generator)
    states_GSD = functional.pad(states_TD, (0, 0, 0, groups * shared_by - T)).view(groups, shared_by, D)
    vectors_GKD = functional.embedding(drawn_GK, items_ND)
    negative_TK = torch.bmm(states_GSD, vectors_GKD.transpose(1, 2)).view(-1, negatives)[:T]
    positive_T = (states_TD * functional.embedding(targets_T, items_ND)).sum(-1)
    return gbce(positive_T, negative_TK, items=N, t=t).mean()


def gbce(positive_T: Tensor, negative_TK: Tensor, *, items: int, t: float) -> Tensor:
    """[T]: -(β log σ(s⁺) + Σ_k log(1 - σ(s⁻_k))) / (K + 1), with α = K / (N - 1) (at most 1) and β = α (t (1 - 1/α) + 1/α).

    t = 0 is plain binary cross-entropy (β = 1), t = 1 calibrates sampled scores fully (β = α). Both logarithms are softplus of logits, which is exact
    in float32 at any score; no probability is ever formed.
    """
    K = negative_TK.shape[1]
    alpha = min(1.0, K / max(1, items - 1))
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    positive_T, negative_TK = _precise(positive_T), _precise(negative_TK)
    return (beta * functional.softplus(-positive_T) + functional.softplus(negative_TK).sum(-1)) / (K + 1)


def _cross_entropy(states_TD: Tensor, items_ND: Tensor, targets_T: Tensor) -> Tensor:
    return functional.cross_entropy(_precise(states_TD @ items_ND.T), targets_T - 1, reduction="sum")


def _precise(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
