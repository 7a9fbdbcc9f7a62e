"""SASRec: self-attentive sequential recommendation (Kang & McAuley, ICDM 2018, arXiv 1808.09781).

B users, L history, D width, N items.

    x = sqrt(D) · item + position      per block: x = x + A(LN x) ; x = x + FFN(LN x)      state = LN x      score of item i = ⟨state, item_i⟩

The paper's: learned positions, causal blocks, a point-wise ReLU FFN of width D, one table for input and output. Ours: the standard pre-norm
residual (the paper's code keeps the normalised query as residual), a fused projection with output matrix, no dropout on attention weights
(attention/full.py), right padding with positions counted from the oldest event read, and a learned start vector for a user without history.
"""

import torch
from torch import Tensor, nn

from longtrail.config import SASRecSettings
from longtrail.models.attention.full import FullAttention
from longtrail.models.contracts import History, Sizes
from longtrail.models.items.dense import DenseItems
from longtrail.models.masks import padding_mask


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = FullAttention(width, heads)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.dropout(self.attention(self.attention_norm(x_BLD)))
        return x_BLD + self.dropout(self.feed(self.feed_norm(x_BLD)))


class SASRec(nn.Module):
    """Retriever. Reads the newest `max_history` events; O(L²·D) time, memory linear in L."""

    def __init__(self, settings: SASRecSettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.items = DenseItems(sizes.items, settings.width, std=0.02)
        self.positions = nn.Parameter(torch.randn(settings.max_history, settings.width) * 0.02)
        self.start = nn.Parameter(torch.zeros(settings.width))
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(Block(settings.width, settings.heads, settings.dropout) for _ in range(settings.blocks))
        self.norm = nn.LayerNorm(settings.width)

    def states(self, history: History) -> Tensor:
        """[B, L, D]: state t is the user after events 0..t of `history`. Undefined in padded places. Raises ValueError for L above max_history."""
        L = history.items_BL.shape[1]
        if len(self.positions) < L:
            raise ValueError(f"a history of {L} events; expected at most max_history = {len(self.positions)}")
        items_BL = history.items_BL.masked_fill(~padding_mask(history.lengths_B, L), 0)
        x_BLD = self.dropout(self.items.embed(items_BL) * self.items.width**0.5 + self.positions[:L])
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.norm(x_BLD)

    def prefix_states(self, history: History) -> Tensor:
        """[B, L + 1, D]: row t is the user after the first t events, row 0 the start vector; the loss at row 0 is what trains it."""
        states_BLD = self.states(history)
        return torch.cat([self.start.to(states_BLD.dtype).expand(len(states_BLD), 1, -1), states_BLD], dim=1)

    def user_vectors(self, history: History) -> Tensor:
        """[B, D]: the state after the last real event; the start vector for an empty history. Only the newest max_history events are read."""
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
