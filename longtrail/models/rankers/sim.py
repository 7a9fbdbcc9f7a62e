"""SIM: search-based interest model (Pi et al., CIKM 2020, arXiv 2006.05639). B requests, L history, C candidates, D width, K top-k.

    hard search: the K newest behaviours of the candidate's category         soft search: the K largest r_j = (q W_a) · (k_j W_b)
    u = multi-head target attention over them

The paper's: both searches, and for the soft one an auxiliary click model over Σ_j r_j k_j, which alone trains W_a and W_b (`training_logits`).
Ours: Σ_j r_j k_j is divided by the number of behaviours; an unknown category is one of its own; no embedding of time gaps in the second stage;
and what two_stage.py says.
"""

import torch
from torch import Tensor, nn

from longtrail.config import SIMSettings
from longtrail.models.attention.pointwise import glorot
from longtrail.models.contracts import Candidates, Context, History, Sizes
from longtrail.models.head import Head
from longtrail.models.masks import padding_mask
from longtrail.models.rankers.two_stage import Searcher, TwoStageRanker


class SoftSearch(nn.Module):
    """r [B, C, L], and the auxiliary click model that trains it."""

    def __init__(self, settings: SIMSettings, width: int) -> None:
        super().__init__()
        self.query, self.key = (glorot(width, width, inputs=width, outputs=width) for _ in range(2))
        self.head = Head(2 * width, settings.hidden, settings.dropout)

    def scores(self, keys_BLD: Tensor, query_BCD: Tensor) -> Tensor:
        return query_BCD @ self.query @ self.key.T @ keys_BLD.transpose(1, 2)

    def sums(self, keys_BLD: Tensor, query_BCD: Tensor, lengths_B: Tensor) -> Tensor:
        """Σ_j r_j k_j / n, [B, C, D]. Without a softmax between them, r K is q W_a W_b (K K): D·D numbers a request, no [B, C, L]."""
        return query_BCD @ self.query @ self.key.T @ (keys_BLD.transpose(1, 2) @ keys_BLD) / lengths_B.clamp(min=1).view(-1, 1, 1)


class SIM(TwoStageRanker):
    """Ranker."""

    def __init__(self, settings: SIMSettings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        self.soft = SoftSearch(settings, self.embedding.width) if settings.search == "soft" else None

    def searcher(self, history: History, mask_BL: Tensor, candidates: Candidates, context: Context, query_BCD: Tensor) -> Searcher:
        if self.soft is not None:
            soft, keys_BLD = self.soft, self.embedding.keys(history, mask_BL)
            return lambda block: soft.scores(keys_BLD, query_BCD[:, block])
        place_L = torch.arange(mask_BL.shape[1], device=mask_BL.device, dtype=torch.float32)  # later is better

        def newest_alike(block: slice) -> Tensor:
            alike_BCL = candidates.categories_BC[:, block].unsqueeze(2) == history.categories_BL.unsqueeze(1)
            return torch.where(alike_BCL, place_L, -torch.inf)

        return newest_alike

    def training_logits(self, history: History, candidates: Candidates, context: Context) -> list[Tensor]:
        """[logits] of a hard search, [logits, auxiliary logits] of a soft one: both are judged by the clicks in training."""
        logits_BC = self(history, candidates, context)
        if self.soft is None:
            return [logits_BC]
        mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
        mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])
        query_BCD = self.embedding.queries(candidates)
        read_BCD = self.soft.sums(self.embedding.keys(history, mask_BL), query_BCD, history.lengths_B)
        return [logits_BC, self.soft.head([query_BCD, read_BCD], candidates.statistics_BCF, context.statistics_BG, mask_BC)]
