"""Next items: training windows for models that predict every position, and the logged next items to be retrieved.

B requests (or windows), L history, W windows, T targets of a split.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longtrail.errors import HistoryError, NothingNewError
from longtrail.examples.buckets import Buckets, padding_share
from longtrail.examples.features import FeatureSet, column
from longtrail.examples.tensors import history_tensors
from longtrail.history import HistoryArrays
from longtrail.models.contracts import History
from longtrail.times import iso

Ints = NDArray[np.int64]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """Windows of histories: at position l the model has seen history.items_BL[b, :l + 1] and must name targets_BL[b, l]."""

    history: History  # the inputs
    targets_BL: Tensor  # int64 [B, L], the next item; 0 where there is no target: padding, and events that are context only
    first_targets_B: Tensor  # int64 [B], the user's first item where the window begins with it (a target for an empty history), else 0
    lengths_B: Tensor  # int64 [B], inputs of each window
    users_B: Tensor  # int64 [B]

    def to(self, device: torch.device | str) -> Self:
        """The batch with every tensor on `device`."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def blank(self) -> Self:
        """The batch without targets: it has no say in a loss or a gradient."""
        return replace(self, targets_BL=torch.zeros_like(self.targets_BL), first_targets_B=torch.zeros_like(self.first_targets_B))


class SequenceBatches:
    """The training period's histories cut into windows of at most `max_history` inputs, in batches of at most `batch_size` windows.

    Every event of the training period of a user who has at least two there is a target exactly once: in `targets_BL`, or, the very first of
    a user, which nothing precedes, in `first_targets_B`. Windows are cut from the newest event backwards and do not overlap. With `since`
    (UTC µs) a user's targets begin with the first event from then on; what came before it is context. The order is a pure function of (seed, epoch).
    """

    def __init__(self, features: FeatureSet, *, max_history: int, batch_size: int, seed: int | None, since: int | None = None) -> None:
        self.features, self.max_history, self.seed, self.epoch = features, max_history, seed, 0
        self.first_U = np.zeros_like(features.train_lengths) if since is None else _first_since(features, since)
        self.users_W, self.stops_W, self.inputs_W, self.counts_W = _windows(features.train_lengths, max_history, self.first_U)
        if len(self.users_W) == 0:
            of, error = ("", HistoryError) if since is None else (f" with the second at or after {iso(since)}", NothingNewError)
            raise error(f"{features.folder / 'train_lengths.npy'}: no user has two events in the training period{of}; expected some to learn from")
        self._buckets = Buckets.make(self.inputs_W, batch_size=batch_size)
        self._plan = self._buckets.batches(seed=seed, epoch=0)
        _log.info(
            "train: %d windows, %d targets, %d batches; padding %.1f%%",
            len(self.users_W), self.targets, len(self), 100 * padding_share(self.inputs_W, self._plan),
        )  # fmt: skip

    @property
    def targets(self) -> int:
        """Targets of an epoch, those for an empty history not counted."""
        return int(self.counts_W.sum())

    def padding(self) -> dict[str, float]:
        """Share of padded cells of this epoch: {"history"}."""
        return {"history": padding_share(self.inputs_W, self._plan)}

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self._plan = epoch, self._buckets.batches(seed=self.seed, epoch=epoch)

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[SequenceBatch]:
        for windows_B in self._plan:
            yield self.make(windows_B)

    def __getitem__(self, index: int) -> SequenceBatch:
        return self.make(self._plan[index])

    def piece(self, index: int, piece: int, pieces: int) -> SequenceBatch:
        """Every `pieces`-th window of the index-th batch, from the `piece`-th on; blank where there is none."""
        own_B = self._plan[index][piece::pieces]
        return self.make(own_B) if len(own_B) else self.make(self._plan[index][:1]).blank()

    def make(self, windows_B: Ints) -> SequenceBatch:
        """The batch of the given windows, in that order."""
        users_B, stops_B, inputs_B = self.users_W[windows_B], self.stops_W[windows_B], self.inputs_W[windows_B]
        events = self.features.history.gather(users_B, stops_B + 1, self.max_history + 1)  # each window's inputs and its newest target
        real_BL = np.arange(events.items_BL.shape[1] - 1) < inputs_B[:, None]
        inputs = HistoryArrays(
            items_BL=events.items_BL[:, :-1] * real_BL,
            actions_BL=events.actions_BL[:, :-1] * real_BL,
            times_BL=events.times_BL[:, :-1] * real_BL,
            lengths_B=inputs_B,
        )
        context_B = inputs_B - self.counts_W[windows_B]
        is_target_BL = real_BL & (np.arange(real_BL.shape[1]) >= context_B[:, None])
        return SequenceBatch(
            history=history_tensors(inputs, self.features.catalogue),
            targets_BL=torch.from_numpy(events.items_BL[:, 1:] * is_target_BL),
            first_targets_B=torch.from_numpy(np.where((stops_B == inputs_B) & (self.first_U[users_B] == 0), events.items_BL[:, 0], 0)),
            lengths_B=torch.from_numpy(inputs_B),
            users_B=torch.from_numpy(users_B),
        )


