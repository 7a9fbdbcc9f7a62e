"""What IFA keeps of each user, (A, z), beside the histories of the online store: made once, brought up to date by each event, read by each request.

B users, L history, M new events, S numbers of a state.

A state follows from the first n events of a user in the order they arrived, and n is kept with it. So whoever looks can tell what is missing: the n
of the state against the history_length of the store. Events, requests and the rebuild in the background all do the same thing: bring the state
they read up to the n they know, and write it where nobody was faster (features.kept). No lock is held and no event can count twice, in
whatever order threads and processes come. Sums are kept in float64: a million updates leave no more than one pass in float32 does.

A state stands for a history where it is what the ranker was trained to read: where the user has no more events than its max_history. Longer
histories are read, their newest max_history events, as in training. Only where the store keeps fewer than that (features.online_history_length)
does the state stand for them too, for then it is the fuller of the two.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from features.kept import Kept, KeptStore, Write
from longtrail.catalogue import Catalogue
from longtrail.errors import LongtrailError, StateError
from longtrail.examples import history_tensors
from longtrail.history import HistoryArrays
from longtrail.models import embedding
from longtrail.models.attention.user_state import UserState
from longtrail.models.rankers.ifa import IFA
from longtrail.models.store import LoadedModel
from serving.guard import Guarded
from serving.packed_states import PackedStates

Ints = NDArray[np.int64]
Note = Callable[[str], None]

_CELLS = 1 << 16  # events of one step of the rebuild, padding counted
_HEALED = 64  # users whose states one batch of events makes anew; the others wait until they are read
_TRIES = 3  # of an update that other writers overtook
_REST = 3.0  # times as long as it worked does the rebuild rest: a quarter of one core
_AGAIN = 30.0  # s
_FORGET_HOURS = 24.0  # after which states of weights that nobody serves are removed; our choice

logger = logging.getLogger("longtrail.user_states")


class Histories(Protocol):
    """What is read of the online store."""

    length: int  # events it keeps of a user

    def read(self, user_ids: Sequence[int] | Ints, max_length: int, /) -> "HistoryRead": ...


class HistoryRead(Protocol):
    @property
    def history(self) -> HistoryArrays: ...

    @property
    def totals_B(self) -> Ints: ...  # noqa: N802


class Keeping(Protocol):
    """A scorer (serving.scoring)."""

    model: LoadedModel
    states: "UserStates | None"


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A user whose state is brought from `start` (None: no events), which was read as `before`, to `events`, by their newest `count`."""

    user: int
    before: int | None
    start: NDArray[np.float64] | None
    count: int
    events: int


