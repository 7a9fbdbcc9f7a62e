"""The traffic-light list: what must hold before anybody may read a winner from a log. Each line has a threshold and a plain sentence.

Two kinds. `amount`: the log is too short, or shows too little of what a policy would do; more log helps, and the verdict is "not enough data".
`trust`: something is wrong with the log itself; more of it does not help, and the verdict is "do not trust".
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from longtrail.offpolicy.calibration import GroupShare, group_shares
from longtrail.offpolicy.diagnostics import Diagnostics
from longtrail.offpolicy.evidence import Evidence
from longtrail.offpolicy.intervals import Comparison, influence, standard_error
from longtrail.offpolicy.sums import UserSums
from longtrail.offpolicy.timeline import drift

State = Literal["pass", "warn", "fail", "unknown"]
Kind = Literal["amount", "trust"]

# Thresholds, all our choice: (beyond which a line turns yellow, beyond which it fails). docs/ab_testing.md says why.
EFFECTIVE_USERS = (100.0, 20.0)
DIFFERENCE_USERS = (30.0, 10.0)
MEAN_WEIGHT_SLACK = 0.02  # a mean weight this near 1 is never a failure
MEAN_WEIGHT_ERRORS = (2.6, 3.3)  # standard errors from 1 (p < .01, p < .001)
SUPPORT = (0.0, 0.01)
CALIBRATION_SLACK = 0.05  # a group's share this near what it should be is never a failure
SEGMENT_SLACK = 0.05
DRIFT = (0.1, 0.5)  # true spread of the rate between spans of the log, in shares of the rate
REPEATED = (0.0, 0.01)
STRAY = (0.0, 0.02)
ESTIMATORS_SLACK = 0.02  # of the rate
DESIGN = 1.5


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line. `policy` names the side it is about ("" is the log), `meter` is where the value stands from 0 (bad) to 1 (good), for a picture."""

    name: str
    kind: Kind
    state: State
    value: float
    threshold: str
    explanation: str
    advice: str = ""
    policy: str = ""
    meter: float | None = None

    @property
    def failed(self) -> bool:
        return self.state == "fail"

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "value": float(self.value) if np.isfinite(self.value) else None}


def weight_checks(figures: Diagnostics, *, policy: str, min_effective_sample: float, max_weight_share: float) -> list[Check]:
    """What the weights of one policy must fulfil."""
    requests = (5 * min_effective_sample, min_effective_sample)
    enough = figures.effective_requests >= min_effective_sample and figures.effective_users >= EFFECTIVE_USERS[1]
    off, error = abs(figures.mean_weight - 1), figures.mean_weight_error
    limits = [max(MEAN_WEIGHT_SLACK, errors * error) for errors in MEAN_WEIGHT_ERRORS]
    return [
        Check(
            name="effective requests",
            kind="amount",
            state=_low(figures.effective_requests, *requests),
            meter=_meter(figures.effective_requests, *requests),
            value=figures.effective_requests,
            threshold=f"at least {min_effective_sample:g}",
            explanation=f"The log says as much about {policy} as this many requests answered by {policy} itself would.",
            advice="Log longer, let the logger explore more (a higher temperature), or judge a policy nearer to the logger.",
            policy=policy,
        ),
        Check(
            name="effective users",
            kind="amount",
            state=_low(figures.effective_users, *EFFECTIVE_USERS),
            meter=_meter(figures.effective_users, *EFFECTIVE_USERS),
            value=figures.effective_users,
            threshold=f"at least {EFFECTIVE_USERS[1]:g}",
            explanation="One user's clicks resemble each other, so users, not rows, are what the interval counts.",
            advice="More people are needed, not more rows of the same people.",
            policy=policy,
        ),
        Check(
            name="largest user",
            kind="amount",
            state=_high(figures.largest_user_share, max_weight_share / 2, max_weight_share),
            meter=_meter(1 / max(figures.largest_user_share, 1e-9), 2 / max_weight_share, 1 / max_weight_share),
            value=figures.largest_user_share,
            threshold=f"at most {max_weight_share:g}",
            explanation="The share of all weight that the heaviest user carries: a large one means the result is about one person.",
            advice="See whether that user is a person: crawlers and test accounts belong out of the log.",
            policy=policy,
        ),
        Check(
            name="mean weight",
            kind="trust",
            state=_high(off, limits[0], limits[1] if enough else np.inf),
            meter=_meter(1 / max(off, 1e-9), 1 / limits[0], 1 / limits[1]),
            value=figures.mean_weight,
            threshold=f"within {limits[1]:.3f} of 1",
            explanation="Weights average 1 when the logged propensities are right and the log shows all that the policy would show. "
            "Far from 1, the propensities or the candidate sets are wrong; near 1 does not prove them right.",
            advice="Compare a few logged propensities with what the logger computes for the same requests.",
            policy=policy,
        ),
        Check(
            name="support",
            kind="trust",
            state=_high(figures.support_violations, *SUPPORT),
            meter=_meter(1 - figures.support_violations, 1.0, 1 - SUPPORT[1]),
            value=figures.support_violations,
            threshold=f"at most {SUPPORT[1]:g}",
            explanation="The share of rows where the logger had no choice and the policy would have chosen otherwise: no weighting can tell what "
            "would have been clicked there.",
            advice="Take rows of deterministic fallbacks out of the log, or let the logger explore there too.",
            policy=policy,
        ),
    ]


