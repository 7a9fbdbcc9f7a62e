"""What a canary may not break, judged by intervals that hold at every look: errors, slow requests, clicks.

Requests are 0 or 1 (failed, slow) in the order they came; clicks are counted by user. The canary's arm is B, everybody else A. Statistics are those
of `longtrail.offpolicy`: the betting interval for the two rates (exact, whatever the number of requests), the any-time interval of the live test for
clicks.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtrail.config import CanarySettings
from longtrail.errors import EvaluationError
from longtrail.offpolicy.anytime import betting
from longtrail.offpolicy.online import ArmUsers, compare_arms

P99 = 0.01  # the share of requests that may be slower than the p99
PLANNED = 1_000  # requests the bets are tuned for; our choice
FEWEST = 20  # requests before the first look: `betting` wants as many
FEWEST_USERS = 100  # users of either arm, and
FEWEST_CLICKS = 20.0  # clicks that the canary's users would have made in A, before clicks are looked at: below, nothing is near normal; our choice
GUARDRAILS = ("errors", "p99", "clicks")

Floats = NDArray[np.float64]


@dataclass
class Outcomes:
    """Of one arm in one period: a byte a request, and [impressions, clicks] by user."""

    failed: bytearray = field(default_factory=bytearray)
    slow: bytearray = field(default_factory=bytearray)
    users: dict[int, list[int]] = field(default_factory=dict)

    def request(self, *, failed: bool, slow: bool) -> None:
        self.failed.append(failed)
        self.slow.append(slow)

    def shown(self, user: int, impressions: int) -> None:
        self.users.setdefault(user, [0, 0])[0] += impressions

    def clicked(self, user: int) -> None:
        if user in self.users:
            self.users[user][1] += 1

    @property
    def requests(self) -> int:
        return len(self.failed)


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A guardrail that does not hold, and the figures that say so."""

    guardrail: str
    sentence: str


def judge(a: Outcomes, b: Outcomes, settings: CanarySettings, *, error: float) -> Broken | None:
    """The first guardrail that the canary breaks for certain. `error`: the chance, over all looks at a period, of accusing one that breaks none."""
    each = error / len(GUARDRAILS)
    return (
        _rate("errors", a.failed, b.failed, settings.max_error_rate, each, "requests failed")
        or _rate("p99", a.slow, b.slow, P99, each, f"requests took over {settings.max_p99_ms:g} ms")
        or _clicks(a, b, settings.max_ctr_loss, each)
    )


def _rate(guardrail: str, a: bytearray, b: bytearray, limit: float, error: float, what: str) -> Broken | None:
    """Broken where B's rate is over the limit and over A's: what everybody suffers is not the canary's doing."""
    if len(b) < FEWEST or not sum(b) > limit * len(b):
        return None
    low = _interval(b, error / 2)[0]
    if not low > limit:
        return None
    if len(a) >= FEWEST and not low > (high := _interval(a, error / 2)[1]):
        return None
    others = f", of the others' at most {high:.2%}" if len(a) >= FEWEST else ""
    return Broken(
        guardrail=guardrail,
        sentence=f"{sum(b)} of the canary's {len(b):,} {what}: at least {low:.2%} for certain{others}; allowed are {limit:.2%}",
    )


def _interval(outcomes: bytearray, error: float) -> tuple[float, float]:
    """Pilot and plan are fixed, so that a look at more requests continues the bets of the look before."""
    numerators = np.frombuffer(bytes(outcomes), np.uint8).astype(np.float64)
    interval = betting(numerators, np.ones(len(numerators)), confidence=1 - error, plan=PLANNED, pilot=0.0).interval
    return interval.low, interval.high


def _clicks(a: Outcomes, b: Outcomes, loss: float, error: float) -> Broken | None:
    """Broken where B's click rate is below A's, less what may be lost, for certain."""
    if min(len(a.users), len(b.users)) < FEWEST_USERS:
        return None
    of_a, of_b = (np.array(list(side.users.values()), np.float64) for side in (a, b))
    rate = of_a[:, 1].sum() / of_a[:, 0].sum()
    if rate * of_b[:, 0].sum() < FEWEST_CLICKS:
        return None
    both = np.concatenate([of_a, of_b])
    users = ArmUsers(treated_U=np.arange(len(both)) >= len(of_a), clicks_U=both[:, 1], impressions_U=both[:, 0], before_UK=np.zeros((len(both), 0)))
    try:
        interval = compare_arms(users, confidence=1 - error).any_time
    except EvaluationError:
        return None
    if not interval.high < -loss * rate:  # false for NaN: nothing is certain
        return None
    return Broken(
        guardrail="clicks",
        sentence=f"click rate {of_b[:, 1].sum() / of_b[:, 0].sum():.3%}, the others' {rate:.3%}: the difference is at most {interval.high:+.3%} "
        f"for certain; allowed is a loss of {loss:.1%} of the others' rate",
    )


def pack(outcomes: Outcomes) -> dict[str, Any]:
    """Arrays for numpy.savez."""
    users = [[user, *counts] for user, counts in outcomes.users.items()]
    return {
        "failed": np.frombuffer(bytes(outcomes.failed), np.uint8),
        "slow": np.frombuffer(bytes(outcomes.slow), np.uint8),
        "users": np.array(users, np.int64).reshape(-1, 3),
    }


def unpack(arrays: dict[str, Any]) -> Outcomes:
    return Outcomes(
        failed=bytearray(arrays["failed"].tobytes()),
        slow=bytearray(arrays["slow"].tobytes()),
        users={int(user): [int(shown), int(clicked)] for user, shown, clicked in arrays["users"]},
    )
