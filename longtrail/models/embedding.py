"""What a ranker sees of a behaviour and of a candidate. B requests, L history, C candidates, W field width, D = 2W.

Query and behaviours share the item and category tables, concatenated (as in the code of MIMN, which SAM's authors name). The action (rated_4,
click, …) is known of behaviours only: its vector is added to the behaviour's, and a candidate takes the zero row "unknown". That is our choice,
so that liked and disliked can be told apart; with the action table at zero the rankers are the papers'.

Ours too: what somebody does at the moment, `recent`, which every ranker's head is given. A history that is read as a whole says what somebody likes;
how they judge just now (a run of good films, a shop visited with intent) is in the newest actions, whatever the items, and a longer history blurs it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtrail.config import DenseItemsSettings, ItemsSettings
from longtrail.models.contracts import Axis, Candidates, History, Sizes
from longtrail.models.items.dense import DenseItems, known
from longtrail.models.items.factory import make_items
from longtrail.models.lookup import look_up, look_up_and_add, look_up_both
from longtrail.models.masks import padding_mask
from longtrail.models.order import newest

RECENT_EVENTS = 100  # that `recent` looks at: 4 % of the slowest decay's weight is older
DECAYS = (3.0, 10.0, 30.0)  # events after which an action counts 1/e as much
DENSE = DenseItemsSettings()


class BehaviourEmbedding(nn.Module):
    """Keys [B, L, D] and queries [B, C, D]; zeros in padded places, whatever ids stand there."""

    def __init__(self, sizes: Sizes, width: int, *, items: ItemsSettings = DENSE, std: float = 0.1) -> None:
        super().__init__()
        self.width, self.recent_width = 2 * width, len(DECAYS) * 2 * width
        self.items = make_items(items, sizes.items, width, std=std)
        self.categories = DenseItems(sizes.categories, width, std=std, axis="categories")
        self.axes: dict[str, Axis] = {"actions": "actions"}
        self.actions = nn.Parameter(torch.randn(sizes.actions + 1, 2 * width) * std)
        with torch.no_grad():
            self.actions[0] = 0

    def start_items(self, vectors: Tensor, *, std: float = 0.3) -> None:
        """Item vectors start as `vectors` [N + 1, W], scaled as a whole to a standard deviation three times the other tables' (our choice)."""
        self.items.start(vectors, std=std)

    @torch.no_grad()
    def similarity(self, items_n: Tensor, categories_n: Tensor) -> tuple[float, float]:
        """Mean and standard deviation (never 0) of q · k over all pairs of these items; actions are left out."""
        x_nD = self.things(items_n, categories_n, items_n > 0).double()
        mean_D, covariance_DD = x_nD.mean(0), torch.cov(x_nD.T, correction=0)
        # Of independent q and k with mean m and covariance C: variance Σ C² + 2 mᵀ C m.
        variance = covariance_DD.square().sum() + 2 * mean_D @ covariance_DD @ mean_D
        return float(mean_D.square().sum()), max(float(variance.clamp(min=0).sqrt()), 1e-6)

    def keys(self, history: History, mask_BL: Tensor) -> Tensor:
        """[B, L, D]: item ‖ category, plus the action."""
        if (self.categories.items + 1) * len(self.actions) > mask_BL.numel():
            return self.things(history.items_BL, history.categories_BL, mask_BL).add_(self.done(history.actions_BL, mask_BL))
        # Fewer pairs of category and action than behaviours: looking up the pairs' sums is the same numbers with a third less memory traffic.
        categories_C1D = functional.pad(self.categories.vectors()[1:], (self.width // 2, 0, 1, 0)).unsqueeze(1)
        pairs_PD = (categories_C1D + functional.pad(self.actions[1:], (0, 0, 1, 0))).flatten(0, 1)
        categories_BL = known(history.categories_BL.masked_fill(~mask_BL, 0), self.categories.items)
        actions_BL = known(history.actions_BL.masked_fill(~mask_BL, 0), len(self.actions) - 1)
        pairs_BL, items_BL = categories_BL * len(self.actions) + actions_BL, history.items_BL.masked_fill(~mask_BL, 0)
        if isinstance(self.items, DenseItems):
            return look_up_both(pairs_PD, pairs_BL, self.items.table, known(items_BL, self.items.items))
        return look_up_and_add(pairs_PD, pairs_BL, self.items.embed(items_BL))

    def queries(self, candidates: Candidates) -> Tensor:
        """[B, C, D]: item ‖ category."""
        mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])
        return self.things(candidates.items_BC, candidates.categories_BC, mask_BC)

    def recent(self, history: History, candidates: int) -> Tensor:
        """[B, C, recent_width]: for each decay τ, Σ_r w_r e_r / (1 + Σ_r w_r), the mean vector of the actions e_r of r events ago, w_r = exp(-r / τ).

        The same for every candidate; zeros for an empty history. The 1 is an action that is not known: one event does not say what somebody does.
        """
        history = newest(history, RECENT_EVENTS)
        rank_BL = history.lengths_B.unsqueeze(1) - 1 - torch.arange(history.items_BL.shape[1], device=history.lengths_B.device)
        decays_K11 = rank_BL.new_tensor(DECAYS, dtype=self.actions.dtype).view(-1, 1, 1)
        weights_BKL = (torch.exp(-rank_BL.clamp(min=0) / decays_K11) * (rank_BL >= 0)).transpose(0, 1)
        actions_BL = known(history.actions_BL.masked_fill(rank_BL < 0, 0), len(self.actions) - 1)
        done_BLA = (actions_BL.unsqueeze(-1) == torch.arange(1, len(self.actions), device=actions_BL.device)).to(weights_BKL.dtype)
        shares_BKA = weights_BKL @ done_BLA / (1 + weights_BKL.sum(2, keepdim=True))
        return (shares_BKA @ self.actions[1:]).flatten(1).unsqueeze(1).expand(-1, candidates, -1)

    def things(self, items: Tensor, categories: Tensor, mask: Tensor) -> Tensor:
        """[..., D]: item ‖ category."""
        return torch.cat([self.items.embed(items.masked_fill(~mask, 0)), self.categories.embed(categories.masked_fill(~mask, 0))], dim=-1)

    def done(self, actions: Tensor, mask: Tensor) -> Tensor:
        """[..., D]: what the user did to them."""
        return look_up(self.actions, known(actions.masked_fill(~mask, 0), len(self.actions) - 1))
