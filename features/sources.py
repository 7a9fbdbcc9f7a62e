"""The files Feast reads, computed from the tables by DuckDB or Spark: out of core, so that a log larger than memory works.

One row per (key, available_at) with the counts of everything available up to and including that moment; its `timestamp` is one
microsecond later, so that a label at that very moment does not see it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.definitions import CLOCK, CREATED, ENTITY_OF, HISTORY_ARRAYS, ITEM_VIEW, TIMESTAMP, USER_VIEW
from longtrail.files import atomic_file
from longtrail.history import HistoryStore

# view → column → (table, what a row of that table adds to the count)
COUNTS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    CLOCK: {"history_length": ("interactions", "1")},
    USER_VIEW: {"user_impressions": ("impressions", "1"), "user_clicks": ("impressions", "click")},
    ITEM_VIEW: {"item_events": ("interactions", "1"), "item_impressions": ("impressions", "1"), "item_clicks": ("impressions", "click")},
}
_USERS_A_WRITE = 4_096


@contextmanager
def duckdb_session(memory_limit: str, threads: int, spill: Path) -> Iterator[Any]:
    """A DuckDB connection in UTC that spills to `spill` beyond `memory_limit`."""
    import duckdb

    settings: dict[str, Any] = {"memory_limit": memory_limit, "threads": threads, "temp_directory": str(spill), "preserve_insertion_order": False}
    with duckdb.connect(config=settings) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        yield connection


def literal(path: Path) -> str:
    """`path` as an SQL string."""
    return "'" + str(path).replace("'", "''") + "'"


def cumulative(engine: Any, view: str, tables: Path) -> Any:
    """The source of `view`, an Ibis table: its key, its counts up to and including each `available_at`, `timestamp` and `created`.

    `engine` is a `longtrail.engines.Engine`.
    """
    import ibis

    key, counts = ENTITY_OF[view], COUNTS[view]
    parts = []
    for table in sorted({table for table, _ in counts.values()}):
        rows = engine.parquet(tables / f"{table}.parquet")
        own = {name: rows.count() if term == "1" else rows[term].cast("int64").sum() for name, (source, term) in counts.items() if source == table}
        moved = rows.group_by(key, "available_at").agg(**own)
        parts.append(
            moved.select(key, "available_at", **{name: moved[name].cast("int64") if name in own else ibis.literal(0, "int64") for name in counts})
        )
    changes = ibis.union(*parts) if len(parts) > 1 else parts[0]
    moments = changes.group_by(key, "available_at").agg(**{name: changes[name].sum() for name in counts})
    upto = ibis.cumulative_window(group_by=key, order_by="available_at")
    running = {name: moments[name].sum().over(upto).cast("int64") for name in counts}
    later = moments.available_at + ibis.interval(microseconds=1)
    return moments.select(key, **{TIMESTAMP: later, CREATED: moments.available_at}, **running).order_by(key, TIMESTAMP)


def write_cumulative(engine: Any, view: str, tables: Path, out: Path) -> None:
    """Write the source of `view` (user_clock, user_statistics or item_statistics) as `out`."""
    with atomic_file(out) as aside:
        engine.write(cumulative(engine, view, tables), aside)


def write_histories(connection: Any, store: HistoryStore, clock: Path, length: int, out: Path) -> None:
    """Write the source of user_history: a row per user with events, the newest `length` of them as arrays, oldest first.

    `clock` is the source of user_clock: its last row of a user says when the newest event became available, and how many there are.
    """
    last = connection.sql(
        f"SELECT user_id, max({TIMESTAMP}) AS {TIMESTAMP}, max({CREATED}) AS {CREATED}, max(history_length) AS history_length "
        f"FROM read_parquet({literal(clock)}) GROUP BY user_id ORDER BY user_id"
    ).to_arrow_table()
    with atomic_file(out) as aside:
        arrays = [(name, pa.list_(pa.int64())) for name in HISTORY_ARRAYS]
        stamp = pa.timestamp("us", tz="UTC")
        schema = pa.schema([("user_id", pa.int64()), (TIMESTAMP, stamp), (CREATED, stamp), *arrays, ("history_length", pa.int64())])
        with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
            for start in range(0, last.num_rows, _USERS_A_WRITE):
                writer.write_table(_histories(last.slice(start, _USERS_A_WRITE), store, length).cast(schema))


def _histories(last: pa.Table, store: HistoryStore, length: int) -> pa.Table:
    users_B, totals_B = last["user_id"].to_numpy(), last["history_length"].to_numpy()
    arrays = store.gather(users_B, totals_B, length)
    real_BL = np.arange(arrays.items_BL.shape[1]) < arrays.lengths_B[:, None]
    offsets = pa.array(np.concatenate([[0], np.cumsum(arrays.lengths_B)]), pa.int32())
    lists = [pa.ListArray.from_arrays(offsets, values_BL[real_BL]) for values_BL in (arrays.items_BL, arrays.actions_BL, arrays.times_BL)]
    columns = [last["user_id"], last[TIMESTAMP], last[CREATED], *lists, last["history_length"]]
    return pa.table(columns, names=["user_id", TIMESTAMP, CREATED, *HISTORY_ARRAYS, "history_length"])
