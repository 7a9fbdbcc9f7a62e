"""What a ranked list or a predicted click is worth, as single numbers and as contributions of users to them.

n rows, U users, T targets, K list length, N items. Every metric of a split is written as a ratio of two sums over users
(`Contributions`), so that an interval clustered by user is one matrix product (longtrail/bootstrap.py). What cannot be computed (one
class only, no rows, a score that is NaN) is None with a reason, never NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = 15  # of the calibration error, equal widths: Guo et al., ICML 2017, section 2


@dataclass(frozen=True, kw_only=True)
class Contributions:
    """A metric as sum(numerators_U) / sum(denominators_U); users without rows contribute 0 to both.

    `users` of the U have rows; `bounds` are the least and greatest values the metric can take; `reason` says why it is undefined.
    """

    numerators_U: Floats
    denominators_U: Floats
    users: int
    bounds: tuple[float, float] = (0.0, 1.0)
    reason: str | None = None

    @property
    def value(self) -> float | None:
        if self.reason is not None:
            return None
        ratio = float(self.numerators_U.sum() / self.denominators_U.sum())
        return min(max(ratio, self.bounds[0]), self.bounds[1])  # rounding must not leave the bounds


def _sums(users_n: Ints, values_n: NDArray, size: int) -> Floats:
    return np.bincount(users_n, weights=values_n, minlength=size).astype(np.float64)


def _no_number(values_n: NDArray) -> str | None:
    """The reason, where one of these is NaN: a sort would put it somewhere, and the metric of that order look like any other."""
    wrong = int(np.isnan(values_n).sum())
    return f"{wrong} of {len(values_n)} predictions are not numbers" if wrong else None


def _mean(users_n: Ints, values_n: NDArray, size: int, *, bounds: tuple[float, float] = (0.0, 1.0)) -> Contributions:
    """Contributions to the mean of `values_n` over rows."""
    reason = "no rows" if len(values_n) == 0 else _no_number(values_n)
    present = np.bincount(users_n, minlength=size)
    return Contributions(
        numerators_U=_sums(users_n, values_n, size),
        denominators_U=present.astype(np.float64),
        users=int((present > 0).sum()),
        bounds=bounds,
        reason=reason,
    )


# ---------------------------------------------------------------- ranking: one row is one shown item


def _one_class(clicks_n: NDArray) -> str | None:
    if len(clicks_n) == 0:
        return "no rows"
    positives = int(np.count_nonzero(clicks_n))
    if positives == 0:
        return "no clicks"
    return "clicks only" if positives == len(clicks_n) else None


def _placements(groups_n: Ints, clicks_n: NDArray, scores_n: NDArray) -> tuple[Floats, Floats]:
    """For every row the rows of its group with a lower score plus half of those with an equal one (itself not counted): of the other class.

    Returns (below_n, other_n): that number, and how many rows of the other class the group has. Vectorised: one sort, no loop over groups.
    """
    n = len(scores_n)
    order = np.lexsort((scores_n, groups_n))
    groups, scores = groups_n[order], scores_n[order]
    clicks = clicks_n[order].astype(bool)
    new_group = np.ones(n, bool)
    new_group[1:] = groups[1:] != groups[:-1]
    new_tie = new_group.copy()
    new_tie[1:] |= scores[1:] != scores[:-1]
    group_starts, tie_starts = np.flatnonzero(new_group), np.flatnonzero(new_tie)
    group_of, tie_of = np.cumsum(new_group) - 1, np.cumsum(new_tie) - 1
    result_below, result_other = np.empty(n), np.empty(n)
    for own in (True, False):
        other = np.concatenate([[0], np.cumsum(clicks != own)])  # other[i]: rows of the other class among the first i
        group_ends, tie_ends = np.append(group_starts[1:], n), np.append(tie_starts[1:], n)
        group_base = other[group_starts]
        below = other[tie_starts][tie_of] - group_base[group_of]
        equal = (other[tie_ends] - other[tie_starts])[tie_of]
        total = (other[group_ends] - group_base)[group_of]
        mine = clicks == own
        result_below[order[mine]] = (below + 0.5 * equal)[mine]
        result_other[order[mine]] = total[mine]
    return result_below, result_other


def auc_contributions(users_n: Ints, clicks_n: NDArray, scores_n: NDArray, size: int) -> Contributions:
    """Area under the ROC curve over all rows, ties counted half.

    AUC is no ratio of user sums; each user contributes their first-order influence instead (the structural components of DeLong,
    DeLong & Clarke-Pearson 1988, summed by cluster as in Obuchowski 1997), so that resampled sums vary as a resampled AUC does.
    """
    reason = _one_class(clicks_n) or _no_number(scores_n)
    present = int((np.bincount(users_n, minlength=size) > 0).sum())
    if reason is not None:
        return Contributions(numerators_U=np.zeros(size), denominators_U=np.zeros(size), users=present, reason=reason)
    below_n, other_n = _placements(np.zeros(len(users_n), np.int64), clicks_n, scores_n)
    clicked = clicks_n.astype(bool)
    wins_n = np.where(clicked, below_n, other_n - below_n) / other_n  # share of the other class this row is on the right side of
    value = float(wins_n[clicked].mean())
    influence_n = (wins_n - value) / np.where(clicked, clicked.sum(), (~clicked).sum())
    return Contributions(numerators_U=value + size * _sums(users_n, influence_n, size), denominators_U=np.ones(size), users=present)


def gauc_contributions(users_n: Ints, clicks_n: NDArray, scores_n: NDArray, size: int, groups_n: Ints | None = None) -> Contributions:
    """Mean over groups of their own AUC, weighted by their rows; groups whose rows are all clicks or all not have none and do not count.

    A group is a user (the weighted AUC that DIN, Zhou et al., KDD 2018, is judged by), or what `groups_n` says: numbers from 0, each the
    group of one user only.
    """
    what = "user" if groups_n is None else "group"
    groups_n = users_n if groups_n is None else groups_n
    groups = int(groups_n.max(initial=-1)) + 1
    reason = _one_class(clicks_n) or _no_number(scores_n)
    below_n, _ = _placements(groups_n, clicks_n, scores_n)
    clicked = clicks_n.astype(bool)
    rows_G = np.bincount(groups_n, minlength=groups).astype(np.float64)
    clicks_G = _sums(groups_n, clicked, groups)
    pairs_G = clicks_G * (rows_G - clicks_G)
    both_G = pairs_G > 0
    wins_G = _sums(groups_n[clicked], below_n[clicked], groups)
    if reason is None and not both_G.any():
        reason = f"no {what} has both a click and a miss"
    user_G = np.zeros(groups, np.int64)
    user_G[groups_n] = users_n
    return Contributions(
        numerators_U=_sums(user_G, np.divide(wins_G * rows_G, pairs_G, out=np.zeros(groups), where=both_G), size),
        denominators_U=_sums(user_G, np.where(both_G, rows_G, 0.0), size),
        users=len(np.unique(user_G[both_G])),
        reason=reason,
    )


def sigmoid(logits_n: NDArray) -> Floats:
    """1 / (1 + e^-x) in float64 without overflow."""
    logits_n = np.asarray(logits_n, np.float64)
    small = np.exp(-np.abs(logits_n))
    return np.where(logits_n >= 0, 1 / (1 + small), small / (1 + small))


def row_log_losses(clicks_n: NDArray, logits_n: NDArray) -> Floats:
    """[n]: -log P(what happened), from logits: finite wherever the logit is."""
    logits_n = np.asarray(logits_n, np.float64)
    with np.errstate(invalid="ignore"):  # NaN stays NaN: whoever adds these up says so
        return np.logaddexp(0.0, logits_n) - logits_n * clicks_n


def log_loss_contributions(users_n: Ints, clicks_n: NDArray, logits_n: NDArray, size: int) -> Contributions:
    return _mean(users_n, row_log_losses(clicks_n, logits_n), size, bounds=(0.0, np.inf))


def calibration_ratio_contributions(users_n: Ints, clicks_n: NDArray, probabilities_n: NDArray, size: int) -> Contributions:
    """Sum of predictions over sum of clicks: 1 is calibrated in the large, above 1 promises too much."""
    present = np.bincount(users_n, minlength=size)
    reason = _one_class(clicks_n)
    return Contributions(
        numerators_U=_sums(users_n, probabilities_n, size),
        denominators_U=_sums(users_n, clicks_n, size),
        users=int((present > 0).sum()),
        bounds=(0.0, np.inf),
        reason=_no_number(probabilities_n) if reason in (None, "clicks only") else reason,
    )


def probability_bins(probabilities_n: NDArray) -> Ints:
    """[n] in 0..BINS-1: bin b holds ((b / BINS), (b + 1) / BINS], the first also 0, as in Guo et al."""
    edges = np.linspace(0.0, 1.0, BINS + 1)
    return np.clip(np.searchsorted(edges, probabilities_n, side="left") - 1, 0, BINS - 1)


def ece_contributions(users_n: Ints, clicks_n: NDArray, probabilities_n: NDArray, size: int) -> Contributions:
    """Expected calibration error: |mean prediction - click rate| of each of 15 bins, weighted by the bin's rows.

    Each bin's sign is kept as it is on all rows. A resampled absolute value would be biased upwards and leave the value outside its own
    interval; with the sign fixed the error is a ratio of sums.
    """
    bins_n = probability_bins(probabilities_n)
    gaps_n = np.asarray(probabilities_n, np.float64) - clicks_n
    signs_b = np.sign(np.bincount(bins_n, weights=gaps_n, minlength=BINS))
    return _mean(users_n, signs_b[bins_n] * gaps_n, size)


def calibration_contributions(users_n: Ints, clicks_n: NDArray, probabilities_n: NDArray, size: int) -> dict[float, Contributions]:
    """Click rate by mean prediction, for at most ten bins of equal numbers of rows (equal predictions stay in one bin); none where one is NaN."""
    if len(clicks_n) == 0 or _no_number(probabilities_n):
        return {}
    edges = np.unique(np.quantile(probabilities_n, np.linspace(0, 1, 11)[1:-1], method="lower"))
    bins_n = np.searchsorted(edges, probabilities_n, side="left")
    parts = [np.flatnonzero(bins_n == b) for b in np.unique(bins_n)]
    return {float(probabilities_n[rows].mean()): _mean(users_n[rows], clicks_n[rows], size) for rows in parts}


def ranking_contributions(users_n: Ints, requests_n: Ints, clicks_n: NDArray, logits_n: NDArray, size: int) -> dict[str, Contributions]:
    """All ranking metrics of rows whose users are numbered 0..size-1, and their requests from 0; a logit is that of P(click)."""
    probabilities_n = sigmoid(logits_n)
    return {
        "auc": auc_contributions(users_n, clicks_n, logits_n, size),
        "gauc": gauc_contributions(users_n, clicks_n, logits_n, size),
        "request_gauc": gauc_contributions(users_n, clicks_n, logits_n, size, requests_n),
        "log_loss": log_loss_contributions(users_n, clicks_n, logits_n, size),
        "calibration_ratio": calibration_ratio_contributions(users_n, clicks_n, probabilities_n, size),
        "ece": ece_contributions(users_n, clicks_n, probabilities_n, size),
    }


# ---------------------------------------------------------------- retrieval: one row is one target


def row_ndcg(ranks_T: Ints, k: int) -> Floats:
    """[T]: 1 / log2(1 + rank) where 1 <= rank <= k, else 0: with one relevant item the ideal gain is 1. Rank 0 is never found."""
    hit_T = (ranks_T >= 1) & (ranks_T <= k)
    return np.where(hit_T, 1 / np.log2(1.0 + np.maximum(ranks_T, 1)), 0.0)


def row_recall(ranks_T: Ints, k: int) -> Floats:
    """[T]: 1 where 1 <= rank <= k: with one target, recall is the hit rate."""
    return ((ranks_T >= 1) & (ranks_T <= k)).astype(np.float64)


def row_reciprocal(ranks_T: Ints) -> Floats:
    """[T]: 1 / rank over the whole catalogue; 0 where the target is never found (rank 0)."""
    return np.where(ranks_T >= 1, 1.0 / np.maximum(ranks_T, 1), 0.0)


def retrieval_contributions(users_T: Ints, ranks_T: Ints, ks: Sequence[int], size: int) -> dict[str, Contributions]:
    """ndcg@k and recall@k for each k, and mrr, of targets found at `ranks_T` (from 1; 0 is never)."""
    result: dict[str, Contributions] = {}
    for k in ks:
        result[f"ndcg@{k}"] = _mean(users_T, row_ndcg(ranks_T, k), size)
        result[f"recall@{k}"] = _mean(users_T, row_recall(ranks_T, k), size)
    result["mrr"] = _mean(users_T, row_reciprocal(ranks_T), size)
    return result


def hit_rate_contributions(users_T: Ints, ranks_T: Ints, largest: int, size: int) -> dict[int, Contributions]:
    """Recall@k by k = 1, 2, 5, 10, 20, 50, … up to `largest`."""
    steps = [step * 10**power for power in range(10) for step in (1, 2, 5)]
    return {k: _mean(users_T, row_recall(ranks_T, k), size) for k in steps if k <= largest}


def coverage(users_T: Ints, lists_TK: Ints, k: int, items: int) -> tuple[float | None, float | None]:
    """(share of the catalogue in at least one user's first k, its standard error); list places with id 0 are empty.

    Resampling users would lose items that only one of them was shown, so the error is the delete-one-user jackknife's, which for any
    symmetric statistic errs on the large side (Efron & Stein 1981). None where there is no list, or no second user.
    """
    if len(users_T) == 0 or items == 0:
        return None, None
    ids = lists_TK[:, :k]
    owners = np.repeat(users_T, ids.shape[1])
    ids = ids.ravel()
    owners, ids = owners[ids > 0], ids[ids > 0]
    distinct = len(np.unique(users_T))
    if len(ids) == 0:
        return 0.0, 0.0 if distinct > 1 else None
    order = np.argsort(ids, kind="stable")
    ids, owners = ids[order], owners[order]
    starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    first, last = np.minimum.reduceat(owners, starts), np.maximum.reduceat(owners, starts)
    value = len(starts) / items
    if distinct < 2:
        return value, None
    lost_U = np.bincount(np.unique(users_T, return_inverse=True)[1]) * 0.0  # share of the catalogue that goes with each user
    alone, counts = np.unique(first[first == last], return_counts=True)
    lost_U[np.searchsorted(np.unique(users_T), alone)] = counts / items
    return value, float(np.sqrt((distinct - 1) / distinct * ((lost_U - lost_U.mean()) ** 2).sum()))


# ---------------------------------------------------------------- single numbers (training's validation metric, notebooks)


def _dense(users_n: NDArray) -> tuple[Ints, int]:
    values, dense_n = np.unique(users_n, return_inverse=True)
    return dense_n.astype(np.int64), len(values)


def auc(clicks_n: NDArray, scores_n: NDArray) -> float | None:
    return auc_contributions(np.zeros(len(clicks_n), np.int64), clicks_n, scores_n, 1).value


def gauc(users_n: NDArray, clicks_n: NDArray, scores_n: NDArray) -> float | None:
    """`users_n` may be any ids."""
    dense_n, size = _dense(users_n)
    return gauc_contributions(dense_n, clicks_n, scores_n, size).value


def log_loss(clicks_n: NDArray, logits_n: NDArray) -> float | None:
    return log_loss_contributions(np.zeros(len(clicks_n), np.int64), clicks_n, logits_n, 1).value


def calibration_ratio(clicks_n: NDArray, probabilities_n: NDArray) -> float | None:
    return calibration_ratio_contributions(np.zeros(len(clicks_n), np.int64), clicks_n, probabilities_n, 1).value


def ece(clicks_n: NDArray, probabilities_n: NDArray) -> float | None:
    return ece_contributions(np.zeros(len(clicks_n), np.int64), clicks_n, probabilities_n, 1).value


def retrieval_metrics(ranks_T: Ints, ks: Sequence[int]) -> dict[str, float | None]:
    """Values of ndcg@k, recall@k and mrr."""
    return {name: c.value for name, c in retrieval_contributions(np.zeros(len(ranks_T), np.int64), ranks_T, ks, 1).items()}
