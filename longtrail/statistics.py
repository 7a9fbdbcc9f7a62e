"""Counts to model inputs: the one function that training, evaluation and the service all call, so that they cannot differ."""

import numpy as np
from numpy.typing import NDArray

ITEM_FEATURES = 3  # F
USER_FEATURES = 3  # G
_PRIOR_IMPRESSIONS = 10.0  # our choice: pseudo-impressions that pull a rate towards the prior click rate


def smoothed_rate(clicks: NDArray[np.int64], impressions: NDArray[np.int64], prior_rate: float) -> NDArray[np.float64]:
    """(clicks + 10 · prior) / (impressions + 10), elementwise: the prior where nothing was shown yet."""
    return (clicks + _PRIOR_IMPRESSIONS * prior_rate) / (impressions + _PRIOR_IMPRESSIONS)


def _logit(rate: NDArray[np.float64]) -> NDArray[np.float64]:
    rate = np.clip(rate, 1e-6, 1 - 1e-6)
    return np.log(rate / (1 - rate))


def item_features(
    item_events: NDArray[np.int64], item_impressions: NDArray[np.int64], item_clicks: NDArray[np.int64], prior_rate: float
) -> NDArray[np.float32]:
    """[..., 3]: log(1 + events) / 10, log(1 + impressions) / 10, logit of the smoothed click rate less that of the prior."""
    rate = _logit(smoothed_rate(item_clicks, item_impressions, prior_rate)) - _logit(np.asarray(prior_rate))
    return np.stack([np.log1p(item_events) / 10, np.log1p(item_impressions) / 10, rate], axis=-1).astype(np.float32)


def user_features(
    history_length: NDArray[np.int64], user_impressions: NDArray[np.int64], user_clicks: NDArray[np.int64], prior_rate: float
) -> NDArray[np.float32]:
    """[..., 3]: log(1 + history length) / 10, log(1 + impressions) / 10, logit of the smoothed click rate less that of the prior."""
    rate = _logit(smoothed_rate(user_clicks, user_impressions, prior_rate)) - _logit(np.asarray(prior_rate))
    return np.stack([np.log1p(history_length) / 10, np.log1p(user_impressions) / 10, rate], axis=-1).astype(np.float32)
