"""A real online A/B test, read from the service's log: arms by user, fewer users needed by what was known before, and looked at every day.

Two arms are two groups of people, so nothing is weighted: an arm's rate is its clicks over its impressions. What stays from the offline test:
users are the unit, rates are ratios, looking daily needs any-time intervals, and a log that contradicts itself decides nothing.

U users, N rows, K covariates.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2
from scipy.stats import t as student

from longtrail.errors import EvaluationError
from longtrail.offpolicy.anytime import time_uniform
from longtrail.offpolicy.checks import Check, difference_check
from longtrail.offpolicy.intervals import Comparison, Interval, effective_sample, freedom

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DAY = 86_400_000_000  # µs
MISMATCH = (0.01, 0.001)  # our choice: p-values of the sample ratio below which the line turns yellow, and fails
FALLBACKS = 0.01  # our choice: p-value of the difference of the arms' fallbacks below which the line turns yellow
CROSSED = (0.001, 0.01)  # our choice: share of users who saw both arms


@dataclass(frozen=True, kw_only=True)
class ArmUsers:
    """Who was in the test and what they did. `treated_U` says who got B; covariates are from before the test, so that the arms cannot have
    touched them.
    """

    treated_U: NDArray[np.bool_]
    clicks_U: Floats
    impressions_U: Floats
    before_UK: Floats  # K may be 0


@dataclass(frozen=True, kw_only=True)
class LiveComparison:
    """B against A, plain and with what was known before; `saved` is the share of the difference's variance that this took away."""

    plain: Comparison
    adjusted: Comparison
    any_time: Interval  # of the adjusted difference
    saved: float


def compare_arms(users: ArmUsers, *, confidence: float) -> LiveComparison:
    """Rates of two arms as ratios by user (delta method: Deng, Knoblich & Lu, KDD 2018), and the same with CUPED.

    CUPED (Deng, Xu, Kohavi & Walker, WSDM 2013) takes from each user's deviation what their past explains: the arms' rates move by
    −β (mean of the covariates in the arm − over all). β is one for both arms, by least squares on the ratio's influence function (for ratios: ours).
    Unbiased whatever β, since who is in which arm has nothing to do with the past. Raises EvaluationError where an arm has fewer than 2 users.
    """
    for name, inside in (("A", ~users.treated_U), ("B", users.treated_U)):
        if inside.sum() < 2 or not users.impressions_U[inside].sum() > 0:
            raise EvaluationError(f"live test: arm {name} has {int(inside.sum())} user(s) with impressions; expected at least 2")
    rate = {side: _rate(users, side) for side in (False, True)}
    psi_U = np.where(
        users.treated_U,
        (users.clicks_U - rate[True] * users.impressions_U) / users.impressions_U[users.treated_U].mean(),
        (users.clicks_U - rate[False] * users.impressions_U) / users.impressions_U[~users.treated_U].mean(),
    )
    plain = _compare(rate, psi_U, users.treated_U, confidence)
    adjusted, left_U, moved = plain, psi_U, rate
    if users.before_UK.shape[1]:
        overall = users.before_UK.mean(axis=0)
        means = {side: users.before_UK[users.treated_U == side].mean(axis=0) for side in (False, True)}
        inside_UK = users.before_UK - np.where(users.treated_U[:, None], means[True], means[False])
        beta_K = np.linalg.lstsq(inside_UK, psi_U, rcond=None)[0]
        left_U = psi_U - inside_UK @ beta_K
        moved = {side: rate[side] - float(beta_K @ (means[side] - overall)) for side in (False, True)}
        adjusted = _compare(moved, left_U, users.treated_U, confidence)
    saved = 1 - (adjusted.error / plain.error) ** 2 if plain.error > 0 else 0.0
    any_time = time_uniform(adjusted, rows=float(users.impressions_U.sum()), confidence=confidence)
    return LiveComparison(plain=plain, adjusted=adjusted, any_time=any_time, saved=saved)


def sample_ratio(counts: tuple[int, int], shares: tuple[float, float] = (0.5, 0.5)) -> float:
    """The p-value of the users of A and B, were they split as planned (χ², 1 degree; Fabijan et al., KDD 2019, on why it matters)."""
    planned = np.array(shares, np.float64) / sum(shares) * sum(counts)
    return float(chi2.sf((((np.array(counts) - planned) ** 2) / planned).sum(), 1))


