"""One immutable run of events of a HistoryStore: how it is sorted out of a table and how its files are read."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from longtrail.errors import HistoryError
from longtrail.schema import INTERACTIONS

ROWS = 1 << 20  # rows of the table, or events of the store, that are in memory at once
_MAX_ITEM = np.iinfo(np.int32).max
_MAX_ACTIONS = np.iinfo(np.uint8).max
_COLUMNS = ["user_id", "item_id", "timestamp", "available_at", "action"]
_TYPES = {"items": np.int32, "times": np.int64, "actions": np.uint8}
_SPLIT_SCHEMA = pa.schema({name: INTERACTIONS[name].kind.arrow for name in _COLUMNS})

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Events of users 1..`users`, sorted by (user, available_at, timestamp, row). Arrays are mapped, except offsets (8 bytes a user)."""

    path: Path
    users: int
    items: NDArray[np.int32]  # [events]
    times: Ints  # [events], UTC µs
    actions: NDArray[np.uint8]  # [events]
    offsets: Ints  # [users + 2]
    last_available: Ints  # [users + 1], available_at of each user's last event; undefined where there is none
    first_available: Ints  # [users + 1]

    @classmethod
    def open(cls, path: Path, *, users: int, events: int) -> "Segment":
        """Raises FileNotFoundError where a file is missing, HistoryError where one is damaged."""
        arrays = {name: _load(path / f"{name}.npy", dtype, events) for name, dtype in _TYPES.items()}
        offsets = np.array(_load(path / "offsets.npy", np.int64, users + 2))
        if offsets[0] != 0 or offsets[-1] != events or (np.diff(offsets) < 0).any():
            raise HistoryError(f"{path / 'offsets.npy'}: damaged; expected offsets that rise from 0 to {events}")
        last, first = (_load(path / f"{name}_available.npy", np.int64, users + 1) for name in ("last", "first"))
        return cls(path=path, users=users, offsets=offsets, last_available=last, first_available=first, **arrays)  # type: ignore[arg-type]

    @property
    def events(self) -> int:
        return len(self.items)

    @property
    def counts(self) -> Ints:
        """int64 [users + 1]: events of each user."""
        return np.diff(self.offsets)

    def bounds(self, users_B: Ints) -> tuple[Ints, Ints]:
        """Where the events of each user start and stop; an empty range for a user who came after this segment was written."""
        starts_B = self.offsets[np.minimum(users_B, self.users + 1)]
        return starts_B, self.offsets[np.minimum(users_B + 1, self.users + 1)]

    def first(self, users_n: Ints) -> tuple[Ints, Ints]:
        """(available_at, timestamp) of the first event of each of `users_n`, who must have one."""
        return self.first_available[users_n], self.times[self.offsets[users_n]]

    def last(self, users_n: Ints) -> tuple[Ints, Ints]:
        """(available_at, timestamp) of the last event of each of `users_n`, who must have one."""
        return self.last_available[users_n], self.times[self.offsets[users_n + 1] - 1]


def write_segment(interactions: Path | pa.Table, folder: Path, *, users: int, actions: Sequence[str]) -> Segment:
    """Sort an interactions table into the empty `folder`: a counting sort by user in two passes over the table, then by time within users."""
    if len(actions) > _MAX_ACTIONS or len(set(actions)) != len(actions):
        raise HistoryError(f"{len(actions)} actions; expected at most {_MAX_ACTIONS}, each once")
    counts = np.zeros(users + 2, dtype=np.int64)  # shifted by one, so that its running sum is the offsets
    for row, batch in _batches(interactions, ["user_id"], "counting events"):
        counts[1:] += np.bincount(_ids(interactions, batch, "user_id", row, users), minlength=users + 1)
    offsets = np.cumsum(counts)
    events = int(offsets[-1])
    arrays = {name: _create(folder / f"{name}.npy", dtype, events) for name, dtype in _TYPES.items()}
    available = _create(folder / "available.npy", np.int64, events)
    cursor = offsets[:-1].copy()  # where the next event of each user goes
    for row, batch in _batches(interactions, _COLUMNS, "sorting events"):
        user_n = _ids(interactions, batch, "user_id", row, users)
        place_n = _places(user_n, cursor)
        arrays["items"][place_n] = _ids(interactions, batch, "item_id", row, _MAX_ITEM)
        arrays["times"][place_n] = _times(interactions, batch, "timestamp", row)
        arrays["actions"][place_n] = _action_ids(interactions, batch, row, actions)
        available[place_n] = _times(interactions, batch, "available_at", row)
    _sort_within_users(offsets, available, arrays)
    has = np.diff(offsets) > 0
    first, last = np.zeros(users + 1, dtype=np.int64), np.zeros(users + 1, dtype=np.int64)
    first[has], last[has] = available[offsets[:-1][has]], available[offsets[1:][has] - 1]
    del available
    (folder / "available.npy").unlink()
    return _finish(folder, users, arrays, offsets, first, last)


