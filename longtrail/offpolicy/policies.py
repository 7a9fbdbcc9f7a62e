"""Policies over a candidate set: softmax for one item, Plackett-Luce for a list, with exact propensities.

R requests, C candidates (right-padded; `lengths_R` says how many), K places of a list.
A list under Plackett-Luce (Plackett 1975) is drawn place by place: P(c at k | items above) = exp(s_c) / Σ over candidates not yet placed of exp(s).
"Scores" are already divided by the temperature. Only the *conditional* probability has a closed form; the marginal one is a sum over orderings.

A `Policy` makes any ranker's scores one: Plackett-Luce, epsilon-greedy, or deterministic.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from longtrail.errors import EvaluationError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def standardise(scores_RC: Floats, lengths_R: Ints) -> Floats:
    """Scores of each request less their mean, over their standard deviation (0 where all are equal): temperatures mean the same for any model.

    [R, C]; padding gets 0. Raises EvaluationError naming a request whose scores are not finite.
    """
    real = _mask(scores_RC, lengths_R)
    bad = (~np.isfinite(scores_RC) & real).any(axis=1)
    if bad.any():
        raise EvaluationError(f"scores: request {int(np.argmax(bad))} (from 0) has a score that is not finite")
    scores = np.where(real, scores_RC, 0.0).astype(np.float64)
    count = np.maximum(lengths_R, 1)[:, None]
    scores = np.where(real, scores - scores.sum(axis=1, keepdims=True) / count, 0.0)
    deviation = np.sqrt((scores**2).sum(axis=1, keepdims=True) / count)
    return np.divide(scores, deviation, out=np.zeros_like(scores), where=deviation > 1e-12)


def softmax(scores_RC: Floats, lengths_R: Ints) -> Floats:
    """[R, C] probabilities of a one-item list; 0 at padding. A request without candidates gets zeros."""
    masked = np.where(_mask(scores_RC, lengths_R), scores_RC, -np.inf)
    top = np.max(masked, axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(masked - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def sample_plackett_luce(scores_RC: Floats, lengths_R: Ints, places: int, rng: np.random.Generator) -> tuple[Ints, Floats]:
    """Draw one list a request: (columns [R, K], -1 where candidates ran out; conditional propensities [R, K], 1 there).

    Gumbel top-k: the order of scores + independent Gumbel noise is a Plackett-Luce draw (Yellott 1977; Kool et al., ICML 2019).
    """
    keys = np.where(_mask(scores_RC, lengths_R), scores_RC + rng.gumbel(size=scores_RC.shape), -np.inf)
    places = min(places, scores_RC.shape[1])
    if places < scores_RC.shape[1]:
        chosen = np.argpartition(-keys, places - 1, axis=1)[:, :places]
        order = np.argsort(-np.take_along_axis(keys, chosen, axis=1), axis=1, kind="stable")
        chosen = np.take_along_axis(chosen, order, axis=1)
    else:
        chosen = np.argsort(-keys, axis=1, kind="stable")
    chosen = np.where(np.arange(places) < np.asarray(lengths_R)[:, None], chosen, -1)
    return chosen, plackett_luce_propensities(scores_RC, lengths_R, chosen)


def best_first(scores_RC: Floats, lengths_R: Ints, places: int) -> Ints:
    """[R, K] the columns of the highest scores, best first, -1 where candidates ran out: the limit of temperature 0."""
    keys = np.where(_mask(scores_RC, lengths_R), -scores_RC, np.inf)
    order = np.argsort(keys, axis=1, kind="stable")[:, :places]
    return np.where(np.arange(order.shape[1]) < np.asarray(lengths_R)[:, None], order, -1)


def plackett_luce_propensities(scores_RC: Floats, lengths_R: Ints, shown_RK: Ints) -> Floats:
    """[R, K] P(item at its place | the items above it) of given lists of columns; 1 where the list has ended (-1).

    Raises EvaluationError naming the request when a column is no candidate or stands twice.
    """
    return np.exp(_log_propensities(scores_RC, lengths_R, shown_RK)[0])


def conditional_probabilities(scores_RC: Floats, lengths_R: Ints, shown_RK: Ints) -> Floats:
    """[R, K, C] P(candidate c at place k | the items the log shows above k); zeros where the list has ended.

    Memory is R · K · C: call it in blocks of requests.
    """
    _, logits, left = _log_propensities(scores_RC, lengths_R, shown_RK)
    out = np.exp(np.minimum(logits[:, None, :] - left[:, :, None], 0.0))
    rows, places = np.nonzero(shown_RK >= 0)
    for later in range(1, shown_RK.shape[1]):  # over places, not rows: an item placed at j cannot stand below j
        above = places < later
        out[rows[above], later, shown_RK[rows[above], places[above]]] = 0.0
    return np.where((shown_RK >= 0)[:, :, None], out, 0.0)


class Policy(Protocol):
    """How lists are drawn from a ranker's scores."""

    def probabilities(self, scores_RC: Floats, lengths_R: Ints, shown_RK: Ints) -> Floats:
        """[R, K, C] P(candidate c at place k | the items shown above k); zeros where the list has ended."""

    def draw(self, scores_RC: Floats, lengths_R: Ints, places: int, rng: np.random.Generator) -> tuple[Ints, Floats]:
        """One list a request: columns [R, K], -1 where candidates ran out, and conditional propensities [R, K], 1 there."""

    @property
    def warning(self) -> str | None:
        """What someone who logs with this policy, or judges it from another's log, must know; None where there is nothing."""


