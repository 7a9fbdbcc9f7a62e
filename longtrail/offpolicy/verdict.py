"""From intervals and checks to one of five words and one plain sentence.

    win               B's rate is higher: every interval of the difference lies above 0
    lose              B's rate is lower, or a guardrail is broken
    equivalent        whatever difference there is, it is smaller than the margin that matters
    not enough data   the log cannot tell: more of it would
    do not trust      the log is at fault: more of it would not help

Only "win" is a reason to replace A. Whoever compares the word with "win" alone is always on the safe side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from longtrail.offpolicy.checks import Check
from longtrail.offpolicy.intervals import Interval
from longtrail.offpolicy.power import Power
from longtrail.offpolicy.segments import SegmentResult

Outcome = Literal["win", "lose", "equivalent", "not enough data", "do not trust"]
OUTCOMES: tuple[Outcome, ...] = ("win", "lose", "equivalent", "not enough data", "do not trust")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`failed`: the checks that stand in the way of a decision; `broken`: the guardrails that are; `unjudged`: those the log says nothing of."""

    outcome: Outcome
    sentence: str
    failed: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    unjudged: tuple[str, ...] = ()


def decide(
    intervals: Sequence[Interval],
    checks: Sequence[Check],
    *,
    a: str,
    b: str,
    confidence: float,
    margin: float = 0.0,
    guardrails: Sequence[SegmentResult] = (),
    absent: Sequence[str] = (),
    power: Power | None = None,
) -> Verdict:
    """Checks first, then intervals. `intervals` are of the difference B − A by several methods (first: the one that is quoted), `margin` is absolute.

    Win, lose and equivalent need *every* interval to agree: a decision that hangs on the method of the interval is none (our choice).
    Equivalent is both limits within the margin, the two one-sided tests at (1 − confidence) / 2 each (Schuirmann 1987). A guardrail is a segment in
    which B may not be worse: where it surely is, A is kept, whatever the difference on the whole (our choice). One with too little data, or `absent`
    from the log, stops no win, but the sentence says so.
    """
    names = {"a": a, "b": b, "": ""}
    for kind, outcome, start in (
        ("trust", "do not trust", "Do not trust this log about"),
        ("amount", "not enough data", "Not enough data to compare"),
    ):
        failed = [check for check in checks if check.failed and check.kind == kind]
        if failed:
            first = failed[0]
            others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            about = _named(first, names)
            sentence = f"{start} {b} and {a}: the check '{about}' failed{others}: {first.value:.3g}, expected {first.threshold}."
            return Verdict(outcome=outcome, sentence=sentence, failed=tuple(_named(check, names) for check in failed))  # type: ignore[arg-type]
    if not all(np.isfinite([interval.low, interval.high]).all() for interval in intervals):
        return Verdict(outcome="not enough data", sentence=f"Not enough data: what {b} and {a} would show was hardly ever shown in this log.")
    quoted = intervals[0]
    outer = envelope(intervals)
    low, high = outer.low, outer.high
    span = f"{100 * confidence:.4g}% interval {_signed(low)} to {_signed(high)} points"
    broken = tuple(f"{g.kind} {g.label}" for g in guardrails if g.finding == "worse")
    unjudged = (*(f"{g.kind} {g.label}" for g in guardrails if g.finding == "too little data"), *absent)
    if broken and high >= 0:
        whole = f"better on the whole ({span}) but" if low > 0 else f"not surely better on the whole ({span}) and"
        sentence = f"Keep {a}: {b} is {whole} worse for {' and '.join(broken)}, which was set as a guardrail."
        return Verdict(outcome="lose", sentence=sentence, broken=broken, unjudged=unjudged)
    if low > 0:
        small = " That is less than the margin that was said to matter." if high < margin else ""
        blind = f" Nothing can be said of the guardrail {' and '.join(unjudged)}: too few people." if unjudged else ""
        sentence = f"{b} beats {a}: its click-through rate is {_points(quoted.value)} than {a}'s ({span}).{small}{blind}"
        return Verdict(outcome="win", sentence=sentence, unjudged=unjudged)
    if high < 0:
        sentence = f"{b} loses to {a}: its click-through rate is {_points(quoted.value)} than {a}'s ({span})."
        return Verdict(outcome="lose", sentence=sentence, broken=broken, unjudged=unjudged)
    if low == high == 0:
        return Verdict(outcome="equivalent", sentence=f"{b} and {a} would do the same in every request of this log: there is nothing to decide.")
    if -margin < low and high < margin:
        sentence = f"{b} and {a} are equivalent: they differ by less than {100 * margin:.2g} points, the margin that was said to matter ({span})."
        return Verdict(outcome="equivalent", sentence=sentence, unjudged=unjudged)
    more = _more(power, margin)
    unclear = f"the difference in click-through rate may be anything from {_signed(low)} to {_signed(high)} points"
    sentence = f"Not enough data to tell {b} from {a}: {unclear} ({100 * confidence:.4g}% interval).{more}"
    return Verdict(outcome="not enough data", sentence=sentence, unjudged=unjudged)


def envelope(intervals: Sequence[Interval]) -> Interval:
    """The first one's value with the lowest and highest limit of all; NaN where any is undefined."""
    lows, highs = [interval.low for interval in intervals], [interval.high for interval in intervals]
    return Interval(value=intervals[0].value, low=float(np.min(lows)), high=float(np.max(highs)))


def _more(power: Power | None, margin: float) -> str:
    if power is None or power.factor_for_margin is None:
        return ""
    return f" {times(power.factor_for_margin)} as many users would find a difference of {100 * margin:.2g} points, or rule it out."


def times(factor: float) -> str:
    """About so many times, at two digits."""
    rounded = float(f"{max(factor, 1.0):.2g}")
    return f"About {rounded:,.0f} times" if rounded >= 10 else f"About {rounded:g} times"


def _named(check: Check, names: dict[str, str]) -> str:
    policy = names.get(check.policy, check.policy)
    return f"{check.name} of {policy}" if policy else check.name


def _points(difference: float) -> str:
    return f"{_signed(abs(difference))[1:]} points {'higher' if difference > 0 else 'lower'}"


def _signed(difference: float) -> str:
    digits = 2 if abs(difference) >= 0.001 or difference == 0 else 3 if abs(difference) >= 0.0001 else 4
    return f"{100 * difference:+.{digits}f}"
