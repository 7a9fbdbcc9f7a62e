"""Every estimator's columns of a log, and what their sums by user come to: the way from rows to estimates, block by block.

columns = user_columns(slates, a, b)                  # [N] each; "{estimator}/{a|b}/{column}"
sums = UserSums.build(slates.users_N, columns)        # merge over blocks
finished = finish(sums)                               # "{estimator}/{a|b}/n" and "…/d": the estimate is Σ n / Σ d
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from longtrail.offpolicy.estimators import ESTIMATORS, ROWS, DirectMethod, Estimator, Naive, SelfNormalisedDR
from longtrail.offpolicy.list_estimators import Independent, ItemPosition, PseudoInverse, Replay, RewardInteraction, SlateIPS
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.offpolicy.sums import UserSums
from longtrail.offpolicy.tuned import ClippedIPS, ShrinkageDR, SwitchDR

Floats = NDArray[np.float64]

_MORE: tuple[Estimator, ...] = (
    ClippedIPS(), DirectMethod(), SelfNormalisedDR(), SwitchDR(), ShrinkageDR(), Replay(), SlateIPS(), RewardInteraction(), ItemPosition(),
    Independent(), PseudoInverse(),
)  # fmt: skip
NAIVE = Naive()
EVERY: dict[str, Estimator] = {**ESTIMATORS, **{estimator.name: estimator for estimator in _MORE}}
"""Every estimator of a policy by name (the naive one knows no policy)."""
PLAIN = ("ips", "snips", "dm", "dr")  # their columns are their numerators "n" and denominators "d" before `finish` already


@dataclass(frozen=True)
class Finished:
    """`sums` holds "naive/n", "naive/d" and, of every estimator that the log allows, "{name}/{side}/n" and "{name}/{side}/d"."""

    sums: UserSums
    tuned: dict[str, dict[str, float]] = field(default_factory=dict)  # estimator → side → the parameter that was chosen from the data
    refused: dict[str, str] = field(default_factory=dict)  # estimator → why the log as a whole cannot be judged with it (see also `refusals`)

    @property
    def estimators(self) -> list[str]:
        names = (column.split("/")[0] for column in self.sums.columns if column.count("/") == 2)
        return list(dict.fromkeys(names))

    def value(self, estimator: str, side: str) -> float:
        """Σ n / Σ d; NaN where the denominator is 0."""
        top, bottom = (float(self.sums[f"{estimator}/{side}/{part}"].sum()) for part in "nd")
        return top / bottom if bottom > 0 else float("nan")


def refusals(slates: LoggedSlates, *policies: EvaluatedPolicy) -> dict[str, str]:
    """Estimator → why this log cannot be judged with it, by the first policy that it fails for. The same for every block of a log."""
    found = {}
    for name, estimator in EVERY.items():
        why = next((why for policy in policies if (why := estimator.refuses(slates, policy)) is not None), None)
        if why is not None:
            found[name] = why
    return found


def user_columns(slates: LoggedSlates, a: EvaluatedPolicy, b: EvaluatedPolicy, *, estimators: Iterable[str] | None = None) -> dict[str, Floats]:
    """[N] columns of A and B under every estimator (or those named) that this log allows; their sums by user go to `finish`.

    Of those named none is left out silently: an estimator that refuses the log is absent from the result, and `refusals` says why.
    """
    refused = refusals(slates, a, b)
    columns: dict[str, Floats] = {"naive/n": slates.rewards_N, "naive/d": np.ones(slates.rows)}
    for name in EVERY if estimators is None else estimators:
        if name in refused:
            continue
        for side, policy in (("a", a), ("b", b)):
            columns |= {f"{name}/{side}/{column}": values for column, values in EVERY[name].columns(slates, policy).items()}
            if name in PLAIN:
                columns.setdefault(f"{name}/{side}/d", columns["naive/d"])
    return columns


def finish(sums: UserSums) -> Finished:
    """From raw sums to one numerator and one denominator an estimator and side; parameters are chosen, sums of ratios are linearised.

    Columns that are no estimator's are left out.
    """
    raw: dict[tuple[str, str], dict[str, Floats]] = {}
    for column in sums.columns:
        name, _, rest = column.partition("/")
        if name in EVERY:
            side, part = rest.split("/")
            raw.setdefault((name, side), {})[part] = sums[column]
    done: dict[str, Floats] = {name: sums[name] for name in ("naive/n", "naive/d")}
    tuned: dict[str, dict[str, float]] = {}
    refused: dict[str, str] = {}
    for (name, side), parts in raw.items():
        terms = EVERY[name].finish({ROWS: sums["naive/d"], **parts})
        if terms.why is not None:
            refused[name] = terms.why
            continue
        done[f"{name}/{side}/n"], done[f"{name}/{side}/d"] = terms.numerators_N, terms.denominators_N
        if terms.parameter is not None:
            tuned.setdefault(name, {})[side] = terms.parameter
    return Finished(UserSums(sums.users_U, tuple(done), np.stack(list(done.values()), axis=1), sums.groups), tuned, refused)


def judge(slates: LoggedSlates, policies: Mapping[str, EvaluatedPolicy]) -> dict[str, dict[str, float]]:
    """Estimator → policy → estimate, of a log in memory: for notebooks and tests."""
    sides = list(policies.values())
    found: dict[str, dict[str, float]] = {}
    for name, policy in policies.items():
        columns = user_columns(slates, policy, sides[0])
        mine = finish(UserSums.build(slates.users_N, {key: values for key, values in columns.items() if "/b/" not in key}))
        for estimator in mine.estimators:
            found.setdefault(estimator, {})[name] = mine.value(estimator, "a")
    return found
