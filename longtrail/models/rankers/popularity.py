"""Candidates by a count of the item alone: the incumbent every other ranker must beat. N items, B requests, C candidates."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from longtrail.config import PopularityRankerSettings
from longtrail.models.contracts import Candidates, Context, History, Sizes
from longtrail.models.items.dense import known
from longtrail.statistics import smoothed_rate

Counts = NDArray[np.int64]


class PopularityRanker(nn.Module):
    """Ranker. Its logits are buffers filled by `fit`; an item without counts, or unknown, has the lowest of "clicks" or the prior of "click_rate"."""

    def __init__(self, settings: PopularityRankerSettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.logits: Tensor
        self.register_buffer("logits", torch.zeros(sizes.items + 1))

    def forward(self, history: History, candidates: Candidates, context: Context) -> Tensor:
        """Logits [B, C]."""
        return self.logits[known(candidates.items_BC, len(self.logits) - 1)]

    def fit(self, *, events: Counts, impressions: Counts, clicks: Counts, prior_click_rate: float) -> None:
        """Counts [N + 1] of the training period by item id, row 0 padding.

        "click_rate": the logit of the smoothed click rate. "clicks": slope · log(1 + clicks) + intercept, the logistic fit to the same
        counts, so that the order is that of the clicks and the probabilities are calibrated (our choice; `events` is not used).
        """
        rate = np.clip(smoothed_rate(clicks, impressions, prior_click_rate), 1e-6, 1 - 1e-6)
        logits = np.log(rate / (1 - rate))
        if self.settings.by == "clicks":
            log_clicks = np.log1p(clicks)
            slope, intercept = _logistic_fit(log_clicks, clicks, impressions, float(logits[0]))
            logits = slope * log_clicks + intercept
        self.logits.copy_(torch.from_numpy(logits))


def _logistic_fit(x: NDArray[np.float64], clicks: Counts, impressions: Counts, start: float, *, steps: int = 50) -> tuple[float, float]:
    """Slope and intercept of maximum likelihood of `clicks` out of `impressions`, by Newton's method, with a slight ridge towards (0, start).

    The slope is at least 0.01: the ranking stays that of the clicks even where popular items are clicked less often.
    """
    design = np.stack([x, np.ones_like(x)], axis=1)
    prior = weights = np.array([0.0, start])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (clicks - impressions * p) - 1e-3 * (weights - prior)
        hessian = (design * (impressions * p * (1 - p))[:, None]).T @ design + 1e-3 * np.eye(2)
        step = np.clip(np.linalg.solve(hessian, gradient), -2, 2)
        weights = weights + step
        if np.abs(step).max() < 1e-10:
            break
    return max(float(weights[0]), 0.01), float(weights[1])
