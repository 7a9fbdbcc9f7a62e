"""Training examples and retrieval targets: rows of the log as pointers, with what was available strictly before them, split in time.

Rows stream from DuckDB through Feast's point-in-time join to Parquet, a million at a time, so that memory does not grow with the log.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from features.definitions import RANKING, RETRIEVAL
from features.point_in_time import PointInTime
from features.sources import literal
from longtrail.config import SplitSettings
from longtrail.files import atomic_file
from longtrail.schema import EXAMPLES, TARGETS, Table
from longtrail.splits import SPLITS, TRAIN, VALID, leave_one_out, split_bounds, temporal_split, train_lengths

CHUNK = 1_000_000
log = logging.getLogger(__name__)

Ints = NDArray[np.int64]
Codes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which split (an index of SPLITS) each row of a table belongs to, in the order of its file; `bounds` (µs) where it is global in time."""

    kind: str
    bounds: tuple[int, int] | None
    impressions: Codes
    interactions: Codes
    lengths: Ints  # [U + 1], events of each user in the training period


def divide(tables: Path, settings: SplitSettings, users: int) -> Split:
    """Divide both tables. Raises EvaluationError where the log is too short for its splits."""
    shown = _times(tables / "impressions.parquet", "user_id", "timestamp")
    done = _times(tables / "interactions.parquet", "user_id", "timestamp", "available_at")
    if settings.kind == "temporal":
        bounds = split_bounds(shown["timestamp"] if len(shown["timestamp"]) else done["timestamp"], settings)
        impressions, interactions = temporal_split(shown["timestamp"], bounds), temporal_split(done["timestamp"], bounds)
        lengths = train_lengths(done["user_id"], done["available_at"], users=users, bounds=bounds)
        return Split(kind=settings.kind, bounds=bounds, impressions=impressions, interactions=interactions, lengths=lengths)
    requests = pq.read_table(tables / "impressions.parquet", columns=["request_id"])["request_id"].combine_chunks().dictionary_encode()
    return Split(
        kind=settings.kind,
        bounds=None,
        impressions=leave_one_out(shown["user_id"], shown["timestamp"], requests_n=requests.indices.to_numpy()),
        interactions=leave_one_out(done["user_id"], done["available_at"], done["timestamp"]),
        lengths=train_lengths(done["user_id"], done["available_at"], users=users, bounds=None),
    )


def write_examples(connection: Any, point_in_time: PointInTime, tables: Path, split: Split, folder: Path) -> dict[str, dict[str, int]]:
    """Write NAME.parquet for each split, EXAMPLES sorted by timestamp, request_id, position; returns {split: {examples, requests}}."""
    counts = {}
    source = tables / "impressions.parquet"
    for code, name in enumerate(SPLITS):
        out = folder / f"{name}.parquet"
        rows = _write(connection, point_in_time, RANKING, source, split.impressions, code, "timestamp, request_id, position", EXAMPLES, out)
        distinct = connection.sql(f"SELECT count(DISTINCT request_id) FROM read_parquet({literal(out)})").fetchall()[0][0]
        counts[name] = {"examples": rows, "requests": distinct}
        log.info("%s: %s examples in %s requests", name, f"{rows:,}", f"{distinct:,}")
    return counts


def write_targets(connection: Any, point_in_time: PointInTime, tables: Path, split: Split, folder: Path) -> dict[str, int]:
    """Write valid.parquet and test.parquet, TARGETS sorted by user_id, timestamp; returns the interactions of each split.

    With leave-one-out a target's history is all that stands before it in its user's history, as in the papers' protocol: logs with coarse or tied
    times would otherwise lose the end of it (MovieLens-1M: six events of the median user). With the temporal split it is what was available
    strictly before the target's time, which is what the service could have read.
    """
    counts = {SPLITS[TRAIN]: int((split.interactions == TRAIN).sum())}
    order = "user_id, timestamp, file_row_number"
    for code, name in enumerate(SPLITS):
        if code != TRAIN:
            out, source = folder / f"{name}.parquet", tables / "interactions.parquet"
            lengths = None if split.bounds is not None else split.lengths + (code - VALID)
            counts[name] = _write(connection, point_in_time, RETRIEVAL, source, split.interactions, code, order, TARGETS, out, lengths)
            log.info("%s: %s next items to retrieve", name, f"{counts[name]:,}")
    return counts


def _write(
    connection: Any, point_in_time: PointInTime, service: str, source: Path, codes_n: Codes, code: int, order: str, table: Table, out: Path,
    lengths: Ints | None = None,
) -> int:  # fmt: skip
    """Rows of `source` whose code is `code`, with the features of `service`, as `table`; returns how many.

    `lengths` [U + 1], where given, are the history lengths instead of those of the point-in-time join.
    """
    wanted = pa.table({"row": np.flatnonzero(codes_n == code)})
    present = set(pq.read_schema(source).names)
    columns = [name for name in table.names if name in present]
    connection.register("wanted", wanted)
    try:
        rows = connection.sql(
            f"SELECT {', '.join(columns)} FROM (SELECT * FROM read_parquet({literal(source)}, file_row_number = true)) "
            f"SEMI JOIN wanted ON file_row_number = wanted.row ORDER BY {order}"
        ).to_arrow_reader(CHUNK)
        written = 0
        with (
            atomic_file(out) as aside,
            pq.ParquetWriter(aside, table.arrow(), compression="zstd") as writer,
            tqdm(total=wanted.num_rows, unit=" rows", desc=out.stem, disable=None, leave=False) as bar,
        ):
            for batch in rows:
                chunk = pa.Table.from_batches([batch])
                writer.write_table(_with_features(chunk, point_in_time, service, table, lengths))
                written += chunk.num_rows
                bar.update(chunk.num_rows)
    finally:
        connection.unregister("wanted")
    if written != wanted.num_rows:
        raise RuntimeError(f"{out}: wrote {written} rows of {wanted.num_rows}")
    return written


def _with_features(rows: pa.Table, point_in_time: PointInTime, service: str, table: Table, lengths: Ints | None) -> pa.Table:
    keys = {key: rows[key].to_numpy() for key in ("user_id", "item_id")}
    features = point_in_time.features(service, _micros(rows["timestamp"]), **keys)
    if lengths is not None:
        features["history_length"] = lengths[keys["user_id"]]
    columns = [rows[name] if name in rows.column_names else pa.array(features[name]) for name in table.names]
    return pa.table(columns, names=table.names).cast(table.arrow())


def _times(parquet: Path, *columns: str) -> dict[str, Ints]:
    table = pq.read_table(parquet, columns=list(columns))
    return {name: _micros(table[name]) for name in columns}


def _micros(column: Any) -> Ints:
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", tz="UTC"))
    return column.cast(pa.int64()).to_numpy()