@dataclass(frozen=True)
class PlackettLuce:
    """Softmax without replacement. Scores are divided by `temperature`."""

    temperature: float = 1.0
    warning: None = None

    def probabilities(self, scores_RC: Floats, lengths_R: Ints, shown_RK: Ints) -> Floats:
        return conditional_probabilities(scores_RC / self.temperature, lengths_R, shown_RK)

    def draw(self, scores_RC: Floats, lengths_R: Ints, places: int, rng: np.random.Generator) -> tuple[Ints, Floats]:
        return sample_plackett_luce(scores_RC / self.temperature, lengths_R, places, rng)


@dataclass(frozen=True)
class EpsilonGreedy:
    """At each place the best candidate left with probability 1 − epsilon, else any of those left alike (the best too). epsilon 0: deterministic.

    Of equal scores the first candidate is the best.
    """

    epsilon: float

    @property
    def warning(self) -> str | None:
        if self.epsilon > 0:
            return None
        return (
            "A deterministic policy shows one list a request. Judged from another's log, only requests that show just that list count, so look at "
            "the effective sample; as a logger it never shows anything else, so no other policy can be judged from its log."
        )

    def probabilities(self, scores_RC: Floats, lengths_R: Ints, shown_RK: Ints) -> Floats:
        _log_propensities(scores_RC, lengths_R, shown_RK)  # refuses what is no candidate, or stands twice
        left_RC, rows = _mask(scores_RC, lengths_R).copy(), np.arange(len(shown_RK))
        out = np.zeros((*shown_RK.shape, scores_RC.shape[1]))
        for place in range(shown_RK.shape[1]):  # over places, not rows
            count_R = left_RC.sum(axis=1)
            open_R = (shown_RK[:, place] >= 0) & (count_R > 0)
            out[:, place] = self.epsilon * left_RC / np.maximum(count_R, 1)[:, None]
            out[rows, place, np.where(left_RC, scores_RC, -np.inf).argmax(axis=1)] += 1 - self.epsilon
            out[~open_R, place] = 0.0
            left_RC[rows[open_R], shown_RK[open_R, place]] = False
        return out

    def draw(self, scores_RC: Floats, lengths_R: Ints, places: int, rng: np.random.Generator) -> tuple[Ints, Floats]:
        places, rows = min(places, scores_RC.shape[1]), np.arange(len(scores_RC))
        left_RC = _mask(scores_RC, lengths_R).copy()
        shown, propensities = np.full((len(rows), places), -1), np.ones((len(rows), places))
        for place in range(places):
            count_R = left_RC.sum(axis=1)
            best_R = np.where(left_RC, scores_RC, -np.inf).argmax(axis=1)
            any_R = np.where(left_RC, rng.random(left_RC.shape), -1.0).argmax(axis=1)
            chosen_R = np.where(rng.random(len(rows)) < self.epsilon, any_R, best_R)
            open_R = count_R > 0
            shown[open_R, place] = chosen_R[open_R]
            chance_R = self.epsilon / np.maximum(count_R, 1) + (1 - self.epsilon) * (chosen_R == best_R)
            propensities[open_R, place] = chance_R[open_R]
            left_RC[rows[open_R], chosen_R[open_R]] = False
        return shown, propensities


def marginal_probabilities(policy: Policy, scores_RC: Floats, lengths_R: Ints, places: int, *, draws: int, rng: np.random.Generator) -> Floats:
    """[R, K, C] P(candidate c at place k) over all that may stand above: the mean conditional probability below `draws` lists drawn from the policy.

    Unbiased for each entry; exact at the first place. Memory is R · K · C: call it in blocks of requests.
    """
    total = None
    for _ in range(draws):
        drawn, _ = policy.draw(scores_RC, lengths_R, places, rng)
        of_this = policy.probabilities(scores_RC, lengths_R, drawn)
        total = of_this if total is None else total + of_this
    assert total is not None
    return total / draws


def _log_propensities(scores_RC: Floats, lengths_R: Ints, shown_RK: Ints) -> tuple[Floats, Floats, Floats]:
    """Log conditional propensities [R, K], log weights [R, C] (-inf at padding), log of the weight left before each place [R, K] (0 after)."""
    lengths_R = np.asarray(lengths_R)
    real = _mask(scores_RC, lengths_R)
    placed = shown_RK >= 0
    ordered = np.sort(np.where(placed, shown_RK, -1 - np.arange(shown_RK.shape[1])), axis=1)
    bad = (shown_RK >= lengths_R[:, None]).any(axis=1) | (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if bad.any():
        raise EvaluationError(f"policy: request {int(np.argmax(bad))} (from 0) shows an item that is not among its candidates, or one twice")
    logits = np.where(real, scores_RC, -np.inf).astype(np.float64)
    chosen = np.where(placed, np.take_along_axis(logits, np.maximum(shown_RK, 0), axis=1), -np.inf)
    # What is left before place k = the items never shown + the shown ones from k down. Summed from below and in logs, so that nothing cancels
    # or underflows: subtracting what was placed from the total would lose every digit once the best items are gone.
    rest = logits.copy()
    rows, places = np.nonzero(placed)
    rest[rows, shown_RK[rows, places]] = -np.inf
    left = np.logaddexp.accumulate(np.concatenate([_log_sum(rest), chosen[:, ::-1]], axis=1), axis=1)[:, :0:-1]
    left = np.where(placed, left, 0.0)
    return np.where(placed, np.minimum(np.where(placed, chosen, 0.0) - left, 0.0), 0.0), logits, left


def _log_sum(logits_RC: Floats) -> Floats:
    """[R, 1] log Σ exp along the last axis; -inf where every entry is."""
    top = np.max(logits_RC, axis=1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(logits_RC - top).sum(axis=1, keepdims=True)) + top


def _mask(scores_RC: Floats, lengths_R: Ints) -> NDArray[np.bool_]:
    return np.arange(scores_RC.shape[1]) < np.asarray(lengths_R)[:, None]