class UserStates:
    """The states of one IFA. Thread-safe; several processes may share the store."""

    def __init__(
        self, model: LoadedModel, catalogue: Catalogue, store: KeptStore, histories: Histories, *, packed: PackedStates | None = None
    ) -> None:
        """`store` is the namespace of the model's version; `packed`, of the same version, holds states of histories longer than the store keeps."""
        ranker = model.module
        assert isinstance(ranker, IFA) and ranker.attention is not None
        self._ranker, self._attention, self._catalogue = ranker, ranker.attention, catalogue
        self._store, self._histories, self._packed = store, histories, packed
        max_history = ranker.settings.max_history
        self.limit = max_history if max_history <= histories.length else 1 << 62  # events of the longest history that a state stands for
        # newest events that a request reads: for the exact branch and the head, and what a state may lack without another look-up
        self.recent = max(ranker.settings.recent_events, embedding.RECENT_EVENTS)
        self.note: Note = lambda outcome: None
        with torch.inference_mode():
            self._rates = self._attention.rates()
            shape = self._attention.shape
            self._size = len(UserState.from_flat(torch.zeros(1, _size(shape)), **shape, rates_G=None).flat()[0])

    # ------------------------------------------------------------ requests

    def read(self, user: int) -> Kept | None:
        """What is kept of a user, to be read *before* the history: then the history cannot be the older of the two. None where the store fails."""
        try:
            return self._store.read([user])[0]
        except LongtrailError as error:
            self._failed("read", error)
            return None

    def state(self, user: int, kept: Kept | None, read: HistoryRead) -> UserState | None:
        """The state of all events of `read`, of this one user; brought up to date and stored where it was behind. None: score by the history."""
        total, stored = int(read.totals_B[0]), int(read.history.lengths_B[0])
        if total == 0 or total > self.limit:
            self._drop(user, kept)
            return None
        step = self._step(user, kept, total, stored)
        if step is None:
            return None
        try:
            if step.count == 0:
                return self._states([step])
            flat_1S = self._advanced([step], _newest(read.history, [step.count]))
            self._write([step], flat_1S, "rebuilt" if step.start is None else "caught_up")
            return self._from_flat(flat_1S)
        except StateError as error:
            self._failed("read", error)
            return None

    def _drop(self, user: int, kept: Kept | None) -> None:
        """A history that has outgrown its state, or was taken back."""
        if kept is None:
            return
        try:
            self._store.remove([user])
        except LongtrailError as error:
            self._failed("remove", error)

    # ------------------------------------------------------------ events

    def on_events(self, users_n: Ints, items_n: Ints, actions_n: Ints, times_n: Ints, places_n: Ints) -> None:
        """Add events that the histories have already; `places` are the history_length right after each, 0 where the history had it before.

        A state that is not there yet is left to the rebuild and to the first request; one that lacks other events too is made from the history.
        O(D · G · F) an event. Never raises a LongtrailError: what fails here is made up for when the user is next read.
        """
        real_n = np.flatnonzero(places_n > 0)
        order_n = real_n[np.lexsort((places_n[real_n], users_n[real_n]))]
        users_B, starts_B, counts_B = np.unique(users_n[order_n], return_index=True, return_counts=True)
        if not len(users_B):
            return
        events = _gathered(starts_B, counts_B, items_n[order_n], actions_n[order_n], times_n[order_n])
        first_B, last_B = places_n[order_n][starts_B], places_n[order_n][starts_B + counts_B - 1]
        try:
            self._add(users_B, first_B, last_B, events)
        except LongtrailError as error:
            self._failed("update", error)

    def _add(self, users_B: Ints, first_B: Ints, last_B: Ints, events: HistoryArrays) -> None:
        rows_b, behind = np.arange(len(users_B)), []
        for _ in range(_TRIES):
            steps, places = [], []
            for b, kept in zip(rows_b.tolist(), self._store.read(users_B[rows_b].tolist()), strict=True):
                has, first, last = 0 if kept is None else kept.events, int(first_B[b]), int(last_B[b])
                if has >= last or last > self.limit or (kept is None and first > 1):
                    continue
                start = None if kept is None else self._numbers(kept)
                if has < first - 1 or last - first >= events.lengths_B[b] or (kept is not None and start is None):
                    behind.append(int(users_B[b]))
                    continue
                before = None if kept is None else has
                steps.append(_Step(user=int(users_B[b]), before=before, start=start, count=last - has, events=last))
                places.append(b)
            if not steps:
                break
            flat_BS = self._advanced(steps, _newest(_rows(events, places), [step.count for step in steps]))
            written = self._write(steps, flat_BS, "updated")
            rows_b = np.array([b for b, done in zip(places, written, strict=True) if not done], dtype=np.int64)
            if not len(rows_b):
                break
        self.refresh(behind[:_HEALED])

    # ------------------------------------------------------------ rebuild

    def rebuild(self, users: Iterable[int], stop: threading.Event) -> int:
        """Bring the states of `users` up to date, slowly, until `stop`; returns how many were written. Raises LongtrailError if the store fails."""
        size, written, left = max(1, _CELLS // max(1, self._histories.length)), 0, iter(users)
        for part in _parts(left, size):
            started = time.perf_counter()
            written += self.refresh(part)
            if stop.wait(_REST * (time.perf_counter() - started)):
                return written
        forgotten = self._store.forget_others([], hours=_FORGET_HOURS)
        logger.info("user states: %d made anew; removed those of weights no longer served: %s", written, ", ".join(forgotten) or "none")
        return written

    def refresh(self, users: Sequence[int]) -> int:
        """Bring the states of a few users up to what the histories have. Returns how many were written."""
        if not users:
            return 0
        kept_B = self._store.read(users)  # before the histories
        totals_B = self._histories.read(users, 0).totals_B
        stale = [b for b, kept in enumerate(kept_B) if not self._is_current(kept, int(totals_B[b]))]
        if not stale:
            return 0
        read = self._histories.read([users[b] for b in stale], self._histories.length)
        steps, rows, gone = [], [], []
        for row, b in enumerate(stale):
            total, stored = int(read.totals_B[row]), int(read.history.lengths_B[row])
            if not 0 < total <= self.limit:
                gone.append(users[b])
            elif (step := self._step(users[b], kept_B[b], total, stored, every=True)) is not None:
                steps.append(step)
                rows.append(row)
        self._store.remove(gone)
        if not steps:
            return 0
        flat_BS = self._advanced(steps, _newest(_rows(read.history, rows), [step.count for step in steps]))
        return sum(self._write(steps, flat_BS, "rebuilt"))

    def _is_current(self, kept: Kept | None, total: int) -> bool:
        if not 0 < total <= self.limit:
            return kept is None
        return kept is not None and kept.events == total and self._numbers(kept) is not None

    # ------------------------------------------------------------ steps

    def _step(self, user: int, kept: Kept | None, total: int, read: int, *, every: bool = False) -> _Step | None:
        """From what is kept (or packed, or nothing) to `total` events by the newest of the `read` ones. None where those are too few.

        `every`: all that is stored was read, so that nothing more can be had: a state of those is the best there is.
        """
        before = None if kept is None else kept.events
        starts: list[tuple[int, NDArray[np.float64] | None]] = [] if kept is None else [(kept.events, self._numbers(kept))]
        if total > self._histories.length and self._packed is not None:
            starts += self._packed.of(user)
        for events, numbers in starts:
            if numbers is not None and 0 <= total - events <= read:
                return _Step(user=user, before=before, start=numbers, count=total - events, events=total)
        if read >= min(total, self._histories.length) or every:
            return _Step(user=user, before=before, start=None, count=read, events=total)
        return None

    def _advanced(self, steps: Sequence[_Step], events: HistoryArrays) -> torch.Tensor:
        """float64 [B, S]: the states of `steps` after `events`, which are each user's newest."""
        with torch.inference_mode():
            return self._states(steps, torch.float64).merge(self._ranker.state(history_tensors(events, self._catalogue))).flat(torch.float64)

    def _states(self, steps: Sequence[_Step], dtype: torch.dtype = torch.float32) -> UserState:
        flat_BS = torch.zeros(len(steps), self._size, dtype=torch.float64)
        for b, step in enumerate(steps):
            if step.start is not None:
                flat_BS[b] = torch.from_numpy(step.start)
        return self._from_flat(flat_BS, dtype)

    def _from_flat(self, flat_BS: torch.Tensor, dtype: torch.dtype = torch.float32) -> UserState:
        return UserState.from_flat(flat_BS.to(dtype), **self._attention.shape, rates_G=self._rates)

    def _numbers(self, kept: Kept) -> NDArray[np.float64] | None:
        """None for what is no state of this model: it is made again."""
        if len(kept.content) != 8 * self._size:
            return None
        numbers_S = np.frombuffer(kept.content, "<f8").astype(np.float64)
        return numbers_S if np.isfinite(numbers_S).all() else None

    def _write(self, steps: Sequence[_Step], flat_BS: torch.Tensor, outcome: str) -> list[bool]:
        rows = [
            Write(step.user, step.before, Kept(step.events, numbers_S.tobytes()))
            for step, numbers_S in zip(steps, flat_BS.numpy().astype("<f8"), strict=True)
        ]
        try:
            written = self._store.write(rows)
        except LongtrailError as error:
            self._failed("write", error)
            return [True] * len(rows)  # not again now
        for done in written:
            self.note(outcome if done else "overtaken")
        return written

    def _failed(self, what: str, error: Exception) -> None:
        self.note("failed")
        logger.warning("user states: %s: %s", what, error)


def attach_states(scorers: Iterable["Keeping"], catalogue: Catalogue, online: Any, artifacts: Path) -> list[UserStates]:
    """Give each scorer whose ranker keeps something of users its states over the histories of `online`; equal weights share.

    `online` is an OnlineFeatures, or one that is Guarded. Returns the states, to hear of events (`on_events`) and to be rebuilt (`Rebuild`).
    Raises FeatureStoreError, ModelError.
    """
    attached: dict[str, UserStates] = {}
    plain = online.plain if isinstance(online, Guarded) else online
    for scorer in scorers:
        ranker = scorer.model.module
        if isinstance(ranker, IFA) and ranker.attention is not None:
            version = ranker.version()
            if version not in attached:
                attached[version] = UserStates(scorer.model, catalogue, plain.kept(version), plain, packed=PackedStates.find(artifacts, version))
            scorer.states = attached[version]
    return list(attached.values())


class Rebuild:
    """Makes missing states in a thread of its own, at a quarter of one core, while requests make those they need."""

    def __init__(self, states: Sequence[UserStates], users: Callable[[], Iterable[int]]) -> None:
        """`users` gives the dense ids of all users."""
        self._states, self._users = states, users
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="user-states", daemon=True)

    def start(self) -> None:
        if self._states:
            self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def _run(self) -> None:
        for states in self._states:
            while not self._stop.is_set():
                try:
                    states.rebuild(self._users(), self._stop)
                    break
                except LongtrailError as error:
                    logger.warning("user states: rebuild stopped, goes on in %g s; requests make what they need: %s", _AGAIN, error)
                    self._stop.wait(_AGAIN)


