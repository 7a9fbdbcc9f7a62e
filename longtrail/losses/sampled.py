"""Losses that look at the target and at K sampled items. T targets (real places only, of any user), D width, N items, K negatives.

They take the item slot and ask it for the vectors they need, never for the whole catalogue. Negatives are uniform over 1..N, drawn from
`generator` or torch's global one. Ours, where K > 1: `shared_by` consecutive targets share their negatives (1 is the papers' way), so that
scoring is a matrix product instead of a gather of T · K vectors; each target still has K uniform negatives, so the expected loss is the same.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from longtrail.models.contracts import ItemEmbedding
from longtrail.models.precision import at_least_float32

SHARED_BY = 64  # consecutive targets that share their sampled negatives


def bce_loss(states_TD: Tensor, items: ItemEmbedding, targets_T: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Mean binary cross-entropy with one negative a target (Kang & McAuley, ICDM 2018: SASRec's own), not shared.

    The mean is over the two logits of a target, as in the code of RecJPQ; that code does not reject a negative that is the target, nor do we.
    """
    return gbce_loss(states_TD, items, targets_T, negatives=1, t=0.0, shared_by=1, generator=generator)


def gbce_loss(
    states_TD: Tensor,
    items: ItemEmbedding,
    targets_T: Tensor,
    *,
    negatives: int,
    t: float,
    prior: bool = False,
    shared_by: int = SHARED_BY,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean generalised binary cross-entropy (Petrov & Macdonald, RecSys 2023: gSASRec) with `negatives` sampled items a target.

    A negative may be the target, as in the authors' code. With `prior` (ours) every logit has log(β / K) added to it, the log odds of a positive
    among what is sampled: where all scores are 0 a target is then pulled up as strongly as its K negatives are pushed down, as in a softmax.
    Without it the model first learns, for many epochs, that nearly everything is a negative. One number for all items: no ranking changes.
    """
    if len(targets_T) == 0:
        return at_least_float32(states_TD).sum() * 0
    positive_T, negative_TK, _ = sampled_logits(states_TD, items, targets_T, negatives=negatives, shared_by=shared_by, generator=generator)
    offset = math.log(gbce_weight(negatives, items.items, t) / negatives) if prior else 0.0
    return gbce(at_least_float32(positive_T) + offset, at_least_float32(negative_TK) + offset, items=items.items, t=t).mean()


def sampled_softmax_loss(
    states_TD: Tensor,
    items: ItemEmbedding,
    targets_T: Tensor,
    *,
    negatives: int,
    shared_by: int = SHARED_BY,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean of -log softmax at the target among the target and `negatives` sampled items. Ours; no paper here uses it.

    There is no logQ correction, because with uniform sampling it adds the same number to every logit and changes nothing. A negative that is the
    target is left out.
    """
    if len(targets_T) == 0:
        return at_least_float32(states_TD).sum() * 0
    positive_T, negative_TK, drawn_TK = sampled_logits(states_TD, items, targets_T, negatives=negatives, shared_by=shared_by, generator=generator)
    negative_TK = at_least_float32(negative_TK).masked_fill(drawn_TK == targets_T.unsqueeze(1), -math.inf)
    positive_T = at_least_float32(positive_T)
    return (torch.cat([positive_T.unsqueeze(1), negative_TK], dim=1).logsumexp(1) - positive_T).mean()


def sampled_logits(
    states_TD: Tensor, items: ItemEmbedding, targets_T: Tensor, *, negatives: int, shared_by: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the targets [T] and of their negatives [T, K], and the negatives' ids [T, K] (a view, the same for targets that share them)."""
    (T, D), groups = states_TD.shape, -(-len(states_TD) // shared_by)
    drawn_GK = torch.randint(1, items.items + 1, (groups, negatives), device=states_TD.device, generator=generator)
    vectors_GKD = items.embed(drawn_GK)
    if shared_by == 1:
        negative_TK = (states_TD.unsqueeze(1) * vectors_GKD).sum(-1)
    else:
        states_GSD = functional.pad(states_TD, (0, 0, 0, groups * shared_by - T)).view(groups, shared_by, D)
        negative_TK = torch.bmm(states_GSD, vectors_GKD.to(states_TD.dtype).transpose(1, 2)).view(-1, negatives)[:T]
    positive_T = (states_TD * items.embed(targets_T)).sum(-1)
    return positive_T, negative_TK, drawn_GK.unsqueeze(1).expand(-1, shared_by, -1).reshape(-1, negatives)[:T]


def gbce(positive_T: Tensor, negative_TK: Tensor, *, items: int, t: float) -> Tensor:
    """[T]: -(β log σ(s⁺) + Σ_k log(1 - σ(s⁻_k))) / (K + 1), with α = K / (N - 1) (at most 1) and β = α (t (1 - 1/α) + 1/α).

    t = 0 is plain binary cross-entropy (β = 1), t = 1 calibrates sampled scores fully (β = α). Both logarithms are softplus of logits, which is exact
    in float32 at any score; no probability is ever formed.
    """
    K, beta = negative_TK.shape[1], gbce_weight(negative_TK.shape[1], items, t)
    positive_T, negative_TK = at_least_float32(positive_T), at_least_float32(negative_TK)
    return (beta * functional.softplus(-positive_T) + functional.softplus(negative_TK).sum(-1)) / (K + 1)


def gbce_weight(negatives: int, items: int, t: float) -> float:
    """β, the weight of a positive in gBCE."""
    alpha = min(1.0, negatives / max(1, items - 1))
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)
