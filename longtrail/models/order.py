"""Histories turned round: the newest event first. B users, L history."""

import torch
from torch import Tensor

from longtrail.models.contracts import History


def turned_places(lengths_B: Tensor, places: int) -> Tensor:
    """int64 [B, L]: n - 1 - j for the n real places, 0 behind them: where place j of a turned history stands in the history, and the other way.

    >>> turned_places(torch.tensor([3, 1]), 4).tolist()
    [[2, 1, 0, 0], [0, 0, 0, 0]]
    """
    return (lengths_B.unsqueeze(-1) - 1 - torch.arange(places, device=lengths_B.device)).clamp(min=0)


def newest_first(history: History) -> History:
    """Place j is the j-th newest event, so that it means the same whatever the length. Right-padded as before; padded places hold anything."""
    turn_BL = turned_places(history.lengths_B, history.items_BL.shape[1])
    return History(
        items_BL=history.items_BL.gather(1, turn_BL),
        categories_BL=history.categories_BL.gather(1, turn_BL),
        actions_BL=history.actions_BL.gather(1, turn_BL),
        times_BL=history.times_BL.gather(1, turn_BL),
        lengths_B=history.lengths_B,
    )