def split_by_shard(interactions: Path | pa.Table, folder: Path, *, users: int, actions: Sequence[str], shards: int) -> list[Path]:
    """The rows of each shard, in their order, as an interactions table of its own in `folder`; users by their number in their shard.

    User u is number (u - 1) div `shards` + 1 of shard (u - 1) mod `shards`. Every row is checked, so that errors name the row of the whole table.
    """
    parts = [folder / f"{shard:04d}.parquet" for shard in range(shards)]
    with ExitStack() as open_files:
        writers = [open_files.enter_context(pq.ParquetWriter(part, _SPLIT_SCHEMA)) for part in parts]
        for row, batch in _batches(interactions, _COLUMNS, "setting shards apart"):
            user_n = _ids(interactions, batch, "user_id", row, users)
            _ids(interactions, batch, "item_id", row, _MAX_ITEM)
            _action_ids(interactions, batch, row, actions)
            times = {name: _no_nulls(interactions, batch, name, row) for name in ("timestamp", "available_at")}
            shard_n = (user_n - 1) % shards
            columns = {"user_id": pa.array((user_n - 1) // shards + 1), "item_id": batch["item_id"], **times, "action": batch["action"]}
            whole = pa.table(columns).cast(_SPLIT_SCHEMA)
            order = np.argsort(shard_n, kind="stable")
            edges = np.searchsorted(shard_n[order], np.arange(shards + 1))
            sorted_rows = whole.take(pa.array(order))
            for shard, writer in enumerate(writers):
                if edges[shard] < edges[shard + 1]:
                    writer.write_table(sorted_rows.slice(edges[shard], edges[shard + 1] - edges[shard]))
    return parts


def concatenate_segments(segments: Sequence[Segment], folder: Path, *, users: int) -> Segment:
    """Write one segment that holds, for each user, the events of each of `segments` in turn."""
    counts_SU = np.zeros((len(segments), users + 1), dtype=np.int64)
    first, last = np.zeros(users + 1, dtype=np.int64), np.zeros(users + 1, dtype=np.int64)
    seen = np.zeros(users + 1, dtype=bool)
    for counts_U, segment in zip(counts_SU, segments, strict=True):
        known = segment.users + 1
        counts_U[:known] = segment.counts
        has = counts_U > 0
        last[has] = segment.last_available[has[:known]]
        first[has & ~seen] = segment.first_available[(has & ~seen)[:known]]
        seen |= has
    offsets = np.concatenate(([0], np.cumsum(counts_SU.sum(axis=0))))
    arrays = {name: _create(folder / f"{name}.npy", dtype, int(offsets[-1])) for name, dtype in _TYPES.items()}
    starts_SU = offsets[:-1] + np.cumsum(counts_SU, axis=0) - counts_SU
    for starts_U, segment in zip(starts_SU, segments, strict=True):
        shift_U = starts_U[: segment.users + 1] - segment.offsets[:-1]
        for low in range(0, segment.events, ROWS):
            high = min(low + ROWS, segment.events)
            user_n = np.searchsorted(segment.offsets, np.arange(low, high), side="right") - 1
            to_n = np.arange(low, high) + shift_U[user_n]
            for name, values in arrays.items():
                values[to_n] = getattr(segment, name)[low:high]
    return _finish(folder, users, arrays, offsets, first, last)


def _finish(folder: Path, users: int, arrays: dict[str, NDArray[Any]], offsets: Ints, first: Ints, last: Ints) -> Segment:
    events = int(offsets[-1])
    for values in arrays.values():
        if isinstance(values, np.memmap):
            values.flush()
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "first_available.npy", first)
    np.save(folder / "last_available.npy", last)
    return Segment.open(folder, users=users, events=events)


def _places(user_n: Ints, cursor: Ints) -> Ints:
    """Where each row of a batch goes: behind the rows of its user that came before. Moves `cursor` on."""
    order = np.argsort(user_n, kind="stable")
    sorted_n = user_n[order]
    starts = np.flatnonzero(np.concatenate(([True], sorted_n[1:] != sorted_n[:-1]))) if len(sorted_n) else np.zeros(0, dtype=np.int64)
    sizes = np.diff(np.concatenate((starts, [len(sorted_n)])))
    place_n = np.empty(len(user_n), dtype=np.int64)
    place_n[order] = cursor[sorted_n] + np.arange(len(sorted_n)) - np.repeat(starts, sizes)
    cursor[sorted_n[starts]] += sizes
    return place_n


def _sort_within_users(offsets: Ints, available: Ints, arrays: dict[str, NDArray[Any]]) -> None:
    """Order each user's events by (available_at, timestamp), ties as they stand. About ROWS events at a time, whole users always."""
    cuts = np.unique(np.searchsorted(offsets, np.arange(0, offsets[-1] + ROWS, ROWS), side="left").clip(max=len(offsets) - 1))
    edges = np.unique(np.concatenate(([0], offsets[cuts], offsets[-1:])))
    for low, high in pairwise(edges.tolist()):
        user_n = np.searchsorted(offsets, np.arange(low, high), side="right")
        available_n, time_n = np.asarray(available[low:high]), np.asarray(arrays["times"][low:high])
        same = user_n[1:] == user_n[:-1]
        after = (available_n[1:] > available_n[:-1]) | ((available_n[1:] == available_n[:-1]) & (time_n[1:] >= time_n[:-1]))
        if (after | ~same).all():
            continue  # logs are mostly written in order
        order = np.lexsort((time_n, available_n, user_n))
        for values in (available, *arrays.values()):
            values[low:high] = values[low:high][order]


def _batches(interactions: Path | pa.Table, columns: list[str], what: str) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(rows before it, batch) over a Parquet file or a table, with progress on a terminal."""
    if isinstance(interactions, pa.Table):
        batches, total, names = interactions.select(_present(interactions, columns)).to_batches(max_chunksize=ROWS), len(interactions), None
    else:
        file = _parquet(interactions)
        names = _present(file.schema_arrow, columns, interactions)
        batches, total = file.iter_batches(batch_size=ROWS, columns=names), file.metadata.num_rows
    row = 0
    with tqdm(total=total, desc=f"history: {what}", unit=" rows", unit_scale=True, disable=None if total > ROWS else True, leave=False) as progress:
        for batch in batches:
            yield row, batch
            row += len(batch)
            progress.update(len(batch))


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, read_dictionary=["action"])
    except FileNotFoundError:
        raise HistoryError(f"{path}: no such file; expected an interactions table") from None
    except pa.ArrowInvalid as error:
        raise HistoryError(f"{path}: not a Parquet file: {error}") from None


def _present(table: pa.Table | pa.Schema, columns: list[str], source: Path | None = None) -> list[str]:
    names = table.names if isinstance(table, pa.Schema) else table.column_names
    for column in columns:
        if column not in names:
            raise HistoryError(f"{source or 'table'}: no column {column}; expected the interactions table's")
    return columns


def _ids(source: Path | pa.Table, batch: pa.RecordBatch, name: str, row: int, maximum: int) -> Ints:
    values = _no_nulls(source, batch, name, row).to_numpy(zero_copy_only=False)
    bad = (values < 1) | (values > maximum)
    if bad.any():
        place = int(np.flatnonzero(bad)[0])
        raise HistoryError(f"{_name(source)}: row {row + place + 1}: {name} is {values[place]}; expected 1 to {maximum}")
    return values


def _times(source: Path | pa.Table, batch: pa.RecordBatch, name: str, row: int) -> Ints:
    return _no_nulls(source, batch, name, row).cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()


def _action_ids(source: Path | pa.Table, batch: pa.RecordBatch, row: int, actions: Sequence[str]) -> NDArray[np.uint8]:
    column = _no_nulls(source, batch, "action", row)
    encoded = column if isinstance(column, pa.DictionaryArray) else column.dictionary_encode()
    known = {action: index + 1 for index, action in enumerate(actions)}
    ids = np.array([known.get(name, 0) for name in encoded.dictionary.to_pylist()], dtype=np.uint8)
    codes = encoded.indices.to_numpy()
    action_n = ids[codes] if len(ids) else np.zeros(0, dtype=np.uint8)
    if (action_n == 0).any():
        place = int(np.flatnonzero(action_n == 0)[0])
        raise HistoryError(f"{_name(source)}: row {row + place + 1}: action is {column[place].as_py()!r}; expected one of {', '.join(actions)}")
    return action_n


def _no_nulls(source: Path | pa.Table, batch: pa.RecordBatch, name: str, row: int) -> Any:
    column = batch.column(name)
    if column.null_count:
        place = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise HistoryError(f"{_name(source)}: row {row + place + 1}: {name} is missing")
    return column


def _name(source: Path | pa.Table) -> str:
    return "table" if isinstance(source, pa.Table) else str(source)


def _create(path: Path, dtype: Any, events: int) -> NDArray[Any]:
    if events == 0:  # an empty file cannot be mapped
        np.save(path, np.zeros(0, dtype=dtype))
        return np.zeros(0, dtype=dtype)
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(events,))


def _load(path: Path, dtype: Any, expected: int) -> NDArray[Any]:
    """The array in a file, mapped; a plain view, because numpy's memmap class makes each small operation slower."""
    try:
        values = np.load(path, mmap_mode="r" if expected else None, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (ValueError, OSError, EOFError) as error:
        raise HistoryError(f"{path}: damaged: {error}") from None
    if values.dtype != dtype or values.shape != (expected,):
        raise HistoryError(f"{path}: {values.dtype} of shape {values.shape}; expected {np.dtype(dtype)} of {expected} values")
    return np.asarray(values)
