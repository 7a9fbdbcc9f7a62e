"""What the two-stage rankers share: search, embed what was found, attend to it, head. B requests, L history, C candidates, D width, H heads, K top-k.

A ranker of the family says how behaviours are scored (`searcher`) and, if it likes, what the second stage asks and reads (`stage_two`). Ours in all
of them: the candidate set, the statistics and the head of the other rankers, q * u beside u as in DIN, and no other branch (the papers put the
newest behaviours through a DIN or DIEN beside the long history), so that what is compared is how the long history is read.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from longtrail.config import TwoStageSettings
from longtrail.models.attention.pointwise import candidate_blocks
from longtrail.models.attention.selected import SelectedAttention, search, taken
from longtrail.models.contracts import Candidates, Context, History, Sizes
from longtrail.models.embedding import BehaviourEmbedding
from longtrail.models.head import Head
from longtrail.models.masks import padding_mask

Searcher = Callable[[slice], Tensor]


class TwoStageRanker(nn.Module):
    """Ranker. Its search is O(C · L), its second stage O(C · K · D)."""

    def __init__(self, settings: TwoStageSettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = BehaviourEmbedding(sizes, settings.width, items=settings.items)
        self.attention = SelectedAttention(self.embedding.width, settings.heads)
        self.head = Head(3 * self.embedding.width + self.embedding.recent_width, settings.hidden, settings.dropout)

    def searcher(self, history: History, mask_BL: Tensor, candidates: Candidates, context: Context, query_BCD: Tensor) -> Searcher:
        """block of candidates → scores [B, c, L] by which behaviours are found; what needs no candidate is done once, here."""
        raise NotImplementedError

    def stage_two(self, found: History, real_BK: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of behaviours [B, K]: what they are asked by [B, K, D], what is read of them [B, K, D], and what is added to their scores [B, K, H]."""
        keys_BKD = self.embedding.keys(found, real_BK)
        return keys_BKD, keys_BKD, None

    def forward(self, history: History, candidates: Candidates, context: Context) -> Tensor:
        """Logits [B, C]."""
        mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])
        query_BCD = self.embedding.queries(candidates)
        read_BCD = self.read(history, candidates, context, query_BCD)
        parts = [query_BCD, read_BCD, query_BCD * read_BCD, self.embedding.recent(history, mask_BC.shape[1])]
        return self.head(parts, candidates.statistics_BCF, context.statistics_BG, mask_BC)

    def found(self, history: History, candidates: Candidates, context: Context, query_BCD: Tensor) -> tuple[Tensor, Tensor]:
        """Places [B, C, K] of the behaviours that each candidate reads, and whether there is one."""
        mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
        with torch.no_grad(), torch.autocast(mask_BL.device.type, enabled=False):
            searcher = self.searcher(history, mask_BL, candidates, context, query_BCD)
        return search(searcher, mask_BL, candidates.items_BC.shape[1], self.settings.top_k)

    def read(self, history: History, candidates: Candidates, context: Context, query_BCD: Tensor) -> Tensor:
        """u [B, C, D]."""
        if not query_BCD.shape[1]:
            return query_BCD  # nobody asks, and histories have at least one place
        places_BCK, found_BCK = self.found(history, candidates, context, query_BCD)
        B, C, K = places_BCK.shape

        def one(block: slice) -> Tensor:
            asked_BCD, real_BCK = query_BCD[:, block], found_BCK[:, block]
            behaviours = taken(history, places_BCK[:, block].flatten(1))
            keys, values, bias = (
                x if x is None else x.unflatten(1, (asked_BCD.shape[1], K)) for x in self.stage_two(behaviours, real_BCK.flatten(1), context)
            )
            assert keys is not None and values is not None
            return self.attention(asked_BCD, keys, values, real_BCK, bias)

        return torch.cat([one(block) for block in candidate_blocks(C, 4 * B * K * query_BCD.shape[2])], dim=1)
