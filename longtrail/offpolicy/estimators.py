"""Off-policy estimators of the click-through rate (clicks per impression) of a policy that did not make the log.

N logged rows; w_n the product of ratios down the list to row n, r_n its reward, q̂_n the reward model's value of the logged item.
Each estimator turns the log into two columns, and its estimate is Σ numerators / Σ denominators: so sums over users are all that intervals need,
and a denominator that was estimated is resampled with its numerator. For one-item requests each is the textbook's estimator.
The product of ratios is right whether or not clicks depend on the items above; it pays for that with variance in long lists.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from longtrail.errors import EvaluationError
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Terms:
    """[N] each; the estimate is their sums' ratio."""

    numerators_N: Floats
    denominators_N: Floats

    @property
    def value(self) -> float:
        """NaN where the denominator is 0: the log holds nothing the policy would have shown."""
        total = float(self.denominators_N.sum())
        return float(self.numerators_N.sum()) / total if total > 0 else float("nan")


class Estimator(Protocol):
    name: str

    def terms(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> Terms: ...


class Naive:
    """Σ r / N: the logging policy's own rate, whatever the policy under test. For contrast only."""

    name = "naive"

    def terms(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> Terms:
        return Terms(slates.rewards_N, np.ones(slates.rows))


class IPS:
    """Σ w r / N. Inverse propensity scoring (Horvitz & Thompson, JASA 1952; for lists: Precup et al., ICML 2000; RIPS, McInerney et al., KDD 2020).

    Unbiased when the propensities are right and the logger could show whatever the policy would; high variance.
    """

    name = "ips"

    def terms(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> Terms:
        return Terms(policy.weights_N * slates.rewards_N, np.ones(slates.rows))


class SNIPS:
    """Σ w r / Σ w. Self-normalised IPS (Swaminathan & Joachims, NIPS 2015): a weighted mean, so it stays within the rewards' range.

    Biased in O(1/N); far less variance than IPS where rewards are not rare. The same normaliser for all positions (our choice).
    """

    name = "snips"

    def terms(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> Terms:
        return Terms(policy.weights_N * slates.rewards_N, policy.weights_N)


class DoublyRobust:
    """Σ [w_{1:k} (r − q̂) + w_{1:k−1} E_π[q̂ | items above]] / N (Dudík et al., ICML 2011; lists: Jiang & Li, ICML 2016; Kiyohara et al., WSDM 2022).

    Unbiased when the propensities are right, whatever the reward model; the better the model, the less is left to weight.
    The model must not have been fitted on the rows it scores (`reward.py` cross-fits by user).
    """

    name = "dr"

    def terms(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> Terms:
        if slates.predicted_N is None or policy.expected_N is None:
            raise EvaluationError(f"doubly robust: policy {policy.name} has no reward model; expected predicted and expected rewards for every row")
        residual = policy.weights_N * (slates.rewards_N - slates.predicted_N)
        return Terms(residual + policy.above_N * policy.expected_N, np.ones(slates.rows))


ESTIMATORS: dict[str, Estimator] = {estimator.name: estimator for estimator in (IPS(), SNIPS(), DoublyRobust())}