def difference_check(comparison: Comparison) -> Check:
    """Few influential users make any interval too narrow: rare clicks, heavy weights and heavy users all show here."""
    users = comparison.effective_users if np.isfinite(comparison.effective_users) else 0.0
    return Check(
        name="users behind the difference",
        kind="amount",
        state=_low(users, *DIFFERENCE_USERS),
        meter=_meter(users, *DIFFERENCE_USERS),
        value=users,
        threshold=f"at least {DIFFERENCE_USERS[1]:g}",
        explanation="How many people the difference between A and B really rests on. When clicks are rare or weights are large, a few decide, and an "
        "interval made of so few is too narrow to be believed.",
        advice="Log longer; where clicks are rare, consider a more frequent event.",
    )


def log_checks(evidence: Evidence, sums: UserSums, *, estimator: str) -> list[Check]:
    """What the log itself must fulfil, whatever the policies. `sums` are finished ones (`columns.finish`)."""
    found = [_calibration(evidence), _segment_weights(evidence), _agreement(sums, estimator), _drift(evidence)]
    health = evidence.health
    found += [
        _share(
            "duplicated requests",
            _sum(health.repeated_rows, health.repeated_requests),
            evidence.rows,
            REPEATED,
            "Rows or whole requests that stand in the log twice count clicks twice and make intervals too narrow.",
            "See whether a client sends again after a time-out, or a log file was read twice.",
            drawn=health.drawn,
        ),
        _share(
            "clicks without impressions",
            health.stray_clicks,
            health.clicks or 0,
            STRAY,
            "Clicks on items that no row says were shown: impressions are being lost, perhaps more of one kind than of another.",
            "Join clicks to impressions by request, and look for impressions that are logged late or not at all.",
            drawn=health.drawn,
        ),
        _users(evidence),
        _propensities(evidence),
    ]
    return found


def _calibration(evidence: Evidence) -> Check:
    name, why = "propensity calibration", (
        "Candidates are grouped by how much a policy likes them; in each group the weights must add up to what the policy would show. Propensities "
        "that are wrong where it matters show here even when all weights average 1."
    )  # fmt: skip
    if evidence.health.drawn:
        return _unknown(name, why, "This program drew the log itself, with exactly these propensities.", state="pass")
    if evidence.calibration is None:
        return _unknown(name, why, "Not checked: that needs the candidates of each request, or at least their number (column candidates).")
    shares = group_shares(evidence.calibration)
    mild = group_shares(evidence.calibration, confidence=0.99)
    wrong = [s for s in shares if (s.low > 1 or s.high < 1) and abs(s.ratio - 1) > CALIBRATION_SLACK]
    doubt = [s for s in mild if s.low > 1 or s.high < 1]
    worst = max(wrong or doubt or shares, key=lambda s: abs(s.ratio - 1))
    return Check(
        name=name,
        kind="trust",
        state="fail" if wrong else "warn" if doubt else "pass",
        meter=0.15 if wrong else 0.5 if doubt else 0.9,
        value=worst.ratio,
        threshold=f"every group within {CALIBRATION_SLACK:.0%} of 1, or within chance",
        explanation=f"{why} {_furthest(worst)}",
        advice="The logger does not choose as it says. Log the probabilities that were really used for the draw, after all filters and re-ranking.",
    )


