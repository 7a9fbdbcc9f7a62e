"""Histories stored once: every event of the log in memory-mapped arrays, sorted by user and then by when it became available.

A store is a folder: `manifest.json` and one sub-folder a segment, each with `items.npy` (int32), `times.npy` (int64, UTC µs), `actions.npy`
(uint8) and `offsets.npy` (int64 [U + 2], events of user u: offsets[u]:offsets[u + 1]). It takes 13 bytes an event and 24 bytes a user,
whatever the length of the histories read from it. A segment never changes; `append` adds one, `compact` merges them, and only the
replacement of the manifest makes either visible.

B users asked for, L history, U users in the store.
"""

import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from longtrail.errors import HistoryError
from longtrail.files import atomic_directory, read_json, write_json
from longtrail.segments import Segment, concatenate_segments, write_segment
from longtrail.times import iso

FORMAT = 1
SHARDED = 2  # the format of longtrail/sharded_history.py
_OPEN_ATTEMPTS = 5  # a compaction may remove a segment between our reading of the manifest and of the segment

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class HistoryArrays:
    """The newest events of each history, oldest first, right-padded with zeros to the longest of them (at least 1 wide)."""

    items_BL: Ints
    actions_BL: Ints
    times_BL: Ints  # UTC µs
    lengths_B: Ints


@dataclass(frozen=True, kw_only=True)
class FlatHistories:
    """The events of each history one after another: history b is `offsets_B1[b]:offsets_B1[b + 1]`, oldest first."""

    items: Ints
    actions: Ints
    times: Ints
    offsets_B1: Ints


