"""From candidate scores to the estimators' input: what two Plackett-Luce policies would have done on logged lists.

R requests, C candidates (right-padded), K places, F features of a candidate.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from longtrail.offpolicy.policies import conditional_probabilities
from longtrail.offpolicy.reward import CrossFittedReward
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.schema import Propensity

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_BLOCK = 1 << 22  # entries of an [R, K, C] array held at a time (32 MB)


@dataclass(frozen=True, kw_only=True)
class LoggedLists:
    """Lists that were shown and the candidates they came from. `shown_RK` are columns of the candidate arrays, -1 after a list's end."""

    users_R: Ints
    lengths_R: Ints  # candidates of each request
    shown_RK: Ints
    positions_RK: Ints  # 1.. ; for one-item requests any position, as context
    rewards_RK: Floats
    propensities_RK: Floats
    features_RCF: Floats  # of each candidate, for the reward model
    kind: Propensity = Propensity.CONDITIONAL

    @property
    def real(self) -> NDArray[np.bool_]:
        """[R, K] where an item was shown."""
        return self.shown_RK >= 0


def evaluate_policies(lists: LoggedLists, scores: dict[str, Floats], *, seed: int = 0) -> tuple[LoggedSlates, dict[str, EvaluatedPolicy]]:
    """Slates and policies for the estimators. `scores` maps a policy's name to its scores [R, C], already divided by its temperature.

    The reward model sees a candidate's features and the logarithm of its position.
    """
    real = lists.real
    requests, _ = np.nonzero(real)
    positions = lists.positions_RK[real]
    slates = LoggedSlates.build(
        requests=requests,
        users=lists.users_R[requests],
        positions=positions,
        rewards=lists.rewards_RK[real],
        propensities=lists.propensities_RK[real],
        kind=lists.kind,
    )
    features = np.concatenate([lists.features_RCF[requests, lists.shown_RK[real]], np.log(positions)[:, None]], axis=1)
    model = CrossFittedReward.fit(features, lists.rewards_RK[real], lists.users_R[requests], seed=seed)
    slates = slates.with_predictions(model.predict(features, lists.users_R[requests]))
    return slates, {name: _policy(name, lists, values, model, slates) for name, values in scores.items()}


def _policy(name: str, lists: LoggedLists, scores_RC: Floats, model: CrossFittedReward, slates: LoggedSlates) -> EvaluatedPolicy:
    requests, places = lists.shown_RK.shape
    probability, expected = np.ones((requests, places)), np.zeros((requests, places))
    step = max(1, _BLOCK // max(1, places * scores_RC.shape[1]))
    for start in range(0, requests, step):
        block = slice(start, start + step)
        shown = lists.shown_RK[block]
        pi_RKC = conditional_probabilities(scores_RC[block], lists.lengths_R[block], shown)
        probability[block] = np.take_along_axis(pi_RKC, np.maximum(shown, 0)[:, :, None], axis=2)[:, :, 0]
        expected[block] = (pi_RKC * _rewards(model, lists, block)).sum(axis=2)
    real = lists.real
    return EvaluatedPolicy.build(name, slates, probability[real], expected=expected[real])


def _rewards(model: CrossFittedReward, lists: LoggedLists, block: slice) -> Floats:
    """[R, K, C] the model's P(click) of each candidate at each place."""
    users, features = lists.users_R[block], lists.features_RCF[block]
    with_zero = np.concatenate([features, np.zeros((*features.shape[:2], 1))], axis=2)
    place = np.zeros((len(users), lists.shown_RK.shape[1], with_zero.shape[2]))
    place[:, :, -1] = np.log(np.maximum(lists.positions_RK[block], 1))
    constant = model.logits(np.zeros((len(users), 1, with_zero.shape[2])), users)  # the bias, which both terms hold
    return expit(model.logits(with_zero, users)[:, None, :] + (model.logits(place, users) - constant)[:, :, None])
