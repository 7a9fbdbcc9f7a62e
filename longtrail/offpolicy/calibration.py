"""Were the logged propensities the ones that really chose? A test that the mean of the weights cannot give.

For any policy π and any group G of candidates, the ratio π(shown) / p(shown), counted where the shown item lies in G, has the expectation
Σ_{c in G} π(c): the propensities p are right only if that holds for *every* group. The mean weight is the sum over all groups, and errors of
opposite sign cancel in it: a logger 0.6 times as sharp as logged still averages 1.005, but shows what it likes too rarely and the rest too often.
So candidates are grouped by how much π likes them, and each group's share is compared with what it should be. (A moment condition; the grouping
is ours.) Only the shown item's logged propensity is needed, and the candidates' probabilities under π.

R requests, K places, C candidates, J = len(GROUPS) groups of candidates by π(c) · (candidates left).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from longtrail.offpolicy.intervals import standard_error
from longtrail.offpolicy.policies import conditional_probabilities
from longtrail.offpolicy.slates import LoggedSlates
from longtrail.offpolicy.sums import UserSums

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

BOUNDS = (0.25, 0.5, 1.0, 2.0)
GROUPS = ("least liked", "less liked", "below average", "above average", "most liked")
UNIFORM = "chance/any"  # policy and group of `uniform_sums`
MIN_SHARE = 0.01  # our choice: a group that should hold less of what π shows is not judged
_BLOCK = 1 << 22  # entries of an [R, K, C] array held at a time (32 MB)


@dataclass(frozen=True, kw_only=True)
class GroupShare:
    """How much of π's weight fell on a group of candidates, and how much should have; `ratio` is 1 where propensities are right."""

    policy: str
    group: str
    expected: float
    observed: float
    ratio: float
    low: float
    high: float
    z: float

    def json(self) -> dict[str, Any]:
        return asdict(self)


def calibration_sums(*, users_R: Ints, lengths_R: Ints, shown_RK: Ints, propensities_RK: Floats, scores: Mapping[str, Floats]) -> UserSums:
    """By user, the columns "{policy}/{group}/n" (observed) and "/d" (expected) of each policy of `scores` ([R, C], temperature applied).

    `shown_RK` are columns of the candidates, -1 after a list's end; propensities are conditional on the places above. Sums of blocks merge.
    """
    columns: dict[str, Floats] = {}
    for name, scores_RC in scores.items():
        observed, expected = _by_group(lengths_R, shown_RK, propensities_RK, scores_RC)
        for j, group in enumerate(GROUPS):
            columns[f"{name}/{group}/n"], columns[f"{name}/{group}/d"] = observed[:, j], expected[:, j]
    return UserSums.build(users_R, columns)


def uniform_sums(slates: LoggedSlates, candidates_N: NDArray[Any]) -> UserSums:
    """The same for a policy that shows any of the C candidates alike, for logs that hold no more than their number: Σ 1 / (C p) at the top of
    each list must be the number of lists. A logger that is flatter than it says makes it larger. `candidates_N` is in the order of the rows.
    """
    top = slates.places_N == 0
    weights = 1.0 / (np.asarray(candidates_N, np.float64)[top] * slates.propensities_N[top])
    return UserSums.build(slates.users_N[top], {f"{UNIFORM}/n": weights, f"{UNIFORM}/d": np.ones(len(weights))})


def group_shares(sums: UserSums, *, confidence: float = 0.999) -> list[GroupShare]:
    """Each group with an interval of its ratio, simultaneous over all groups (Bonferroni): one that leaves 1 out is a finding."""
    names = sorted({column.rsplit("/", 1)[0] for column in sums.columns}, key=lambda name: sums.columns.index(f"{name}/n"))
    total: dict[str, float] = {}
    for name in names:
        policy = name.split("/")[0]
        total[policy] = total.get(policy, 0.0) + float(sums[f"{name}/d"].sum())
    found = []
    quantile = float(norm.ppf(1 - (1 - confidence) / (2 * len(names))))
    for name in names:
        policy, group = name.split("/")
        observed, expected = sums[f"{name}/n"], sums[f"{name}/d"]
        if float(expected.sum()) < MIN_SHARE * total[policy]:
            continue
        ratio, error = float(observed.sum() / expected.sum()), standard_error(observed, expected)
        found.append(
            GroupShare(
                policy=policy,
                group=group,
                expected=float(expected.sum()) / total[policy],
                observed=float(observed.sum()) / total[policy],
                ratio=ratio,
                low=ratio - quantile * error,
                high=ratio + quantile * error,
                z=(ratio - 1) / error if error > 0 else 0.0,
            )
        )
    return found


def _by_group(lengths_R: Ints, shown_RK: Ints, propensities_RK: Floats, scores_RC: Floats) -> tuple[Floats, Floats]:
    """[R, J] observed and expected weight of each group, summed over places."""
    requests, places = shown_RK.shape
    observed, expected = np.zeros((requests, len(GROUPS))), np.zeros((requests, len(GROUPS)))
    step = max(1, _BLOCK // max(1, places * scores_RC.shape[1]))
    for start in range(0, requests, step):
        block = slice(start, start + step)
        shown = shown_RK[block]
        pi_RKC = conditional_probabilities(scores_RC[block], lengths_R[block], shown)
        left_RK = lengths_R[block, None] - np.arange(places)
        group_RKC = np.searchsorted(np.array(BOUNDS), pi_RKC * left_RK[:, :, None], side="right")
        real = shown >= 0
        column = np.maximum(shown, 0)[:, :, None]
        ratio = np.where(real, np.take_along_axis(pi_RKC, column, axis=2)[:, :, 0] / propensities_RK[block], 0.0)
        of_shown = np.take_along_axis(group_RKC, column, axis=2)[:, :, 0]
        for j in range(len(GROUPS)):
            observed[block, j] = np.where(of_shown == j, ratio, 0.0).sum(axis=1)
            expected[block, j] = np.where(group_RKC == j, pi_RKC, 0.0).sum(axis=(1, 2))
    return observed, expected
