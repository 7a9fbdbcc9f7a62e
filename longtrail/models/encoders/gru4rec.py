"""GRU4Rec: a recurrent encoder (Hidasi et al., ICLR 2016, arXiv 1511.06939).

B users, L history, D width, N items.

    h_t = GRU(sqrt(D) · item_t, h_{t-1}), h_{-1} = 0      state_t = W h_t + b      score of item i = ⟨state, item_i⟩

The paper's: a GRU over a session's items. As in the code of RecJPQ: width D throughout, and a linear layer D → D in front of the inner product with
the item slot. Ours: one table for input and output (its un-compressed model unties them), the factor sqrt(D) on what is put in (a table that is also
put out starts small), torch's GRU cell, every place of a window as a target (that code draws one place and takes all that follows as relevant:
`loss: lambdarank` does so here), one layer unless asked for more (there: three), and a learned start vector for a user without history.
"""

import torch
from torch import Tensor, nn

from longtrail.config import GRU4RecSettings
from longtrail.models.contracts import History, Sizes
from longtrail.models.dropout import Dropout
from longtrail.models.encoders.causal import CausalEncoder
from longtrail.models.items.factory import make_items
from longtrail.models.masks import padding_mask


class GRU4Rec(CausalEncoder):
    """Retriever. O(L·D²) time, one step after another; reads the whole history given."""

    def __init__(self, settings: GRU4RecSettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        width, dropout = settings.width, settings.dropout
        self.items = make_items(settings.items, sizes.items, width, std=0.02)
        self.start = nn.Parameter(torch.zeros(width))
        self.dropout = Dropout(dropout)
        self.gru = nn.GRU(width, width, num_layers=settings.layers, batch_first=True, dropout=dropout if settings.layers > 1 else 0.0)
        self.output = nn.Linear(width, width)

    def states(self, history: History) -> Tensor:
        """[B, L, D]: state t is the user after events 0..t of `history`. Undefined in padded places."""
        items_BL = history.items_BL.masked_fill(~padding_mask(history.lengths_B, history.items_BL.shape[1]), 0)
        hidden_BLD, _ = self.gru(self.dropout(self.items.embed(items_BL) * self.items.width**0.5))
        return self.output(self.dropout(hidden_BLD))
