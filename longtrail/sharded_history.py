"""A history store in shards, for logs whose arrays do not fit the memory, or the machine, that builds or reads them.

A folder with one `manifest.json` and a folder a shard, each with segments as those of a `HistoryStore`. User u is in shard (u - 1) mod S and is
number (u - 1) div S + 1 there: ids are dense and in order of first appearance, so every shard has as many users, old and new, to within one
(our choice of hash: where a user is can be computed, and stays true when users are added). One manifest lists the segments of all shards, so an
append or a compaction is visible in all of them or in none. Building holds one shard at a time.

B users asked for, S shards.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from longtrail import history
from longtrail.errors import HistoryError
from longtrail.files import atomic_directory, write_json
from longtrail.history import FlatHistories, HistoryStore, Ints
from longtrail.segments import Segment, concatenate_segments, split_by_shard, write_segment

FORMAT = 2
_SPILL = ".spill"


class ShardedHistory(HistoryStore):
    """`HistoryStore` by another layout: the same answers to the same calls. Opened with `HistoryStore.open`, of all shards or of some."""

    def __init__(self, path: Path, manifest: dict[str, Any], held: Mapping[int, HistoryStore]) -> None:
        """For internal use: see `HistoryStore.open`, `build_history`."""
        self.path = path
        self.users = manifest["users"]
        self.actions = tuple(manifest["actions"])
        self.shards = manifest["shards"]
        self.events = sum(segment["events"] for segments in manifest["segments"] for segment in segments)
        self._held = dict(held)

    @classmethod
    def from_manifest(cls, path: Path, manifest: dict[str, Any], shards: Sequence[int] | None) -> "ShardedHistory":
        """Raises FileNotFoundError where a segment is missing, HistoryError where one is damaged, or a shard is asked for that is not there."""
        wanted = range(manifest["shards"]) if shards is None else shards
        held = {}
        for shard in wanted:
            if not 0 <= shard < manifest["shards"]:
                raise HistoryError(f"{path}: shard {shard} is asked for; expected 0 to {manifest['shards'] - 1}")
            folder = _folder(path, shard)
            listed = manifest["segments"][shard]
            segments = [Segment.open(folder / s["name"], users=s["users"], events=s["events"]) for s in listed]
            own = {"users": users_of_shard(manifest["users"], manifest["shards"], shard), "actions": manifest["actions"]}
            held[shard] = HistoryStore(folder, own, segments)
        return cls(path, manifest, held)

    @property
    def segments(self) -> int:
        """Segments of the shard that has most of them: what a read looks into."""
        return max((store.segments for store in self._held.values()), default=0)

    @property
    def bytes(self) -> int:
        return sum(store.bytes for store in self._held.values())

    def lengths(self, users_B: NDArray[Any]) -> Ints:
        users_B = self._checked_users(users_B)
        total_B = np.zeros(len(users_B), dtype=np.int64)
        for store, at_n, local_n in self._by_shard(users_B):
            total_B[at_n] = store.lengths(local_n)
        return total_B

    def _newest(self, users_B: Ints, ends_B: Ints, kept_B: Ints) -> FlatHistories:
        offsets_B1 = np.concatenate(([0], np.cumsum(kept_B)))
        items, actions, times = (np.zeros(offsets_B1[-1], dtype=np.int64) for _ in range(3))
        for store, at_n, local_n in self._by_shard(users_B):
            part = store._newest(local_n, ends_B[at_n], kept_B[at_n])
            to_n = history._ranges(offsets_B1[at_n], kept_B[at_n])
            items[to_n], actions[to_n], times[to_n] = part.items, part.actions, part.times
        return FlatHistories(items=items, actions=actions, times=times, offsets_B1=offsets_B1)

    def append(self, interactions: Path | pa.Table, *, users: int | None = None, actions: Sequence[str] | None = None) -> HistoryStore:
        with history._lock(self.path):
            now = _whole(self.path)
            users, actions = now._grown(users, actions)
            _remove_strays(now)
            name = history._segment_name()
            added: dict[int, Segment] = {}
            try:
                for shard, segment in _segments(interactions, self.path, name, users=users, actions=actions, shards=self.shards):
                    history._check_follows(now._held[shard]._segments, segment, of=partial(_user, self.shards, shard))
                    if segment.events:
                        added[shard] = segment
                    else:
                        shutil.rmtree(segment.path)
                held = {shard: (*store._segments, added[shard]) if shard in added else store._segments for shard, store in now._held.items()}
                _write_manifest(self.path, users, actions, held)
            except BaseException:
                for shard in range(self.shards):
                    shutil.rmtree(_folder(self.path, shard) / name, ignore_errors=True)
                raise
            return HistoryStore.open(self.path)

    def compact(self) -> HistoryStore:
        with history._lock(self.path):
            now = _whole(self.path)
            name = history._segment_name()
            merged: dict[int, tuple[Segment, ...]] = {}
            try:
                for shard, store in now._held.items():
                    merged[shard] = store._segments
                    if store.segments > 1:
                        folder = store.path / name
                        folder.mkdir()
                        merged[shard] = (concatenate_segments(store._segments, folder, users=store.users),)
                _write_manifest(self.path, now.users, now.actions, merged)
            except BaseException:
                for shard in range(self.shards):
                    shutil.rmtree(_folder(self.path, shard) / name, ignore_errors=True)
                raise
            after = _whole(self.path)
            _remove_strays(after)
            return after

    def _by_shard(self, users_B: Ints) -> Iterator[tuple[HistoryStore, Ints, Ints]]:
        """(store of a shard, which of `users_B` are in it, their numbers there). User 0, nobody, is in none."""
        shard_B = np.where(users_B > 0, (users_B - 1) % self.shards, -1)
        for shard in np.unique(shard_B[shard_B >= 0]).tolist():
            at_n = np.flatnonzero(shard_B == shard)
            store = self._held.get(shard)
            if store is None:
                raise HistoryError(
                    f"{self.path}: user_id {users_B[at_n[0]]} is in shard {shard}; expected one of {sorted(self._held)}, which are open"
                )
            yield store, at_n, (users_B[at_n] - 1) // self.shards + 1


def build_sharded(interactions: Path | pa.Table, out: Path, *, users: int, actions: Sequence[str], shards: int) -> HistoryStore:
    """As `build_history`, in `shards` shards: the log is read once and set apart on disk, then each shard is built from its part."""
    with atomic_directory(out) as aside:
        held = {}
        for shard, segment in _segments(interactions, aside, history._segment_name(), users=users, actions=actions, shards=shards):
            held[shard] = (segment,)
        _write_manifest(aside, users, actions, held)
    return HistoryStore.open(out)


def _user(shards: int, shard: int, local: int) -> int:
    return (local - 1) * shards + shard + 1


def users_of_shard(users: int, shards: int, shard: int) -> int:
    """How many of users 1..`users` are in `shard`."""
    return (users - shard + shards - 1) // shards


def _segments(
    interactions: Path | pa.Table, path: Path, name: str, *, users: int, actions: Sequence[str], shards: int
) -> Iterator[tuple[int, Segment]]:
    """A new segment `name` in each shard's folder below `path`, one at a time."""
    spill = path / _SPILL
    shutil.rmtree(spill, ignore_errors=True)
    spill.mkdir()
    try:
        parts = split_by_shard(interactions, spill, users=users, actions=actions, shards=shards)
        for shard, part in enumerate(parts):
            folder = _folder(path, shard) / name
            folder.mkdir(parents=True)
            yield shard, write_segment(part, folder, users=users_of_shard(users, shards, shard), actions=actions)
            part.unlink()
    finally:
        shutil.rmtree(spill, ignore_errors=True)


def _whole(path: Path) -> ShardedHistory:
    store = HistoryStore.open(path)
    assert isinstance(store, ShardedHistory)
    return store


def _folder(path: Path, shard: int) -> Path:
    return path / f"shard-{shard:04d}"


def _remove_strays(store: ShardedHistory) -> None:
    for part in store._held.values():
        history._remove_strays(part.path, part._segments)


def _write_manifest(path: Path, users: int, actions: Sequence[str], held: Mapping[int, Sequence[Segment]]) -> None:
    segments = [[{"name": s.path.name, "users": s.users, "events": s.events} for s in held[shard]] for shard in sorted(held)]
    manifest = {"format": FORMAT, "users": users, "actions": list(actions), "shards": len(held), "segments": segments}
    write_json(path / "manifest.json", manifest)
