"""Numbers and words of the A/B report, for people. `None` is an undefined figure."""

from typing import Any

TONES = {"win": "good", "lose": "bad", "equivalent": "plain", "not enough data": "warn", "do not trust": "bad"}
LIGHTS = {
    "fail": ("✕", "failed", "bad"),
    "warn": ("!", "to look at", "warn"),
    "pass": ("✓", "passed", "good"),
    "unknown": ("?", "not checked", "plain"),
}
UNDEFINED = "undefined"


def percent(value: float | None) -> str:
    """A rate, at three digits: 12.3%, 0.512%."""
    if value is None:
        return UNDEFINED
    digits = 2 if abs(value) >= 0.01 else 3
    return f"{100 * value:.{digits}f}%"


def points(value: float | None) -> str:
    """A difference of rates in percentage points, with its sign and at least two digits that say something."""
    if value is None:
        return UNDEFINED
    digits = 2 if abs(value) >= 0.001 or value == 0 else 4 if abs(value) < 0.0001 else 3
    return f"{100 * value:+.{digits}f}"


def signed(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:+.1%}"


def span(estimate: dict[str, Any], show: Any = percent) -> str:
    return UNDEFINED if estimate["low"] is None else f"{show(estimate['low'])} to {show(estimate['high'])}"


def chance(value: float | None) -> str:
    """A probability; never 0 or 100 %, which no finite resampling can show."""
    if value is None:
        return UNDEFINED
    return "over 99.9%" if value > 0.999 else "under 0.1%" if value < 0.001 else f"{value:.1%}"


def count(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:,.0f}"


def figure(value: float | None) -> str:
    """What a check found."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def next_step(result: dict[str, Any]) -> str:
    """What to do now, in a few plain sentences."""
    a, b, verdict = result["a"]["name"], result["b"]["name"], result["verdict"]
    if verdict == "win" and "days" in result:
        return f"{b} may replace {a}: people who really saw it clicked more. The interval allows for every look, so the test may be stopped now."
    if verdict == "win":
        return (
            f"{b} may replace {a}. Offline tests hold people's histories as they were, so start with a share of the traffic, let the service explore "
            "a little, and confirm the result on its own log."
        )
    if verdict == "equivalent":
        return f"Choose by what else differs: cost, latency, simplicity. Clicks will not tell {b} and {a} apart by more than the margin."
    if verdict == "do not trust":
        advice = [check["advice"] for check in result["checks"] if check["state"] == "fail" and check["kind"] == "trust" and check["advice"]]
        return f"Read no winner from this page, however clear it looks. Mend the log first: {' '.join(dict.fromkeys(advice))}"
    if verdict == "lose":
        broken = result["broken_guardrails"]
        if broken and result["interval"]["low"] > 0:
            return f"Keep {a}. {b} is better on the whole, so it is worth finding out why it is worse for {' and '.join(broken)}."
        if broken:
            return f"Keep {a}. More of this log would not help {b} while it is worse for {' and '.join(broken)}: find out why."
        return f"Keep {a}. Look at the segments for where {b} is better, and whether its training metric is the one you care about."
    failed = [check["advice"] for check in result["checks"] if check["state"] == "fail" and check["advice"]]
    if failed:
        return f"Keep {a} for now, and read no winner from this page. {' '.join(dict.fromkeys(failed))}"
    return f"Keep {a} for now. {power_sentence(result)}"


def power_sentence(result: dict[str, Any]) -> str:
    """What this log can tell, and how long a log would have to be to tell more."""
    power, margin = result["power"], result["margin"]
    if power["detectable"] is None:
        return "Log with a policy that sometimes shows what both candidates would show: this log cannot even say how long it would have to be."
    relative = power["detectable_relative"]
    of_a = "" if relative is None else f" ({relative:.1%} of A's rate)"  # None: A's rate is estimated as 0
    said = f"A log like this finds a true difference of {100 * power['detectable']:.2g} points{of_a} in {power['power']:.0%} of cases."
    if power["factor_for_margin"] is not None:
        users = count(power["users_for_margin"])
        said += (
            f" To find a difference as large as the margin of {100 * margin:.2g} points, or to rule it out, it takes about {users} users like these"
        )
        said += f" ({times(power['factor_for_margin'])}this log's {result['users']:,})."
    if power["factor_for_observed"] is not None and result["verdict"] == "not enough data":
        factor = power["factor_for_observed"]
        said += (
            f" If the difference really is as large as it looks now, {times(factor)}as many users would do; that figure is itself as uncertain as "
            "the difference."
            if factor > 1
            else ""
        )
    return said


def times(factor: float) -> str:
    rounded = float(f"{factor:.2g}")
    return f"{rounded:,.0f} times " if rounded >= 10 else f"{rounded:g} times "
