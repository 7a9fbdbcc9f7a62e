"""SASRec: self-attentive sequential recommendation (Kang & McAuley, ICDM 2018, arXiv 1808.09781).

B users, L history, D width, N items.

    x = sqrt(D) · item + position      per block: x = x + A(LN x) ; x = x + FFN(LN x)      state = LN x      score of item i = ⟨state, item_i⟩

The paper's: learned positions, causal blocks, a point-wise ReLU FFN of width D, one table for input and output. Ours: the standard pre-norm
residual (the paper's code keeps the normalised query as residual), a fused projection with output matrix, no dropout on attention weights
(attention/full.py), right padding with positions counted from the oldest event read, and a learned start vector for a user without history. An
attention that knows the order of events by itself (attention/blossom.py) takes the place of the positions.
"""

import torch
from torch import Tensor, nn

from longtrail.config import SASRecSettings
from longtrail.models.attention.factory import knows_order, make_attention
from longtrail.models.contracts import History, Sizes
from longtrail.models.items.factory import make_items
from longtrail.models.masks import padding_mask


class Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        x_BLD = x_BLD + self.dropout(self.attention(self.attention_norm(x_BLD), lengths_B))
        return x_BLD + self.dropout(self.feed(self.feed_norm(x_BLD)))


class SASRec(nn.Module):
    """Retriever. With full attention it reads the newest `max_history` events, at O(L²·D) time; memory is linear in L.

    With Blossom there is no position table and so no bound: the whole history given is read.
    """

    def __init__(self, settings: SASRecSettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.items = make_items(settings.items, sizes.items, settings.width, std=0.02)
        self.positions = None if knows_order(settings.attention) else nn.Parameter(torch.randn(settings.max_history, settings.width) * 0.02)
        self.start = nn.Parameter(torch.zeros(settings.width))
        self.dropout = nn.Dropout(settings.dropout)
        attentions = [make_attention(settings.attention, settings.width, settings.heads, causal=True) for _ in range(settings.blocks)]
        self.blocks = nn.ModuleList(Block(settings.width, attention, settings.dropout) for attention in attentions)
        self.norm = nn.LayerNorm(settings.width)

    def states(self, history: History) -> Tensor:
        """[B, L, D]: state t is the user after events 0..t of `history`. Undefined in padded places.

        Raises ValueError for L above max_history where positions are learned.
        """
        L = history.items_BL.shape[1]
        items_BL = history.items_BL.masked_fill(~padding_mask(history.lengths_B, L), 0)
        x_BLD = self.items.embed(items_BL) * self.items.width**0.5
        if self.positions is not None:
            if len(self.positions) < L:
                raise ValueError(f"a history of {L} events; expected at most max_history = {len(self.positions)}")
            x_BLD = x_BLD + self.positions[:L]
        x_BLD = self.dropout(x_BLD)
        for block in self.blocks:
            x_BLD = block(x_BLD, history.lengths_B)
        return self.norm(x_BLD)

    def prefix_states(self, history: History) -> Tensor:
        """[B, L + 1, D]: row t is the user after the first t events, row 0 the start vector; the loss at row 0 is what trains it."""
        states_BLD = self.states(history)
        return torch.cat([self.start.to(states_BLD.dtype).expand(len(states_BLD), 1, -1), states_BLD], dim=1)

    def user_vectors(self, history: History) -> Tensor:
        """[B, D]: the state after the last real event; the start vector for an empty history.

        Where positions are learned only the newest max_history events are read.
        """
        if self.positions is not None:
            history = newest(history, len(self.positions))
        return self.prefix_states(history)[torch.arange(len(history.lengths_B), device=history.lengths_B.device), history.lengths_B]

    def item_vectors(self) -> Tensor:
        """[N + 1, D]."""
        return self.items.vectors()


def newest(history: History, places: int) -> History:
    """The newest `places` events of each history, still right-padded. `history` itself where it is no longer than that."""
    if history.items_BL.shape[1] <= places:
        return history
    skipped_B = (history.lengths_B - places).clamp(min=0)
    places_BL = skipped_B.unsqueeze(-1) + torch.arange(places, device=skipped_B.device)
    return History(
        items_BL=history.items_BL.gather(1, places_BL),
        categories_BL=history.categories_BL.gather(1, places_BL),
        actions_BL=history.actions_BL.gather(1, places_BL),
        times_BL=history.times_BL.gather(1, places_BL),
        lengths_B=history.lengths_B - skipped_B,
    )
