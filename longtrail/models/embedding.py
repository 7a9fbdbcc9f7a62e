"""What a ranker sees of a behaviour and of a candidate. B requests, L history, C candidates, W field width, D = 2W.

Query and behaviours share the item and category tables, concatenated (as in the code of MIMN, which SAM's authors name). The action (rated_4,
click, …) is known of behaviours only: its vector is added to the behaviour's, and a candidate takes the zero row "unknown". That is our choice,
so that liked and disliked can be told apart; with the action table at zero the rankers are the papers'.
"""

import torch
from torch import Tensor, nn

from longtrail.config import DenseItemsSettings, ItemsSettings
from longtrail.models.contracts import Candidates, History, Sizes
from longtrail.models.items.dense import DenseItems, known
from longtrail.models.items.factory import make_items
from longtrail.models.lookup import look_up
from longtrail.models.masks import padding_mask

DENSE = DenseItemsSettings()


class BehaviourEmbedding(nn.Module):
    """Keys [B, L, D] and queries [B, C, D]; zeros in padded places, whatever ids stand there."""

    def __init__(self, sizes: Sizes, width: int, *, items: ItemsSettings = DENSE, std: float = 0.1) -> None:
        super().__init__()
        self.width = 2 * width
        self.items = make_items(items, sizes.items, width, std=std)
        self.categories = DenseItems(sizes.categories, width, std=std)
        self.actions = nn.Parameter(torch.randn(sizes.actions + 1, 2 * width) * std)
        with torch.no_grad():
            self.actions[0] = 0

    def start_items(self, vectors: Tensor, *, std: float = 0.3) -> None:
        """Item vectors start as `vectors` [N + 1, W], scaled as a whole to a standard deviation three times the other tables' (our choice)."""
        self.items.start(vectors, std=std)

    def keys(self, history: History, mask_BL: Tensor) -> Tensor:
        """[B, L, D]: item ‖ category, plus the action."""
        actions_BL = known(history.actions_BL.masked_fill(~mask_BL, 0), len(self.actions) - 1)
        return self._fields(history.items_BL, history.categories_BL, mask_BL).add_(look_up(self.actions, actions_BL))

    def queries(self, candidates: Candidates) -> Tensor:
        """[B, C, D]: item ‖ category."""
        mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])
        return self._fields(candidates.items_BC, candidates.categories_BC, mask_BC)

    def _fields(self, items: Tensor, categories: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([self.items.embed(items.masked_fill(~mask, 0)), self.categories.embed(categories.masked_fill(~mask, 0))], dim=-1)