def _size(shape: dict[str, int]) -> int:
    return 5 + shape["heads"] * shape["features"] * (shape["values"] + 1)


def _parts(values: Iterator[int], size: int) -> Iterator[list[int]]:
    while part := list(islice(values, size)):
        yield part


def _rows(history: HistoryArrays, rows: Sequence[int]) -> HistoryArrays:
    return HistoryArrays(
        items_BL=history.items_BL[rows],
        actions_BL=history.actions_BL[rows],
        times_BL=history.times_BL[rows],
        lengths_B=history.lengths_B[rows],
    )


def _newest(history: HistoryArrays, counts: Sequence[int]) -> HistoryArrays:
    """The newest `counts[b]` events of each history, right-padded."""
    counts_B = np.asarray(counts, np.int64)
    skipped_B = history.lengths_B - counts_B
    rows_B1, width = np.arange(len(counts_B))[:, None], max(1, int(counts_B.max(initial=0)))
    columns_BM = np.minimum(skipped_B[:, None] + np.arange(width), history.items_BL.shape[1] - 1)
    real_BM = np.arange(width) < counts_B[:, None]
    items, actions, times = (np.where(real_BM, v[rows_B1, columns_BM], 0) for v in (history.items_BL, history.actions_BL, history.times_BL))
    return HistoryArrays(items_BL=items, actions_BL=actions, times_BL=times, lengths_B=counts_B)


def _gathered(starts_B: Ints, counts_B: Ints, items_n: Ints, actions_n: Ints, times_n: Ints) -> HistoryArrays:
    """Events that stand user by user, one after another, as histories."""
    real_BM = np.arange(counts_B.max()) < counts_B[:, None]
    places_BM = np.where(real_BM, starts_B[:, None] + np.arange(counts_B.max()), 0)
    items, actions, times = (np.where(real_BM, values[places_BM], 0) for values in (items_n, actions_n, times_n))
    return HistoryArrays(items_BL=items, actions_BL=actions, times_BL=times, lengths_B=counts_B.astype(np.int64))
