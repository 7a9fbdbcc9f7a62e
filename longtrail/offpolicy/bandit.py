"""A bandit problem with a known answer, made from ratings: for logs without propensities.

A request's candidates are consecutive items a user really rated, a softmax logger shows one, the click is the real label. Since the labels of all
candidates are known, so is the true click-through rate of any policy on these requests. (After Beygelzimer & Langford, KDD 2009, who make one of a
classification data set.) R requests, C candidates, N rated rows.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longtrail.errors import EvaluationError
from longtrail.offpolicy.policies import softmax
from longtrail.offpolicy.reward import CrossFittedReward
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BanditRequests:
    """`rows_RC` indexes the rated rows a request's candidates are; -1 is padding. `rows_RC[:, 0]` is the earliest: the request's own time."""

    rows_RC: Ints
    lengths_R: Ints


def bandit_requests(users_N: Ints, times_N: Ints, max_candidates: int, *, max_requests: int | None = None) -> BanditRequests:
    """Each user's rows in time order, cut into runs of `max_candidates`. A run of one row leaves no choice and is left out.

    `max_requests` keeps the first requests of each user: with all of them, a log of few and uneven users is about its handful of heaviest ones,
    and an interval made of so few is not to be believed. Raises EvaluationError when no request is left.
    """
    order = np.lexsort((times_N, users_N))
    user = np.asarray(users_N)[order]
    starts = np.flatnonzero(np.diff(user, prepend=user[:1] - 1)) if len(user) else np.zeros(0, np.int64)
    place = np.arange(len(user)) - np.repeat(starts, np.diff(np.append(starts, len(user))))
    first = np.flatnonzero(place % max_candidates == 0)
    lengths = np.diff(np.append(first, len(user)))
    kept = (lengths > 1) & (True if max_requests is None else place[first] < max_requests * max_candidates)
    first, lengths = first[kept], lengths[kept]
    if not len(first):
        raise EvaluationError(f"bandit conversion: no user has 2 rated items among {len(user)} test rows; expected a longer test period")
    columns = np.arange(int(lengths.max()))
    inside = columns < lengths[:, None]
    rows = np.where(inside, order[np.minimum(first[:, None] + columns, len(user) - 1)], -1)
    return BanditRequests(rows, lengths)


@dataclass(frozen=True, kw_only=True)
class BanditLog:
    """A drawn log, the policies on it, and the truth: each policy's expected label over the same requests."""

    slates: LoggedSlates
    policies: dict[str, EvaluatedPolicy]
    truth: dict[str, float]
    times_N: Ints  # of each row of the slates


def draw_bandit(
    *,
    users_R: Ints,
    times_R: Ints,
    lengths_R: Ints,
    labels_RC: Floats,
    features_RCF: Floats,
    logger_RC: Floats,
    scores: dict[str, Floats],
    rounds: int,
    seed: int,
) -> BanditLog:
    """Let the logger answer each request `rounds` times. `logger_RC` and `scores` are scores already divided by their temperatures.

    The reward model is cross-fitted by user, so that the repeats of a request never teach the model that scores them.
    """
    rng = np.random.default_rng(seed)
    requests, rows = len(users_R), np.arange(len(users_R))
    logger = softmax(logger_RC, lengths_R)
    with np.errstate(divide="ignore"):
        log_p = np.log(logger)
    chosen = [np.argmax(log_p + rng.gumbel(size=log_p.shape), axis=1) for _ in range(rounds)]  # the Gumbel-max trick
    flat = np.stack(chosen, axis=1).ravel()
    request_N = np.repeat(rows, rounds)
    features_NF = features_RCF[request_N, flat]
    rewards_N = labels_RC[request_N, flat]
    model = CrossFittedReward.fit(features_NF, rewards_N, users_R[request_N], seed=seed)
    model_RC = model.predict(features_RCF, users_R)
    slates = LoggedSlates.build(
        requests=np.arange(requests * rounds),
        users=users_R[request_N],
        positions=np.ones(requests * rounds, np.int64),
        rewards=rewards_N,
        propensities=logger[request_N, flat],
        predicted=model_RC[request_N, flat],
    )
    policies, truth = {}, {}
    for name, values in scores.items():
        pi_RC = softmax(values, lengths_R)
        expected_R = (pi_RC * model_RC).sum(axis=1)
        policies[name] = EvaluatedPolicy.build(name, slates, pi_RC[request_N, flat], expected=expected_R[request_N])
        truth[name] = float((pi_RC * labels_RC).sum(axis=1).mean())
    return BanditLog(slates=slates, policies=policies, truth=truth, times_N=times_R[request_N])
