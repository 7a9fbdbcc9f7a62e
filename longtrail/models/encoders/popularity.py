"""The most popular items, the same for everyone. N items, B users, D = 1. A standard baseline; the logarithm, which moves no item, is our choice."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from longtrail.config import PopularityRetrieverSettings
from longtrail.models.contracts import History, Sizes


class PopularityRetriever(nn.Module):
    """Retriever: an item's one number is log(1 + events), a user's is 1."""

    def __init__(self, settings: PopularityRetrieverSettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.scores: Tensor
        self.register_buffer("scores", torch.zeros(sizes.items + 1, 1))

    def user_vectors(self, history: History) -> Tensor:
        """[B, 1]."""
        return self.scores.new_ones(len(history.lengths_B), 1)

    def item_vectors(self) -> Tensor:
        """[N + 1, 1]."""
        return self.scores

    def fit(
        self,
        *,
        events: NDArray[np.int64],
        impressions: NDArray[np.int64] | None = None,
        clicks: NDArray[np.int64] | None = None,
        prior_click_rate: float | None = None,
    ) -> None:
        """Counts [N + 1] of the training period by item id, row 0 padding. Only `events` matters: all popularity models share the call."""
        scores = np.log1p(events)
        scores[0] = 0
        self.scores.copy_(torch.from_numpy(scores).unsqueeze(1))
