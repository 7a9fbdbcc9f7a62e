"""TWIN: two-stage interest network (Chang et al., KDD 2023, arXiv 2302.02352). B requests, L history, C candidates, D width, H heads, K top-k.

    score_h(q, j) = (q W_q) · (k_j W_k) / sqrt(d) + β_h(action_j, gap_j)      the K largest Σ_h score_h      u = attention by the same scores

The paper's: one score in both stages, so that the search keeps what the attention would have weighed most; features of a behaviour cut into those of
the item (the inner product) and those of user and item together, each of which becomes a scalar bias. Ours: which are which (item and category;
action and the time since, in powers of two of a second), the sum over heads as the score of the search, and what two_stage.py says.
"""

import torch
from torch import Tensor, nn

from longtrail.config import TWINSettings
from longtrail.models.contracts import Axis, Candidates, Context, History, Sizes
from longtrail.models.items.dense import known
from longtrail.models.lookup import look_up
from longtrail.models.rankers.two_stage import Searcher, TwoStageRanker

GAPS = 32  # up to 2^31 seconds, 68 years


class CrossBias(nn.Module):
    """β [B, K, H] of what happened between user and item: the action and how long ago it was. Zero at first."""

    def __init__(self, sizes: Sizes, heads: int) -> None:
        super().__init__()
        self.axes: dict[str, Axis] = {"actions": "actions"}
        self.actions = nn.Parameter(torch.zeros(sizes.actions + 1, heads))
        self.gaps = nn.Parameter(torch.zeros(GAPS + 1, heads))  # row 0 is padding

    def forward(self, history: History, mask_BL: Tensor, times_B: Tensor) -> Tensor:
        seconds_BL = (times_B.unsqueeze(1) - history.times_BL).masked_fill(~mask_BL, 0).clamp(min=0) // 1_000_000
        gaps_BL = ((seconds_BL + 1).double().log2().long().clamp(max=GAPS - 1) + 1).masked_fill(~mask_BL, 0)
        actions_BL = known(history.actions_BL.masked_fill(~mask_BL, 0), len(self.actions) - 1)
        return look_up(self.actions, actions_BL) + look_up(self.gaps, gaps_BL)


class TWIN(TwoStageRanker):
    """Ranker."""

    def __init__(self, settings: TWINSettings, sizes: Sizes) -> None:
        super().__init__(settings, sizes)
        self.bias = CrossBias(sizes, settings.heads)

    def searcher(self, history: History, mask_BL: Tensor, candidates: Candidates, context: Context, query_BCD: Tensor) -> Searcher:
        keys_BDL = self.embedding.things(history.items_BL, history.categories_BL, mask_BL).transpose(1, 2)
        asked_BCD = self.attention.asked(query_BCD).sum(2)
        bias_B1L = self.bias(history, mask_BL, context.times_B).sum(-1).unsqueeze(1)
        return lambda block: asked_BCD[:, block] @ keys_BDL + bias_B1L

    def stage_two(self, found: History, real_BK: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor | None]:
        keys_BKD = self.embedding.things(found.items_BL, found.categories_BL, real_BK)
        return keys_BKD, keys_BKD + self.embedding.done(found.actions_BL, real_BK), self.bias(found, real_BK, context.times_B)
