"""First-order Markov chain: what people do right after the last item. The honest baseline of every sequence model; see docs/models/markov.md.

B users, L history, N items, n pairs (i, j) that follow one another in the training period.

    score of item j after item i = (c_ij + μ p_j) / (c_i + μ)        c_ij times j followed i, c_i = Σ_j c_ij, p_j j's share of all events

A chain smoothed with Dirichlet's prior towards popularity (Zhai & Lafferty, SIGIR 2001, for language models; here of items: our choice). Without
history, or after an item that nothing ever followed, it is popularity.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from longtrail.config import MarkovSettings
from longtrail.models.contracts import History, ScoreRows, Sizes
from longtrail.models.items.dense import known


class Markov(nn.Module):
    """RowRetriever: a user is the row of the last item. Counted by `count`, 8 bytes a pair and 16 an item; nothing of size N · N."""

    def __init__(self, settings: MarkovSettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.offsets: Tensor
        self.next_items: Tensor
        self.shares: Tensor
        self.base: Tensor
        self.weights: Tensor
        self.register_buffer("offsets", torch.zeros(sizes.items + 2, dtype=torch.int64))
        self.register_buffer("next_items", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("shares", torch.zeros(0))
        self.register_buffer("base", torch.zeros(sizes.items + 1))
        self.register_buffer("weights", torch.ones(sizes.items + 1))

    def allocate(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Make room for weights of these shapes: how many pairs there are, only the data knew."""
        pairs = shapes.get("next_items", (0,))
        self.next_items, self.shares = self.next_items.new_zeros(pairs), self.shares.new_zeros(pairs)

    def count(self, *, transitions_NN: csr_matrix, events: NDArray[np.int64]) -> None:
        """Counts of the training period: c_ij [N + 1, N + 1] and events [N + 1] by item id. Row and column 0 (padding) are empty."""
        transitions_NN = transitions_NN.sorted_indices()
        followed_N = np.asarray(transitions_NN.sum(axis=1)).ravel() + self.settings.smoothing
        self.allocate({"next_items": (transitions_NN.nnz,)})
        self.offsets.copy_(torch.from_numpy(transitions_NN.indptr.astype(np.int64)))
        self.next_items.copy_(torch.from_numpy(transitions_NN.indices))
        self.shares.copy_(torch.from_numpy(transitions_NN.data / np.repeat(followed_N, np.diff(transitions_NN.indptr))))
        self.weights.copy_(torch.from_numpy(self.settings.smoothing / followed_N))
        self.base.copy_(torch.from_numpy(events / max(1, events.sum())))

    def user_vectors(self, history: History) -> Tensor:
        """int64 [B, 1]: the last item; 0 for an empty history and for an item that is newer than the model."""
        last_B1 = history.items_BL.gather(1, (history.lengths_B - 1).clamp(min=0).unsqueeze(1))
        return known(last_B1.masked_fill((history.lengths_B == 0).unsqueeze(1), 0), len(self.base) - 1)

    def score_rows(self) -> ScoreRows:
        """A row an item, and row 0 for users without history."""
        return ScoreRows(self.offsets, self.next_items, self.shares, self.base, self.weights)