def arm_checks(counts: tuple[int, int], crossed: int, comparison: Comparison, *, shares: tuple[float, float] = (0.5, 0.5)) -> list[Check]:
    """What must hold before a live test may be read. `crossed`: users who saw both arms."""
    p_value, share = sample_ratio(counts, shares), crossed / max(sum(counts), 1)
    return [
        difference_check(comparison),
        Check(
            name="sample ratio",
            kind="trust",
            state="fail" if p_value < MISMATCH[1] else "warn" if p_value < MISMATCH[0] else "pass",
            value=p_value,
            threshold=f"p at least {MISMATCH[1]:g}",
            explanation=f"{counts[0]:,} users were in A and {counts[1]:,} in B, planned {shares[0]:g} to {shares[1]:g}. A split that is off beyond "
            "chance means that one arm loses users: whoever is missing is not like the rest, and no figure below can be read.",
            advice="Find where users get lost: redirects, crashes, bots, late logging. Do not correct the counts; run the test again.",
            meter=0.15 if p_value < MISMATCH[1] else 0.5 if p_value < MISMATCH[0] else 0.9,
        ),
        Check(
            name="users in one arm",
            kind="trust",
            state="fail" if share > CROSSED[1] else "warn" if share > CROSSED[0] else "pass",
            value=share,
            threshold=f"at most {CROSSED[1]:.0%} in both",
            explanation="Users who saw both arms; they are counted in the one that they saw first. Many of them blur the difference.",
            advice="Assign by a hash of the user's id, not of the session or the request.",
            meter=0.15 if share > CROSSED[1] else 0.5 if share > CROSSED[0] else 0.9,
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class LiveLog:
    """Rows of the two arms, and the rows before the test for the covariates. Times are UTC µs."""

    users_N: Ints
    times_N: Ints
    treated_N: NDArray[np.bool_]
    clicks_N: Floats
    before_users_M: Ints
    before_clicks_M: Floats
    fallback_N: NDArray[np.bool_] | None = None  # rows of lists that the arm did not choose, for it failed; None: the log does not say

    def until(self, time: int) -> tuple[ArmUsers, int]:
        """The users of rows before `time`, each in the arm of their first row, and how many saw both."""
        inside = self.times_N < time
        order = np.argsort(self.times_N[inside], kind="stable")
        treated_N, clicks_N = self.treated_N[inside][order], self.clicks_N[inside][order]
        names, first, user_N = np.unique(self.users_N[inside][order], return_index=True, return_inverse=True)
        impressions = np.bincount(user_N, minlength=len(names)).astype(np.float64)
        treated_rows = np.bincount(user_N, weights=treated_N.astype(np.float64), minlength=len(names))
        crossed = int(((treated_rows > 0) & (treated_rows < impressions)).sum())
        clicks = np.bincount(user_N, weights=clicks_N, minlength=len(names))
        return ArmUsers(
            treated_U=treated_N[first], clicks_U=np.asarray(clicks, np.float64), impressions_U=impressions, before_UK=self._before(names)
        ), crossed

    def _before(self, names: Ints) -> Floats:
        """[U, 3] clicks and impressions before the test, and whether there were any; [U, 0] where nobody has a past."""
        if not len(self.before_users_M):
            return np.zeros((len(names), 0))
        place = np.minimum(np.searchsorted(names, self.before_users_M), len(names) - 1)
        known = names[place] == self.before_users_M
        shown = np.bincount(place[known], minlength=len(names)).astype(np.float64)
        clicked = np.bincount(place[known], weights=self.before_clicks_M[known], minlength=len(names))
        return np.stack([clicked, shown, (shown > 0).astype(np.float64)], axis=1)


@dataclass(frozen=True, kw_only=True)
class Fallbacks:
    """Which share of what each arm's users saw its arm did not choose, compared by user; and each arm's rate where it did (A, B; NaN: never)."""

    shares: Comparison
    own_rates: tuple[float, float]


def compare_fallbacks(log: LiveLog, *, confidence: float) -> Fallbacks | None:
    """None where the log does not say. Raises EvaluationError as `compare_arms` does.

    A fallback belongs to the arm of its user (intention to treat): who leaves it out compares the arms on the requests that each could serve, which
    are not alike. So rates of own lists are for information only.
    """
    if log.fallback_N is None:
        return None
    failed = replace(log, clicks_N=log.fallback_N.astype(np.float64), before_users_M=log.before_users_M[:0], before_clicks_M=log.before_clicks_M[:0])
    users, _ = failed.until(int(log.times_N.max()) + 1)
    own = [log.clicks_N[~log.fallback_N & (log.treated_N == side)] for side in (False, True)]
    rates = [float(clicks.mean()) if len(clicks) else float("nan") for clicks in own]
    return Fallbacks(shares=compare_arms(users, confidence=confidence).plain, own_rates=(rates[0], rates[1]))


def fallback_check(found: Fallbacks | None) -> Check:
    """Whether one arm failed more often than the other. It never forbids the verdict: to fail is a part of what an arm does."""
    why = "Lists that an arm could not make, so that its users saw a fallback, count for the arm: failing is a part of what it does."
    if found is None:
        unsaid = "This log does not say which lists were fallbacks; if they are not in it, an arm that fails often looks better than it is."
        return Check(name="fallbacks", kind="trust", state="unknown", value=float("nan"), threshold="", explanation=f"{why} {unsaid}")
    a, b, gap = (interval.value for interval in (found.shares.a, found.shares.b, found.shares.difference))
    differs = bool(found.shares.p_value < FALLBACKS) if found.shares.error > 0 else gap != 0
    read = " The arms differ beyond chance: find out why before the better rate is believed to be the better model's." if differs else ""
    return Check(
        name="fallbacks",
        kind="trust",
        state="warn" if differs else "pass",
        value=gap,
        threshold="no difference beyond chance",
        explanation=f"{why} They were {a:.2%} of what A's users saw and {b:.2%} of what B's did.{read}",
        meter=0.5 if differs else 0.9,
    )


def monitor(log: LiveLog, *, confidence: float) -> list[dict[str, Any]]:
    """One entry a day: the difference over all rows so far, with the interval that holds on all days together."""
    found = []
    days = np.unique(log.times_N // DAY)
    for day in days:
        users, _ = log.until(int(day + 1) * DAY)
        entry: dict[str, Any] = {"until": str(np.datetime64(int(day) * DAY, "us").astype("datetime64[D]")), "rows": int(users.impressions_U.sum())}
        if min(users.treated_U.sum(), (~users.treated_U).sum()) < 2:
            entry |= {"a": None, "b": None, "running": {"value": None, "low": None, "high": None}}
        else:
            result = compare_arms(users, confidence=confidence)
            entry |= {"a": result.adjusted.a.value, "b": result.adjusted.b.value, "running": result.any_time.json()}
        found.append(entry)
    return found


def _rate(users: ArmUsers, treated: bool) -> float:
    inside = users.treated_U == treated
    return float(users.clicks_U[inside].sum() / users.impressions_U[inside].sum())


def _compare(rate: dict[bool, float], psi_U: Floats, treated_U: NDArray[np.bool_], confidence: float) -> Comparison:
    """Rates and their difference; ψ of either arm has mean 0 there, and the arms are independent."""
    count = {side: int((treated_U == side).sum()) for side in (False, True)}
    scaled_U = np.where(treated_U, psi_U / count[True], -psi_U / count[False])  # their sum's variance is the difference's
    intervals, errors = {}, {}
    ratio = rate[True] / rate[False] if rate[False] > 0 else float("nan")
    relative_U = np.where(treated_U, scaled_U, scaled_U * ratio) / rate[False] if rate[False] > 0 else np.full(len(psi_U), np.nan)
    for name, value, part in (
        ("a", rate[False], scaled_U[~treated_U]),
        ("b", rate[True], scaled_U[treated_U]),
        ("difference", rate[True] - rate[False], scaled_U),
        ("relative", ratio - 1, relative_U),
    ):
        errors[name] = float(np.sqrt(float(part @ part) * len(part) / max(len(part) - 1, 1)))
        half = float(student.ppf(0.5 + confidence / 2, freedom(part))) * errors[name]
        intervals[name] = Interval(value=value, low=value - half, high=value + half)
    error, gap = errors["difference"], intervals["difference"].value
    p_value = float(2 * student.sf(abs(gap) / error, freedom(scaled_U))) if error > 0 else float("nan")
    return Comparison(
        a=intervals["a"],
        b=intervals["b"],
        difference=intervals["difference"],
        relative=intervals["relative"],
        better=float(student.cdf(gap / error, freedom(scaled_U))) if error > 0 else float("nan"),
        p_value=p_value,
        error=error,
        effective_users=effective_sample(scaled_U**2) if error > 0 else 0.0,
    )
