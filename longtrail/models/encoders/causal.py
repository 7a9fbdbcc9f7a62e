"""What encoders share whose state t knows events 0..t and no later one. B users, L history, D width, T targets.

Such a model learns from every place of a window at once: the state after t events must name event t, and a start vector the very first.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longtrail.models.contracts import History, ItemEmbedding, Pairs
from longtrail.models.order import newest

if TYPE_CHECKING:  # models know no files, so they import no module that reads some
    from longtrail.examples import SequenceBatch


class CausalEncoder(nn.Module):
    """A Retriever from its `states`. `items` fills the item slot, `start` is the user without history, `reach` the events it can read (None: all)."""

    items: ItemEmbedding
    start: nn.Parameter
    reach: int | None = None

    def states(self, history: History) -> Tensor:
        """[B, L, D]: state t is the user after events 0..t of `history`. Undefined in padded places."""
        raise NotImplementedError

    def prefix_states(self, history: History) -> Tensor:
        """[B, L + 1, D]: row t is the user after the first t events, row 0 the start vector; the loss at row 0 is what trains it."""
        states_BLD = self.states(history)
        return torch.cat([self.start.to(states_BLD.dtype).expand(len(states_BLD), 1, -1), states_BLD], dim=1)

    def user_vectors(self, history: History) -> Tensor:
        """[B, D]: the state after the last real event of the newest `reach`; the start vector for an empty history."""
        history = newest(history, self.reach)
        return self.prefix_states(history)[torch.arange(len(history.lengths_B), device=history.lengths_B.device), history.lengths_B]

    def item_vectors(self) -> Tensor:
        """[N + 1, D]."""
        return self.items.vectors()

    def training_pairs(self, batch: "SequenceBatch") -> Pairs:
        """Every target of every window with the state before it."""
        targets_BL = torch.cat([batch.first_targets_B.unsqueeze(1), batch.targets_BL], dim=1)
        places_T = targets_BL.flatten().nonzero().squeeze(1)
        states_TD = self.prefix_states(batch.history).flatten(0, 1).index_select(0, places_T)
        return Pairs(states_TD, targets_BL.flatten()[places_T], places_T // targets_BL.shape[1])
