"""The files Feast reads, computed from the tables by DuckDB or Spark: sorted out of core, so that a log larger than memory works.

One row per (key, available_at) with the counts of everything available up to and including that moment; its `timestamp` is one
microsecond later, so that a label at that very moment does not see it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from features.definitions import CLOCK, CREATED, ENTITY_OF, HISTORY_ARRAYS, ITEM_VIEW, TIMESTAMP, USER_VIEW
from longtrail.blocks import blocks
from longtrail.files import atomic_file
from longtrail.history import HistoryStore

# view → column → (table, what a row of that table adds to the count)
COUNTS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    CLOCK: {"history_length": ("interactions", "1")},
    USER_VIEW: {"user_impressions": ("impressions", "1"), "user_clicks": ("impressions", "click")},
    ITEM_VIEW: {"item_events": ("interactions", "1"), "item_impressions": ("impressions", "1"), "item_clicks": ("impressions", "click")},
}
_USERS_A_WRITE = 4_096
_ROWS = 1 << 20  # of the log in memory at once
_ROW_GROUP = 1 << 17  # rows

Moments = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]  # keys [n], times [n] (µs), counts [K, n]


def literal(path: Path) -> str:
    """`path` as an SQL string."""
    return "'" + str(path).replace("'", "''") + "'"


def changes(engine: Any, view: str, tables: Path) -> Any:
    """What each row of the log adds to the counts of `view`, an Ibis table by key and time: the key, `time` (µs) and the counts (int8).

    `engine` is a `longtrail.engines.Engine`.
    """
    import ibis

    from longtrail.engines.functions import microseconds_of

    key, counts = ENTITY_OF[view], COUNTS[view]
    parts = []
    for table in sorted({table for table, _ in counts.values()}):
        rows = engine.parquet(tables / f"{table}.parquet")
        terms = {name: term if source == table else "0" for name, (source, term) in counts.items()}
        added = {name: ibis.literal(int(term), "int8") if term.isdigit() else rows[term].cast("int8") for name, term in terms.items()}
        parts.append(rows.select(key, time=microseconds_of(rows.available_at), **added))
    return (ibis.union(*parts) if len(parts) > 1 else parts[0]).order_by(key, "time")


def write_cumulative(engine: Any, view: str, tables: Path, out: Path) -> None:
    """Write the source of `view` (user_clock, user_statistics or item_statistics): its key, `timestamp`, `created` and its counts, by key and time.

    The engine only sorts; what is summed passes through here in blocks.
    """
    key, names = ENTITY_OF[view], list(COUNTS[view])
    stamp = pa.timestamp("us", tz="UTC")
    schema = pa.schema([(key, pa.int64()), (TIMESTAMP, stamp), (CREATED, stamp), *((name, pa.int64()) for name in names)])
    batches = blocks(engine.stream(changes(engine, view, tables), _ROWS), _ROWS)
    differences = {"use_dictionary": False, "column_encoding": dict.fromkeys(schema.names, "DELTA_BINARY_PACKED")}  # small where rows are in order
    with atomic_file(out) as aside, pq.ParquetWriter(aside, schema, compression="zstd", **differences) as writer:
        for keys_n, times_n, totals_Kn in _running((_arrays(batch, key, names) for batch in batches), len(names)):
            created = pa.array(times_n, stamp)
            columns = [pa.array(keys_n), pa.array(times_n + 1, stamp), created, *(pa.array(total_n) for total_n in totals_Kn)]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=_ROW_GROUP)


def _arrays(batch: pa.Table, key: str, names: list[str]) -> Moments:
    added_Kn = np.stack([batch[name].to_numpy().astype(np.int64) for name in names])
    return batch[key].to_numpy(), batch["time"].to_numpy(), added_Kn


def _running(batches: Iterator[Moments], counts: int) -> Iterator[Moments]:
    """Of rows by key and time, the sums of each key up to and including each of its moments, a row for each."""
    keys_n, times_n, totals_Kn = (np.zeros(0, dtype=np.int64),) * 2 + (np.zeros((counts, 0), dtype=np.int64),)  # the moment that may go on
    for more_n, later_n, added_Kn in batches:
        keys_n, times_n = np.concatenate([keys_n, more_n]), np.concatenate([times_n, later_n])
        totals_Kn = np.cumsum(np.concatenate([totals_Kn, added_Kn], axis=1), axis=1)
        first_n = np.flatnonzero(np.concatenate(([True], keys_n[1:] != keys_n[:-1])))  # of each key
        before_K1 = np.concatenate([np.zeros((counts, 1), dtype=np.int64), totals_Kn[:, first_n[1:] - 1]], axis=1)
        totals_Kn -= np.repeat(before_K1, np.diff(np.append(first_n, len(keys_n))), axis=1)
        ends_n = np.flatnonzero((keys_n[1:] != keys_n[:-1]) | (times_n[1:] != times_n[:-1]))
        yield keys_n[ends_n], times_n[ends_n], totals_Kn[:, ends_n]
        keys_n, times_n, totals_Kn = keys_n[-1:], times_n[-1:], totals_Kn[:, -1:]
    yield keys_n, times_n, totals_Kn


def write_histories(engine: Any, store: HistoryStore, clock: Path, length: int, out: Path) -> None:
    """Write the source of user_history: a row per user with events, the newest `length` of them as arrays, oldest first.

    `clock` is the source of user_clock: its last row of a user says when the newest event became available, and how many there are.
    """
    rows = engine.parquet(clock)
    newest = rows.group_by("user_id").agg(**{name: rows[name].max() for name in (TIMESTAMP, CREATED, "history_length")})
    last = engine.fetch(newest.order_by("user_id"))
    with atomic_file(out) as aside:
        arrays = [(name, pa.list_(pa.int64())) for name in HISTORY_ARRAYS]
        stamp = pa.timestamp("us", tz="UTC")
        schema = pa.schema([("user_id", pa.int64()), (TIMESTAMP, stamp), (CREATED, stamp), *arrays, ("history_length", pa.int64())])
        with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
            for start in range(0, last.num_rows, _USERS_A_WRITE):
                writer.write_table(_histories(last.slice(start, _USERS_A_WRITE), store, length).cast(schema))


def _histories(last: pa.Table, store: HistoryStore, length: int) -> pa.Table:
    users_B, totals_B = last["user_id"].to_numpy(), last["history_length"].to_numpy()
    flat = store.flat(users_B, totals_B, length)
    offsets = pa.array(flat.offsets_B1, pa.int32())
    lists = [pa.ListArray.from_arrays(offsets, values) for values in (flat.items, flat.actions, flat.times)]
    columns = [last["user_id"], last[TIMESTAMP], last[CREATED], *lists, last["history_length"]]
    return pa.table(columns, names=["user_id", TIMESTAMP, CREATED, *HISTORY_ARRAYS, "history_length"])
