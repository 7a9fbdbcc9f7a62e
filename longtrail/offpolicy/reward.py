"""The reward model of the doubly robust estimator: a small logistic regression, cross-fitted by user.

N rows, F features, R requests, C candidates. Simple on purpose: the estimate is unbiased whatever the model, which only takes variance away.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

FOLDS = 5
MAX_ROWS = 200_000  # our choice: a regression on a dozen features learns nothing from more


def user_folds(users: Ints, folds: int = FOLDS) -> Ints:
    """The fold of each user, 0..folds-1: a hash of the id, so that a user is in the same fold whatever else is in the log."""
    word = (np.asarray(users).astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    return ((word ^ (word >> np.uint64(31))) % np.uint64(folds)).astype(np.int64)


@dataclass(frozen=True)
class CrossFittedReward:
    """One regression a fold, fitted on the users of all *other* folds: no row is scored by a model that has seen its user."""

    weights_GF: Floats  # [folds, F]
    biases_G: Floats

    @classmethod
    def fit(cls, features_NF: Floats, rewards_N: Floats, users_N: Ints, *, folds: int = FOLDS, seed: int = 0) -> "CrossFittedReward":
        """Rewards are 0/1. Where the other folds hold one kind of reward only, the model is their smoothed mean."""
        fold_N = user_folds(users_N, folds)
        fitted = [_regression(features_NF, rewards_N, np.flatnonzero(fold_N != fold), seed) for fold in range(folds)]
        return cls(np.stack([weights for weights, _ in fitted]), np.array([bias for _, bias in fitted]))

    def logits(self, features: Floats, users_R: Ints) -> Floats:
        """[R] or [R, C] logits of features [R, F] or [R, C, F], each by the model that has not seen the request's user."""
        fold_R = user_folds(users_R, len(self.biases_G))
        bias = self.biases_G[fold_R]
        return np.einsum("r...f,rf->r...", features, self.weights_GF[fold_R]) + bias.reshape(-1, *[1] * (features.ndim - 2))

    def predict(self, features: Floats, users_R: Ints) -> Floats:
        """P(click), shaped as `logits`."""
        return expit(self.logits(features, users_R))


def _regression(features_NF: Floats, rewards_N: Floats, rows: Ints, seed: int) -> tuple[Floats, float]:
    from sklearn.linear_model import LogisticRegression

    if len(rows) > MAX_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_ROWS, replace=False))
    features, rewards = features_NF[rows], rewards_N[rows] > 0.5
    if len(rows) == 0 or rewards.all() or not rewards.any():
        return np.zeros(features_NF.shape[1]), float(logit((rewards.sum() + 0.5) / (len(rows) + 1.0)))
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    deviation = np.where(deviation > 1e-9, deviation, np.inf)  # a constant feature gets weight 0
    model = LogisticRegression(max_iter=200).fit((features - mean) / deviation, rewards)
    weights = model.coef_[0] / deviation
    return weights, float(model.intercept_[0] - weights @ mean)


def cell_means(cells_N: Ints, rewards_N: Floats, users_N: Ints, cells: int, *, folds: int = FOLDS, prior: float = 50.0) -> Callable[[Ints], Floats]:
    """Smoothed mean reward of each cell (an item at a position), cross-fitted by user: the reward model of a log without features.

    Returns a function of users [R] that gives [R, cells]: the means over other folds' users, pulled to their overall mean by `prior` rows.
    """
    fold_N = user_folds(users_N, folds)
    means = np.empty((folds, cells))
    for fold in range(folds):
        others = fold_N != fold
        shown = np.bincount(cells_N[others], minlength=cells)
        clicked = np.bincount(cells_N[others], weights=rewards_N[others], minlength=cells)
        overall = (rewards_N[others].sum() + 0.5) / (others.sum() + 1.0)
        means[fold] = (clicked + prior * overall) / (shown + prior)
    return lambda users_R: means[user_folds(users_R, folds)]