def _furthest(share: GroupShare) -> str:
    if share.policy in ("a", "b"):
        return f"The group furthest off: candidates that {share.policy.upper()} finds {share.group}."
    return "Only the number of candidates is known: weights of a policy that shows any of them alike must average 1."


def _segment_weights(evidence: Evidence) -> Check:
    """E[w | anything known before the draw] = 1, so the mean weight must be 1 in every segment of requests (not of items: those were chosen)."""
    worst, state, value, where = 0.0, "pass", 1.0, ""
    parts = [(kind, label, sums, side) for kind, s in evidence.segments.items() if kind != "category" for label, sums in s.items() for side in "ab"]
    limits = (4.5, 3.6) if len(parts) > 1 else (3.3, 2.6)
    for kind, label, sums, side in parts:
        weight_U, rows_U = sums[f"weight/{side}"], sums["rows"]
        squares = float(weight_U @ weight_U)
        if not squares > 0 or float(weight_U.sum()) ** 2 / squares < 2 * EFFECTIVE_USERS[1]:
            continue  # too few to tell
        mean, error = float(weight_U.sum() / rows_U.sum()), standard_error(weight_U, rows_U)
        z = abs(mean - 1) / error if error > 0 else 0.0
        if z > worst and abs(mean - 1) > SEGMENT_SLACK:
            worst, value, where = z, mean, f" Furthest off: {kind} {label}, {side.upper()}."
            state = "fail" if z > limits[0] else "warn" if z > limits[1] else state
    return Check(
        name="mean weight by segment",
        kind="trust",
        state=state,  # type: ignore[arg-type]
        meter=0.15 if state == "fail" else 0.5 if state == "warn" else 0.9,
        value=value,
        threshold=f"within {SEGMENT_SLACK:.0%} of 1, or within chance, in every segment",
        explanation="Weights must average 1 among new users, on every day and at every position too: a part of the log whose propensities are wrong "
        f"shows here.{where}",
        advice="Look at what is special about that part of the log: another logger, a fallback, a filter.",
    )


def _agreement(sums: UserSums, estimator: str) -> Check:
    """IPS and the quoted estimator estimate the same; a difference beyond chance means that what they assume does not hold (after Hausman 1978)."""
    name = "estimators agree"
    why = "IPS and the quoted estimator answer the same question in different ways. When they differ by more than chance, the propensities are wrong."
    if estimator == "ips" or "ips/a/n" not in sums:
        return _unknown(name, why, "Not checked: there is one estimator only.")
    worst, gap = 0.0, 0.0
    for side in ("a", "b"):
        quoted, plain = ((f"{name}/{side}/n", f"{name}/{side}/d") for name in (estimator, "ips"))
        comparison = influence(sums, quoted, plain, confidence=0.999)
        if comparison.effective_users >= DIFFERENCE_USERS[0] and comparison.error > 0 and comparison.a.value > 0:
            relative = abs(comparison.difference.value) / comparison.a.value
            z = abs(comparison.difference.value) / comparison.error
            if relative > ESTIMATORS_SLACK and z > worst:
                worst, gap = z, relative
    return Check(
        name=name,
        kind="trust",
        state=_high(worst, 3.0, 4.0),
        meter=_meter(1 / max(worst, 0.1), 1 / 3.0, 1 / 4.0),
        value=gap,
        threshold=f"within {ESTIMATORS_SLACK:.0%} of the rate, or within 4 standard errors",
        explanation=why,
        advice="Look at the mean weight and the calibration first.",
    )


def _drift(evidence: Evidence) -> Check:
    name = "drift over the log"
    why = (
        "How much the logged click rate itself changed over the log, beyond chance, as a share of the rate. An average over a world that changed "
        "is an answer about no time in particular."
    )
    found = drift(evidence.segments.get("day", {}))
    if found is None:
        return _unknown(name, why, "Not checked: the log has one span of time only.")
    real = found.p_value < 0.001
    return Check(
        name=name,
        kind="trust",
        state=_high(found.spread if real else 0.0, *DRIFT),
        meter=_meter(1 / max(found.spread if real else 0.0, 1e-3), 1 / DRIFT[0], 1 / DRIFT[1]),
        value=found.spread,
        threshold=f"at most {DRIFT[1]:.0%}, or within chance",
        explanation=why,
        advice="Look at the picture over time; judge the newest part of the log alone.",
    )


