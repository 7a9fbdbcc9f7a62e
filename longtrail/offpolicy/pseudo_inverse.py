"""Weights of the pseudo-inverse estimator, by going through every list that a small candidate set allows.

R requests, C candidates, K places, L = C · (C − 1) ··· (C − K + 1) lists, J = K · C pairs of (place, item).
"""

from itertools import permutations
from math import perm

import numpy as np
from numpy.typing import NDArray

from longtrail.errors import EvaluationError
from longtrail.offpolicy.policies import Policy

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MAX_LISTS = 2_000  # our choice: beyond it Γ would have to be estimated, and with it the weights
_BLOCK = 1 << 22  # entries held at a time


def lists_of(candidates: int, places: int) -> int:
    """How many ordered lists of `places` items there are."""
    return perm(candidates, places)


def pseudo_inverse_weights(logger: Policy, logger_RC: Floats, target: Policy, target_RC: Floats, shown_RK: Ints) -> Floats:
    """[R] W = q_πᵀ Γ⁺ 1_list (Swaminathan et al., NIPS 2017): Γ = E_logger[1 1ᵀ], q_π = E_π[1], 1 the [J] indicator of a list.

    Every request has all C candidates and K shown. Raises EvaluationError where there are more than MAX_LISTS lists.
    """
    (requests, places), candidates = shown_RK.shape, logger_RC.shape[1]
    count = lists_of(candidates, places)
    if count > MAX_LISTS:
        raise EvaluationError(f"pseudo-inverse: {count} lists of {places} of {candidates} items; expected at most {MAX_LISTS} to go through")
    lists_LK = np.array(list(permutations(range(candidates), places)))
    one_LJ = np.zeros((count, places * candidates))
    for place in range(places):
        one_LJ[np.arange(count), place * candidates + lists_LK[:, place]] = 1.0
    weights = np.empty(requests)
    step = max(1, _BLOCK // (count * places * candidates))
    for start in range(0, requests, step):
        block = slice(start, min(start + step, requests))
        p_RL, pi_RL = (_chances(policy, scores[block], lists_LK) for policy, scores in ((logger, logger_RC), (target, target_RC)))
        gamma_RJJ = np.einsum("rl,li,lj->rij", p_RL, one_LJ, one_LJ, optimize=True)
        shown_RJ = np.zeros((block.stop - block.start, places * candidates))
        np.put_along_axis(shown_RJ, np.arange(places) * candidates + shown_RK[block], 1.0, axis=1)
        solved_RJ = np.einsum("rij,rj->ri", np.linalg.pinv(gamma_RJJ, hermitian=True), shown_RJ)
        weights[block] = ((pi_RL @ one_LJ) * solved_RJ).sum(axis=1)
    return weights


def _chances(policy: Policy, scores_RC: Floats, lists_LK: Ints) -> Floats:
    """[R, L] the probability of each list."""
    requests, count = len(scores_RC), len(lists_LK)
    scores = np.repeat(scores_RC, count, axis=0)
    shown = np.tile(lists_LK, (requests, 1))
    pi = policy.probabilities(scores, np.full(len(scores), scores_RC.shape[1]), shown)
    return np.take_along_axis(pi, shown[:, :, None], axis=2)[:, :, 0].prod(axis=1).reshape(requests, count)
