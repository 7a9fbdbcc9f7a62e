"""From candidate scores to the estimators' input: what policies made of rankers would have done on logged lists.

R requests, C candidates (right-padded), K places, F features of a candidate.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from longtrail.offpolicy.policies import PlackettLuce, Policy, marginal_probabilities
from longtrail.offpolicy.pseudo_inverse import MAX_LISTS, lists_of, pseudo_inverse_weights
from longtrail.offpolicy.reward import CrossFittedReward
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.schema import Propensity

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_BLOCK = 1 << 22  # entries of an [R, K, C] array held at a time (32 MB)
DRAWS = 8  # our choice: lists drawn from a policy for what it would put at each place, whatever the log shows above
MARGINAL_DRAWS = 64  # our choice: the same where marginal propensities make these draws the weights themselves


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
    logger_RC: Floats | None = None  # the logger's scores, divided by its temperature, where it is a known Plackett-Luce policy

    @property
    def real(self) -> NDArray[np.bool_]:
        """[R, K] where an item was shown."""
        return self.shown_RK >= 0


def evaluate_policies(
    lists: LoggedLists, scores: dict[str, Floats], *, seed: int = 0, policy: Policy | None = None
) -> tuple[LoggedSlates, dict[str, EvaluatedPolicy]]:
    """Slates and policies for the estimators. `scores` maps a policy's name to its scores [R, C]; `policy` says how lists come from them
    (None: Plackett-Luce over scores that are divided by their temperature already).

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
    chosen = policy or PlackettLuce()
    return slates, {name: _policy(name, lists, values, model, slates, chosen, seed) for name, values in scores.items()}


def _policy(
    name: str, lists: LoggedLists, scores_RC: Floats, model: CrossFittedReward, slates: LoggedSlates, policy: Policy, seed: int
) -> EvaluatedPolicy:
    requests, places = lists.shown_RK.shape
    probability, expected, direct = np.ones((requests, places)), np.zeros((requests, places)), np.zeros((requests, places))
    marginal = lists.kind is Propensity.MARGINAL and slates.lists
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // max(1, places * scores_RC.shape[1]))
    for start in range(0, requests, step):
        block = slice(start, start + step)
        shown, scores, lengths = lists.shown_RK[block], scores_RC[block], lists.lengths_R[block]
        rewards_RKC = _rewards(model, lists, block)
        pi_RKC = policy.probabilities(scores, lengths, shown)
        expected[block] = (pi_RKC * rewards_RKC).sum(axis=2)
        direct[block] = expected[block]
        if places > 1:
            draws = MARGINAL_DRAWS if marginal else DRAWS
            freely_RKC = marginal_probabilities(policy, scores, lengths, places, draws=draws, rng=rng)
            direct[block] = (freely_RKC * rewards_RKC).sum(axis=2)
            pi_RKC = freely_RKC if marginal else pi_RKC
        probability[block] = np.take_along_axis(pi_RKC, np.maximum(shown, 0)[:, :, None], axis=2)[:, :, 0]
    real = lists.real
    weights = _list_weights(lists, scores_RC, policy)
    return EvaluatedPolicy.build(name, slates, probability[real], expected=expected[real], direct=direct[real], list_weights=weights)


def _list_weights(lists: LoggedLists, scores_RC: Floats, policy: Policy) -> Floats | None:
    """[N] pseudo-inverse weights, where the logger is known, all lists are as long, and candidate sets as large and small enough to go through."""
    _, places = lists.shown_RK.shape
    candidates = int(lists.lengths_R[0])
    alike = bool((lists.lengths_R == candidates).all()) and bool(lists.real.all())
    if lists.logger_RC is None or places < 2 or not alike or lists_of(candidates, places) > MAX_LISTS:
        return None
    weights_R = pseudo_inverse_weights(PlackettLuce(), lists.logger_RC[:, :candidates], policy, scores_RC[:, :candidates], lists.shown_RK)
    return np.repeat(weights_R, places)


def _rewards(model: CrossFittedReward, lists: LoggedLists, block: slice) -> Floats:
    """[R, K, C] the model's P(click) of each candidate at each place."""
    users, features = lists.users_R[block], lists.features_RCF[block]
    with_zero = np.concatenate([features, np.zeros((*features.shape[:2], 1))], axis=2)
    place = np.zeros((len(users), lists.shown_RK.shape[1], with_zero.shape[2]))
    place[:, :, -1] = np.log(np.maximum(lists.positions_RK[block], 1))
    constant = model.logits(np.zeros((len(users), 1, with_zero.shape[2])), users)  # the bias, which both terms hold
    return expit(model.logits(with_zero, users)[:, None, :] + (model.logits(place, users) - constant)[:, :, None])
