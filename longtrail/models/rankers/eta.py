"""ETA: end-to-end target attention (Chen et al., 2021, arXiv 2108.04468). B requests, L history, C candidates, D width, M bits, K top-k.

    h(x) = sign(x R), R a fixed random [D, M]      the K behaviours of least Hamming distance from h(q) to h(k_j)      u = target attention over them

The paper's: SimHash of the embeddings as they are now, so that the search follows training; no gradient goes through it. Ours: the distance is M/2
less half the inner product of the signs, one matrix product for all candidates; the newer of two behaviours at equal distance; and what
two_stage.py says.
"""

import torch
from torch import Tensor

from longtrail.config import ETASettings
from longtrail.models.attention.selected import newer_first
from longtrail.models.contracts import Candidates, Context, History, Sizes
from longtrail.models.rankers.two_stage import Searcher, TwoStageRanker


class ETA(TwoStageRanker):
    """Ranker."""

    def __init__(self, settings: ETASettings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        self.planes: Tensor
        self.register_buffer("planes", torch.randn(self.embedding.width, settings.bits))

    def signs(self, x: Tensor) -> Tensor:
        """±1 [..., M]."""
        return torch.where(x @ self.planes >= 0, 1.0, -1.0).to(x.dtype)

    def searcher(self, history: History, mask_BL: Tensor, candidates: Candidates, context: Context, query_BCD: Tensor) -> Searcher:
        keys_BML = self.signs(self.embedding.keys(history, mask_BL)).transpose(1, 2)
        asked_BCM = self.signs(query_BCD)
        return lambda block: newer_first(asked_BCM[:, block] @ keys_BML)
