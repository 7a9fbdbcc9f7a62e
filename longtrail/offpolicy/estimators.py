"""Off-policy estimators of the click-through rate (clicks per impression) of a policy that did not make the log.

N logged rows; v_n the ratio π / p of the row, w_n = w_{1:k} the product of ratios down the list to row n, r_n its reward, q̂_n the reward model's
value of the logged item, K the list's length. Each estimator turns the log into a few columns whose sums by user are all that the estimate and its
intervals need, and ends as Σ numerators / Σ denominators: a denominator that was estimated is resampled with its numerator.
For one-item requests w = v, w_{1:k−1} = 1, and each is the textbook's estimator. What each is good for: docs/estimators.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from longtrail.errors import EvaluationError
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.schema import Propensity

Floats = NDArray[np.float64]
Columns = Mapping[str, Floats]

DIRECT = "no direct rewards; expected the reward model's value of the policy for every row (in lists with the items above drawn from the policy)"
ROWS = "rows"  # the column of ones, kept once for all estimators that divide by the number of rows


@dataclass(frozen=True)
class Terms:
    """[N] each (or [U], summed by user); the estimate is their sums' ratio. `parameter` is what was chosen from the data, if anything was;
    `why` says why there is no estimate, where only the whole log could tell.
    """

    numerators_N: Floats
    denominators_N: Floats
    parameter: float | None = None
    why: str | None = None

    @classmethod
    def refused(cls, why: str) -> "Terms":
        return cls(np.zeros(0), np.zeros(0), why=why)

    @property
    def value(self) -> float:
        """NaN where the denominator is 0: the log holds nothing the policy would have shown."""
        total = float(self.denominators_N.sum())
        return float(self.numerators_N.sum()) / total if total > 0 else float("nan")


class Estimator:
    """What all share: Σ n / Σ d, d the rows where there is no such column. `title` and `assumes` are for people; a `contrast` never decides."""

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    assumes: ClassVar[str] = ""
    contrast: ClassVar[bool] = False

    def refuses(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> str | None:
        """Why this log cannot be judged with this estimator; None where it can. The same for every block of a log."""
        return needs_conditional(slates)

    def columns(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> dict[str, Floats]:
        """[N] columns to be summed by user; `rows` (ones) need not be among them. Of a log that is not refused."""
        raise NotImplementedError

    def finish(self, sums_U: Columns) -> Terms:
        """From the columns and `rows` summed by user to [U] numerators and denominators."""
        return Terms(sums_U["n"], sums_U.get("d", sums_U[ROWS]))

    def terms(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> Terms:
        """[N] numerators and denominators of a whole log. Raises EvaluationError where the log is refused."""
        self.check(slates, policy)
        terms = self.finish({ROWS: np.ones(slates.rows), **self.columns(slates, policy)})
        if terms.why is not None:
            raise EvaluationError(f"{self.title}: policy {policy.name}: {terms.why}")
        return terms

    def check(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> None:
        """Raises EvaluationError where the log is refused."""
        why = self.refuses(slates, policy)
        if why is not None:
            raise EvaluationError(f"{self.title}: policy {policy.name}: {why}")


def needs_conditional(slates: LoggedSlates) -> str | None:
    """Why a product of ratios cannot be taken: it needs P(item | the items above it), or places that are chosen independently."""
    if slates.kind is Propensity.MARGINAL and slates.lists and not slates.independent_places:
        return (
            "the propensities are marginal and requests show several items; the product of ratios down a list needs conditional ones, "
            "P(item | the items above it), or places that were chosen independently of one another (declare it)"
        )
    return None


def needs_model(slates: LoggedSlates, policy: EvaluatedPolicy) -> str | None:
    """Why doubly robust estimators cannot be computed."""
    if slates.predicted_N is None or policy.expected_N is None:
        return "no reward model; expected predicted and expected rewards for every row"
    return needs_conditional(slates)


class Naive(Estimator):
    """Σ r / N: the logging policy's own rate, whatever the policy under test. For contrast only."""

    name, title = "naive", "naive"
    assumes = "The policy shows what the logger showed: it hardly ever does."
    contrast = True

    def refuses(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> str | None:
        return None

    def columns(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> dict[str, Floats]:
        return {"n": slates.rewards_N}


class IPS(Estimator):
    """Σ w r / N. Inverse propensity scoring (Horvitz & Thompson, JASA 1952; for lists: Precup et al., ICML 2000).

    In lists this is the cascade estimator: only what stands above an item may have a part in its click. Right too where clicks depend on the item
    and its position alone. Unbiased when the propensities are right and the logger could show whatever the policy would; high variance.
    """

    name, title = "ips", "inverse propensity"
    assumes = "Propensities are right, the logger could show all that the policy would, and clicks depend on no item further down."

    def columns(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> dict[str, Floats]:
        return {"n": policy.weights_N * slates.rewards_N}


class SNIPS(Estimator):
    """Σ w r / Σ w. Self-normalised IPS (Swaminathan & Joachims, NIPS 2015): a weighted mean, so it stays within the rewards' range.

    Biased in O(1/N); far less variance than IPS where rewards are not rare. The same normaliser for all positions (our choice; the estimator with one
    a position is `reward_interaction`).
    """

    name, title = "snips", "self-normalised"
    assumes = "As inverse propensity; a small bias that vanishes with more rows."

    def columns(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> dict[str, Floats]:
        return {"n": policy.weights_N * slates.rewards_N, "d": policy.weights_N}


class DirectMethod(Estimator):
    """Σ q̂_π / N: what the reward model says the policy would get; no propensity is used.

    q̂_π is E_π[q̂] at the row's place, items above it drawn from the policy too (`EvaluatedPolicy.direct_N`). As good as the model and no better: the
    interval says how the model's values vary over users, not how wrong they are.
    """

    name, title = "dm", "direct method"
    assumes = "The reward model is right, for items the logger seldom showed too."
    contrast = True

    def refuses(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> str | None:
        if policy.direct_N is None:
            return DIRECT
        return None

    def columns(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> dict[str, Floats]:
        assert policy.direct_N is not None
        return {"n": policy.direct_N}


class DoublyRobust(Estimator):
    """Σ [w_{1:k} (r − q̂) + w_{1:k−1} E_π[q̂ | items above]] / N (Dudík et al., ICML 2011; lists: Jiang & Li, ICML 2016; Kiyohara et al., WSDM 2022).

    Unbiased when the propensities are right, whatever the reward model; the better the model, the less is left to weight.
    The model must not have been fitted on the rows it scores (`reward.py` cross-fits by user).
    """

    name, title = "dr", "doubly robust"
    assumes = "As inverse propensity; the reward model may be wrong."

    def refuses(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> str | None:
        return needs_model(slates, policy)

    def columns(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> dict[str, Floats]:
        assert slates.predicted_N is not None and policy.expected_N is not None
        residual = policy.weights_N * (slates.rewards_N - slates.predicted_N)
        return {"n": residual + policy.above_N * policy.expected_N}


class SelfNormalisedDR(Estimator):
    """Σ w_{1:k} (r − q̂) / Σ w_{1:k} + Σ w_{1:k−1} E_π[q̂ | items above] / Σ w_{1:k−1} (Thomas & Brunskill, ICML 2016: weighted doubly robust).

    A sum of two ratios. `finish` gives it as one, linearised at the log's totals: the value and the influence of each user are exact.
    """

    name, title = "sndr", "self-normalised doubly robust"
    assumes = "As doubly robust; a small bias that vanishes with more rows."

    def refuses(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> str | None:
        return needs_model(slates, policy)

    def columns(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> dict[str, Floats]:
        assert slates.predicted_N is not None and policy.expected_N is not None
        residual = policy.weights_N * (slates.rewards_N - slates.predicted_N)
        return {"residual": residual, "weight": policy.weights_N, "model": policy.above_N * policy.expected_N, "above": policy.above_N}

    def finish(self, sums_U: Columns) -> Terms:
        return linearised([(sums_U["residual"], sums_U["weight"]), (sums_U["model"], sums_U["above"])], sums_U[ROWS])


def linearised(ratios: list[tuple[Floats, Floats]], rows_U: Floats, shares: list[Floats] | None = None) -> Terms:
    """θ = Σ_j s_j Σn_j / Σd_j as one ratio over Σ rows: numerators θ rows_u + Σ_j of the user's influence on ratio j.

    All [U]. `shares` are columns whose share of all rows is s_j; None: s_j = 1. (First-order expansion of a function of sums, Cochran, Sampling
    Techniques, 1977, ch. 6.) A resampled linearisation is the normal approximation of the resampled estimate.
    """
    rows = float(rows_U.sum())
    theta, influence_U = 0.0, np.zeros_like(rows_U)
    for index, (n_U, d_U) in enumerate(ratios):
        d = float(d_U.sum())
        if not d > 0:
            return Terms(np.zeros_like(rows_U), np.zeros_like(rows_U))
        share, ratio = (1.0, float(n_U.sum()) / d) if shares is None else (float(shares[index].sum()) / rows, float(n_U.sum()) / d)
        theta += share * ratio
        influence_U = influence_U + share * (n_U - ratio * d_U) * (rows / d)
        if shares is not None:
            influence_U = influence_U + ratio * (shares[index] - share * rows_U)
    return Terms(theta * rows_U + influence_U, rows_U)


ESTIMATORS: dict[str, Estimator] = {estimator.name: estimator for estimator in (IPS(), SNIPS(), DoublyRobust())}