class HistoryStore:
    """The histories of all users, read from memory-mapped files. An open store keeps showing what it held when it was opened."""

    def __init__(self, path: Path, manifest: dict[str, Any], segments: Sequence[Segment]) -> None:
        """For internal use: see `open`, `build_history`."""
        self.path = path
        self.users: int = manifest["users"]
        self.actions: tuple[str, ...] = tuple(manifest["actions"])
        self.shards = 1
        self._segments = tuple(segments)
        self.events = sum(segment.events for segment in segments)

    @classmethod
    def open(cls, path: Path, *, shards: Sequence[int] | None = None) -> "HistoryStore":
        """Raises HistoryError where `path` is not a whole store.

        `shards` are those of a sharded store to open, for a worker that reads no others: 8 bytes a user of theirs are in memory. None is all.
        """
        path = Path(path)
        for attempt in range(_OPEN_ATTEMPTS):
            manifest = _read_manifest(path)
            try:
                if manifest["format"] == SHARDED:
                    from longtrail.sharded_history import ShardedHistory

                    return ShardedHistory.from_manifest(path, manifest, shards)
                if any(shard != 0 for shard in shards or ()):
                    raise HistoryError(f"{path}: shards {', '.join(map(str, shards or ()))} are asked for; expected 0: the store is not sharded")
                return cls(path, manifest, [Segment.open(path / s["name"], users=s["users"], events=s["events"]) for s in manifest["segments"]])
            except FileNotFoundError as error:
                if attempt == _OPEN_ATTEMPTS - 1:
                    raise HistoryError(f"{path}: {error.filename}: missing; expected the files its manifest lists") from None
        raise AssertionError("unreachable")

    @classmethod
    def build(cls, interactions: Path | pa.Table, out: Path, *, users: int, actions: Sequence[str], shards: int = 1) -> "HistoryStore":
        """The same as `build_history`."""
        return build_history(interactions, out, users=users, actions=actions, shards=shards)

    @property
    def segments(self) -> int:
        return len(self._segments)

    @property
    def bytes(self) -> int:
        """Bytes of the segments on disk."""
        return sum(f.stat().st_size for segment in self._segments for f in segment.path.iterdir())

    def lengths(self, users_B: NDArray[Any]) -> Ints:
        """int64 [B]: all events that the store holds of each user. Raises HistoryError for an id outside 0..U; user 0 has none."""
        users_B = self._checked_users(users_B)
        total_B = np.zeros(len(users_B), dtype=np.int64)
        for segment in self._segments:
            starts_B, ends_B = segment.bounds(users_B)
            total_B += ends_B - starts_B
        return total_B

    def gather(self, users_B: NDArray[Any], lengths_B: NDArray[Any], max_length: int) -> HistoryArrays:
        """The newest `max_length` events of the first `lengths_B` of each user: what a pointer (user, history_length) stands for.

        Raises HistoryError for an unknown user, a negative length, or one beyond what the store holds; each message names the user.
        """
        flat = self.flat(users_B, lengths_B, max_length)
        kept_B = np.diff(flat.offsets_B1)
        L = max(int(kept_B.max(initial=0)), 1)
        real_BL = np.arange(L) < kept_B[:, None]
        padded = []
        for values in (flat.items, flat.actions, flat.times):
            values_BL = np.zeros(real_BL.shape, dtype=np.int64)
            values_BL[real_BL] = values
            padded.append(values_BL)
        return HistoryArrays(items_BL=padded[0], actions_BL=padded[1], times_BL=padded[2], lengths_B=kept_B)

    def flat(self, users_B: NDArray[Any], lengths_B: NDArray[Any], max_length: int | None = None) -> FlatHistories:
        """As `gather`, without padding; `max_length` None takes the whole of each history."""
        if max_length is not None and max_length < 1:
            raise HistoryError(f"{self.path}: max_length is {max_length}; expected at least 1")
        users_B = self._checked_users(users_B)
        ends_B = self._checked_lengths(users_B, lengths_B)
        kept_B = ends_B if max_length is None else np.minimum(ends_B, max_length)
        return self._newest(users_B, ends_B, kept_B)

    def _newest(self, users_B: Ints, ends_B: Ints, kept_B: Ints) -> FlatHistories:
        """The `kept_B` events before place `ends_B` of each user, both checked."""
        offsets_B1 = np.concatenate(([0], np.cumsum(kept_B)))
        if len(self._segments) == 1:  # the usual case: one read, already in the order of the result
            segment = self._segments[0]
            from_n = _ranges(segment.bounds(users_B)[0] + ends_B - kept_B, kept_B)
            items, actions, times = (values[from_n].astype(np.int64) for values in (segment.items, segment.actions, segment.times))
        else:
            items, actions, times = (np.zeros(offsets_B1[-1], dtype=np.int64) for _ in range(3))
            before_B = np.zeros(len(users_B), dtype=np.int64)  # events of each user in the segments passed
            for segment in self._segments:
                starts_B, stops_B = segment.bounds(users_B)
                held_B = stops_B - starts_B
                low_B = np.clip(ends_B - kept_B - before_B, 0, held_B)  # the wanted range, in this segment's own places
                high_B = np.clip(ends_B - before_B, 0, held_B)
                counts_B = high_B - low_B
                from_n = _ranges(starts_B + low_B, counts_B)
                to_n = _ranges(offsets_B1[:-1] + before_B + low_B - (ends_B - kept_B), counts_B)
                items[to_n], actions[to_n], times[to_n] = segment.items[from_n], segment.actions[from_n], segment.times[from_n]
                before_B += held_B
        return FlatHistories(items=items, actions=actions, times=times, offsets_B1=offsets_B1)

    def append(self, interactions: Path | pa.Table, *, users: int | None = None, actions: Sequence[str] | None = None) -> "HistoryStore":
        """Add events as a new segment, without touching what is stored; returns the store opened anew (this object shows the old state).

        `users` and `actions` are the new vocabulary, where it grew: actions only ever grow at the end. A pointer into the store stays true
        only if nothing is put before it, so an event that sorts before one already stored of the same user (by available_at, then
        timestamp) is refused with a HistoryError that names the user: rebuild the store for such late rows.
        """
        with _lock(self.path):
            now = HistoryStore.open(self.path)
            users, actions = now._grown(users, actions)
            _remove_strays(self.path, now._segments)
            name = _segment_name()
            folder = self.path / name
            folder.mkdir()
            try:
                segment = write_segment(interactions, folder, users=users, actions=actions)
                _check_follows(now._segments, segment)
                segments = (*now._segments, segment) if segment.events else now._segments
                _write_manifest(self.path, users, actions, segments)
                if not segment.events:
                    shutil.rmtree(folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return HistoryStore.open(self.path)

    def compact(self) -> "HistoryStore":
        """Merge all segments into one; every pointer stays true. Returns the store opened anew; stores already open keep working."""
        with _lock(self.path):
            now = HistoryStore.open(self.path)
            if len(now._segments) == 1:
                return now
            folder = self.path / _segment_name()
            folder.mkdir()
            try:
                segment = concatenate_segments(now._segments, folder, users=now.users)
                _write_manifest(self.path, now.users, now.actions, (segment,))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            _remove_strays(self.path, (segment,))
            return HistoryStore.open(self.path)

    def _grown(self, users: int | None, actions: Sequence[str] | None) -> tuple[int, tuple[str, ...]]:
        """The vocabulary after an append. Raises HistoryError where it is not this one's, or this one's and more."""
        users = self.users if users is None else users
        actions = self.actions if actions is None else tuple(actions)
        if users < self.users:
            raise HistoryError(f"{self.path}: users is {users}; expected at least the {self.users} of the store")
        if actions[: len(self.actions)] != self.actions:
            raise HistoryError(f"{self.path}: actions are {', '.join(actions)}; expected a list that begins with {', '.join(self.actions)}")
        return users, actions

    def _checked_users(self, users_B: NDArray[Any]) -> Ints:
        users_B = np.asarray(users_B, dtype=np.int64)
        unknown_B = (users_B < 0) | (users_B > self.users)
        if unknown_B.any():
            raise HistoryError(f"{self.path}: user_id {users_B[unknown_B][0]} is unknown; expected 0 (nobody) to {self.users}")
        return users_B

    def _checked_lengths(self, users_B: Ints, lengths_B: NDArray[Any]) -> Ints:
        lengths_B = np.asarray(lengths_B, dtype=np.int64)
        if lengths_B.shape != users_B.shape:
            raise HistoryError(f"{self.path}: {len(lengths_B)} lengths for {len(users_B)} users; expected one each")
        stored_B = self.lengths(users_B)
        wrong_B = (lengths_B < 0) | (lengths_B > stored_B)
        if wrong_B.any():
            user, length, stored = users_B[wrong_B][0], lengths_B[wrong_B][0], stored_B[wrong_B][0]
            raise HistoryError(f"{self.path}: history_length {length} of user_id {user}; expected 0 to {stored}, the events stored")
        return lengths_B


def build_history(interactions: Path | pa.Table, out: Path, *, users: int, actions: Sequence[str], shards: int = 1) -> HistoryStore:
    """Write the store of an interactions table (its Parquet file, or the table) to the folder `out`, which appears whole or not at all.

    Within a user, events are ordered by (available_at, timestamp, row), so that what was available at any moment is a prefix. Action id =
    index in `actions` + 1. Memory: a batch of rows, 8 bytes a user, and the store's own mapped files. Raises HistoryError that names file,
    row and field for a null, an id outside its range or an action not in `actions`.

    With more `shards` than 1 the store is in that many parts, built one after another (longtrail/sharded_history.py): of the users and mapped files,
    only those of one shard are in memory at a time.
    """
    out = Path(out)
    if shards > 1:
        from longtrail.sharded_history import build_sharded

        return build_sharded(interactions, out, users=users, actions=tuple(actions), shards=shards)
    with atomic_directory(out) as aside:
        folder = aside / _segment_name()
        folder.mkdir()
        segment = write_segment(interactions, folder, users=users, actions=tuple(actions))
        _write_manifest(aside, users, actions, (segment,))
    return HistoryStore.open(out)


def _ranges(starts_B: Ints, counts_B: Ints) -> Ints:
    """starts_B[0], starts_B[0] + 1, … (counts_B[0] of them), then the same for the next: [sum of counts]."""
    ends_B = np.cumsum(counts_B)
    return np.repeat(starts_B - ends_B + counts_B, counts_B) + np.arange(ends_B[-1] if len(ends_B) else 0)


def _check_follows(stored: Sequence[Segment], added: Segment, *, of: Callable[[int], int] = int) -> None:
    """Every user's first added event must not sort before their last stored one. `of` gives the id of a user that a segment knows by number."""
    for segment in stored:
        shared = min(segment.users, added.users)
        has_U = (segment.counts[: shared + 1] > 0) & (added.counts[: shared + 1] > 0)
        users_n = np.flatnonzero(has_U)
        last, first = segment.last(users_n), added.first(users_n)
        early_n = (first[0] < last[0]) | ((first[0] == last[0]) & (first[1] < last[1]))
        if early_n.any():
            place = int(np.flatnonzero(early_n)[0])
            raise HistoryError(
                f"user_id {of(int(users_n[place]))}: an event available at {iso(first[0][place])} would stand before a stored one, available at "
                f"{iso(last[0][place])}; expected appended events to be the newest. Rebuild the store for late rows"
            )


def _segment_name() -> str:
    return f"segment-{uuid4().hex[:12]}"


def _remove_strays(path: Path, segments: Sequence[Segment]) -> None:
    """Segments that no manifest lists: what a killed append left, or what a compaction replaced. Mapped files live on until they are closed."""
    kept = {segment.path.name for segment in segments}
    for folder in path.glob("segment-*"):
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _write_manifest(path: Path, users: int, actions: Sequence[str], segments: Sequence[Segment]) -> None:
    listed = [{"name": s.path.name, "users": s.users, "events": s.events} for s in segments]
    write_json(path / "manifest.json", {"format": FORMAT, "users": users, "actions": list(actions), "segments": listed})


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = read_json(path / "manifest.json")
        complete = {"format", "users", "actions", "segments"} <= manifest.keys()
    except FileNotFoundError:
        raise HistoryError(f"{path}: no manifest.json; expected a history store") from None
    except (ValueError, AttributeError):
        raise HistoryError(f"{path / 'manifest.json'}: not a manifest; rebuild the history store") from None
    if not complete or manifest["format"] not in (FORMAT, SHARDED):
        raise HistoryError(f"{path / 'manifest.json'}: format {manifest.get('format')}; expected {FORMAT}")
    return manifest


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One writer at a time; the lock goes with the process that holds it."""
    with (path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
