"""SASRec: self-attentive sequential recommendation (Kang & McAuley, ICDM 2018, arXiv 1808.09781).

B users, L history, D width, N items.

    x = sqrt(D) · item      per block: x = x + A(LN x) ; x = x + FFN(LN x)      state = LN x      score of item i = ⟨state, item_i⟩

The paper's: causal blocks, a point-wise ReLU FFN of width D, one table for input and output, and learned positions, added to x, which a setting
brings back. Ours: rotary positions inside the attention, the standard pre-norm residual (the paper's code keeps the normalised query as residual), a
fused projection with output matrix, no dropout on attention weights (attention/full.py), right padding with learned positions counted from the oldest
event read, and a learned start vector for a user without history.
"""

import torch
from torch import Tensor, nn

from longtrail.config import SASRecSettings
from longtrail.models.attention.factory import knows_order, make_attention, reach_of
from longtrail.models.contracts import History, Sizes
from longtrail.models.dropout import Dropout
from longtrail.models.encoders.causal import CausalEncoder
from longtrail.models.encoders.transformer import Block
from longtrail.models.items.factory import make_items
from longtrail.models.masks import padding_mask


class SASRec(CausalEncoder):
    """Retriever. With full attention it reads the newest `max_history` events, at O(L²·D) time; memory is linear in L.

    With Blossom there is no bound: the whole history given is read.
    """

    def __init__(self, settings: SASRecSettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        width, dropout = settings.width, settings.dropout
        self.items = make_items(settings.items, sizes.items, width, std=0.02)
        self.reach = reach_of(settings.attention, settings.max_history)
        self.positions = None if knows_order(settings.attention) else nn.Parameter(torch.randn(settings.max_history, width) * 0.02)
        self.start = nn.Parameter(torch.zeros(width))
        self.dropout = Dropout(dropout)
        attentions = [make_attention(settings.attention, width, settings.heads, causal=True) for _ in range(settings.blocks)]
        self.blocks = nn.ModuleList(Block(width, attention, feed_width=width, activation=nn.ReLU(), dropout=dropout) for attention in attentions)
        self.norm = nn.LayerNorm(width)

    def states(self, history: History) -> Tensor:
        """[B, L, D]: state t is the user after events 0..t of `history`. Undefined in padded places.

        Raises ValueError for L above max_history where positions are learned.
        """
        L = history.items_BL.shape[1]
        items_BL = history.items_BL.masked_fill(~padding_mask(history.lengths_B, L), 0)
        x_BLD, scale = self.items.embed(items_BL), self.items.width**0.5
        if self.positions is None:
            x_BLD = x_BLD * scale
        elif len(self.positions) < L:
            raise ValueError(f"a history of {L} events; expected at most max_history = {len(self.positions)}")
        else:
            x_BLD = torch.add(self.positions[:L], x_BLD, alpha=scale)
        x_BLD = self.dropout(x_BLD)
        for block in self.blocks:
            x_BLD = block(x_BLD, history.lengths_B)
        return self.norm(x_BLD)
