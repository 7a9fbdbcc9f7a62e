"""From intervals and checks to one of three words and one plain sentence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from longtrail.offpolicy.diagnostics import Check
from longtrail.offpolicy.intervals import Comparison

Outcome = Literal["win", "lose", "not enough data"]
NOT_ENOUGH: Outcome = "not enough data"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`failed` names the checks that stand in the way of a decision, if any."""

    outcome: Outcome
    sentence: str
    failed: tuple[str, ...] = ()


def decide(comparisons: Sequence[Comparison], checks: dict[str, Sequence[Check]], *, a: str, b: str, confidence: float) -> Verdict:
    """Win or lose only where every check of both policies passes and *every* interval given (first: the one that is quoted) leaves 0 out.

    `checks` is by policy name. Our choice: a decision that hangs on the method of the interval is none.
    """
    quoted = comparisons[0].difference
    failed = {f"{check.name} of {policy}": check for policy, group in checks.items() for check in group if not check.passed}
    if failed:
        first, check = next(iter(failed.items()))
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        sentence = f"This log cannot decide between {b} and {a}: the check '{first}' failed{others}: {check.value:.3g}, expected {check.threshold}."
        return Verdict(outcome=NOT_ENOUGH, sentence=sentence, failed=tuple(failed))
    if not all(np.isfinite([c.difference.low, c.difference.high]).all() for c in comparisons):
        return Verdict(outcome=NOT_ENOUGH, sentence=f"This log says nothing about {b} against {a}: what they would show hardly ever was shown.")
    low, high = min(c.difference.low for c in comparisons), max(c.difference.high for c in comparisons)
    span = f"{confidence:.0%} interval {_signed(quoted.low)} to {_signed(quoted.high)} points"
    change = f"its click-through rate is {_points(quoted.value)} than {a}'s ({span})"
    if low > 0:
        return Verdict(outcome="win", sentence=f"{b} beats {a}: {change}.")
    if high < 0:
        return Verdict(outcome="lose", sentence=f"{b} loses to {a}: {change}.")
    sentence = (
        f"Not enough data to tell {b} from {a}: the difference in click-through rate may lie anywhere from {_signed(low)} to {_signed(high)} "
        f"points ({confidence:.0%} interval), and 0 is among it."
    )
    return Verdict(outcome=NOT_ENOUGH, sentence=sentence)


def _points(difference: float) -> str:
    return f"{abs(100 * difference):.2f} points {'higher' if difference > 0 else 'lower'}"


def _signed(difference: float) -> str:
    return f"{100 * difference:+.2f}"