def _users(evidence: Evidence) -> Check:
    """Never fails: the intervals count users. It says what would have gone wrong without."""
    sums = evidence.sums
    clustered = standard_error(sums["naive/n"], sums["naive/d"])
    rate = float(sums["naive/n"].sum() / sums["naive/d"].sum())
    alone = float(np.sqrt(rate * (1 - rate) / evidence.rows)) if 0 <= rate <= 1 else float("nan")
    effect = (clustered / alone) ** 2 if alone > 0 and np.isfinite(clustered) else 1.0
    single = len(sums.users_U) >= evidence.requests and evidence.rows > 1
    if single:
        text = "Every request has a user of its own: nobody came twice, or the log does not know users; then the intervals are too narrow."
    else:
        text = (
            f"Rows of one user resemble each other: for a single rate the log is worth as much as one {effect:.1f} times smaller of independent "
            f"rows{_effect_on_difference(evidence)}. The intervals here count users and allow for it; a tool that counts rows would be too sure."
        )
    return Check(
        name="users (design effect)",
        kind="trust",
        state="warn" if single or effect > DESIGN else "pass",
        meter=0.5 if single or effect > DESIGN else 0.9,
        value=effect,
        threshold="never fails",
        explanation=text,
        advice="Log a user id that lasts." if single else "",
    )


def _effect_on_difference(evidence: Evidence) -> str:
    """The same for B − A, where what a user adds to both rates cancels."""
    sums = evidence.sums
    if "gap2" not in sums:
        return ""
    mean = float(sums["gap"].sum()) / evidence.rows
    alone = (float(sums["gap2"].sum()) / evidence.rows - mean**2) / evidence.rows
    return f", for B − A {standard_error(sums['gap'], sums['rows']) ** 2 / alone:.1f} times" if alone > 0 else ""


def _propensities(evidence: Evidence) -> Check:
    estimated = evidence.health.estimated
    text = "The probability with which each item was shown must be logged when it is drawn."
    return Check(
        name="logged propensities",
        kind="trust",
        state="warn" if estimated else "pass",
        meter=0.5 if estimated else 0.9,
        value=float(not estimated),
        threshold="logged, not estimated",
        explanation=f"{text} Here they were estimated afterwards: every figure on this page rests on that estimate." if estimated else text,
        advice="Log exact propensities from now on." if estimated else "",
    )


def _share(name: str, count: int | None, of: int, limits: tuple[float, float], why: str, advice: str, *, drawn: bool) -> Check:
    if drawn:
        return _unknown(name, why, "This program drew the log itself.", state="pass")
    if count is None:
        return _unknown(name, why, "Not checked: the log does not say.")
    share = count / of if of else 0.0
    return Check(
        name=name, kind="trust", state=_high(share, *limits), meter=_meter(1 - share, 1.0, 1 - limits[1]), value=share,
        threshold=f"at most {limits[1]:.0%}", explanation=why, advice=advice,
    )  # fmt: skip


def _unknown(name: str, why: str, reason: str, *, state: State = "unknown") -> Check:
    return Check(name=name, kind="trust", state=state, value=float("nan"), threshold="–", explanation=f"{why} {reason}")


def _sum(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else one + other


def _low(value: float, warn: float, fail: float) -> State:
    """Of a figure that should be large."""
    return "pass" if value >= warn else "warn" if value >= fail else "fail"


def _high(value: float, warn: float, fail: float) -> State:
    """Of a figure that should be small."""
    return "pass" if value <= warn else "warn" if value <= fail else "fail"


def _meter(value: float, warn: float, fail: float) -> float:
    """0 to 1 for a figure that should be large: below 1/3 it fails, above 2/3 it passes; logarithmic in between and beyond."""
    if not np.isfinite(value):
        return 0.5
    over = float(np.log10(max(value, 1e-9) / fail))
    place = 0.5 + over / 3 if warn <= fail else 1 / 3 + over / float(np.log10(warn / fail)) / 3
    low, high = (0.03, 0.31) if value < fail else (0.36, 0.64) if value < warn else (0.69, 0.97)
    return float(np.clip(place, low, high))


def failed(groups: Sequence[Check], kind: Kind) -> list[Check]:
    return [check for check in groups if check.failed and check.kind == kind]