@dataclass(frozen=True, kw_only=True)
class TargetBatch:
    """Logged next items, each with the history before it."""

    history: History
    targets_B: Tensor  # int64 [B], the item to be retrieved
    users_B: Tensor  # int64 [B]
    times_B: Tensor  # int64 [B], UTC µs
    history_length_B: Tensor  # int64 [B], all events before the target, of which `history` holds the newest
    rows_B: Tensor  # int64 [B], row of the target in the split

    def to(self, device: torch.device | str) -> Self:
        """The batch with every tensor on `device`."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class TargetBatches:
    """The targets of a split ("valid", "test") in batches of like history lengths, in a fixed order.

    `max_per_user` keeps the first targets of each user. Raises HistoryError where the split has none.
    """

    def __init__(self, features: FeatureSet, split: str, *, max_history: int, batch_size: int, max_per_user: int | None = None) -> None:
        table = features.targets(split)
        if table.num_rows == 0:
            raise HistoryError(f"{features.folder / 'targets' / split}.parquet: no rows; expected next items to be retrieved")
        self.features, self.split, self.max_history = features, split, max_history
        columns = {name: column(table, name) for name in ("user_id", "item_id", "timestamp", "history_length")}
        self.rows_T = _first_of_each(columns["user_id"], max_per_user)
        self.users_T, self.items_T, self.times_T, self.history_length_T = (values[self.rows_T] for values in columns.values())
        lengths_T = np.minimum(self.history_length_T, max_history)
        self._plan = Buckets.make(lengths_T, batch_size=batch_size).batches(seed=None, epoch=0)
        _log.info("%s: %d targets, %d batches; padding %.1f%%", split, len(self.rows_T), len(self), 100 * padding_share(lengths_T, self._plan))

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[TargetBatch]:
        for targets_B in self._plan:
            yield self.make(targets_B)

    def __getitem__(self, index: int) -> TargetBatch:
        return self.make(self._plan[index])

    def make(self, targets_B: Ints) -> TargetBatch:
        """The batch of the given targets (indices into `rows_T`), in that order."""
        users_B, lengths_B = self.users_T[targets_B], self.history_length_T[targets_B]
        return TargetBatch(
            history=history_tensors(self.features.history.gather(users_B, lengths_B, self.max_history), self.features.catalogue),
            targets_B=torch.from_numpy(self.items_T[targets_B]),
            users_B=torch.from_numpy(users_B),
            times_B=torch.from_numpy(self.times_T[targets_B]),
            history_length_B=torch.from_numpy(lengths_B),
            rows_B=torch.from_numpy(self.rows_T[targets_B]),
        )


def seen_items(features: FeatureSet, users_B: NDArray[Any], history_length_B: NDArray[Any]) -> tuple[Ints, Ints]:
    """(offsets int64 [B + 1], items): the distinct items of each whole history, ascending: items[offsets[b]:offsets[b + 1]]."""
    flat = features.history.flat(users_B, history_length_B)
    B = len(flat.offsets_B1) - 1
    span = features.sizes.items + 1
    keys = np.unique(np.repeat(np.arange(B), np.diff(flat.offsets_B1)) * span + flat.items)
    return np.searchsorted(keys, np.arange(B + 1) * span), keys % span


def _first_since(features: FeatureSet, since: int) -> Ints:
    """int64 [U + 1]: the place in each user's training period of the first event at or after `since` (µs), its length where there is none.

    A history stands in the order in which its events could be known. One that came late may stand behind that place: it is new to a model, too.
    """
    flat = features.history.flat(np.arange(1, features.users + 1), features.train_lengths[1:])
    newer = np.flatnonzero(flat.times >= since)
    owners, first = np.unique(np.searchsorted(flat.offsets_B1, newer, side="right") - 1, return_index=True)
    places_U = np.diff(flat.offsets_B1)
    places_U[owners] = newer[first] - flat.offsets_B1[owners]
    return np.concatenate([[0], places_U])


def _windows(lengths_U: Ints, max_history: int, first_U: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """([W] users, stops, inputs, counts): window w reads the `inputs` events before place `stop`; the last `counts` of them have a target.

    With 0-based places in a user's history, input place p has the target p + 1, so the newest window stops at length - 1. Places from
    `first_U` on are targets.
    """
    first_U = np.maximum(first_U, 1)  # nothing precedes place 0
    targets_U = np.maximum(lengths_U - first_U, 0)
    targets_U[0] = 0
    windows_U = -(-targets_U // max_history)
    users_W = np.repeat(np.arange(len(lengths_U)), windows_U)
    back_W = np.arange(len(users_W)) - np.repeat(np.cumsum(windows_U) - windows_U, windows_U)  # 0 is the newest window of its user
    stops_W = lengths_U[users_W] - 1 - back_W * max_history
    oldest_W = back_W == windows_U[users_W] - 1
    return users_W, stops_W, np.minimum(stops_W, max_history), np.where(oldest_W, stops_W - first_U[users_W] + 1, max_history)


def _first_of_each(users_n: Ints, most: int | None) -> Ints:
    """Rows of `users_n`, which is sorted, that are among the first `most` of their user."""
    rows_n = np.arange(len(users_n))
    if most is None:
        return rows_n
    return rows_n[rows_n - np.searchsorted(users_n, users_n, side="left") < most]
