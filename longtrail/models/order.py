"""Histories in another order, or their newest part. B users, L history, K places."""

import torch
from torch import Tensor

from longtrail.models.contracts import History

_FIELDS = ("items_BL", "categories_BL", "actions_BL", "times_BL")


def turned_places(lengths_B: Tensor, places: int) -> Tensor:
    """int64 [B, L]: n - 1 - j for the n real places, 0 behind them: where place j of a turned history stands in the history, and the other way.

    >>> turned_places(torch.tensor([3, 1]), 4).tolist()
    [[2, 1, 0, 0], [0, 0, 0, 0]]
    """
    return (lengths_B.unsqueeze(-1) - 1 - torch.arange(places, device=lengths_B.device)).clamp(min=0)


def newest_first(history: History) -> History:
    """Place j is the j-th newest event, so that it means the same whatever the length. Right-padded as before; padded places hold anything."""
    turn_BL = turned_places(history.lengths_B, history.items_BL.shape[1])
    return events_at(history, turn_BL, history.lengths_B)


def newest(history: History, places: int | None) -> History:
    """The newest `places` events of each history, still right-padded. `history` itself where it is no longer than that, or `places` is None."""
    if places is None or history.items_BL.shape[1] <= places:
        return history
    return events_at(history, *newest_places(history.lengths_B, places))


def newest_places(lengths_B: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """(int64 [B, places]: where the newest `places` events stand in a wider row; their number [B])."""
    skipped_B = (lengths_B - places).clamp(min=0)
    return skipped_B.unsqueeze(-1) + torch.arange(places, device=lengths_B.device), lengths_B - skipped_B


def events_at(history: History, places_BK: Tensor, lengths_B: Tensor) -> History:
    """The events at the given places [B, K], of which the first `lengths_B` are real."""
    return History(**{name: getattr(history, name).gather(1, places_BK) for name in _FIELDS}, lengths_B=lengths_B)


def between(history: History, start: int, stop: int) -> History:
    """Places start..stop - 1 of each history."""
    cut = {name: getattr(history, name)[:, start:stop] for name in _FIELDS}
    return History(**cut, lengths_B=(history.lengths_B - start).clamp(0, stop - start))
