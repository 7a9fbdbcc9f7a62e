"""Training examples and retrieval targets: rows of the log as pointers, with what was available strictly before them, split in time.

Three steps for each split, of which none holds more than a block of rows: the engine sorts the rows into a file of labels, Feast joins that file with
what was available (features/point_in_time.py), and both, in the same order, become the output.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from features.definitions import RANKING, RETRIEVAL
from features.point_in_time import ROW, STAMP, PointInTime
from longtrail.blocks import blocks
from longtrail.files import atomic_file
from longtrail.schema import EXAMPLES, IMPRESSIONS, INTERACTIONS, TARGETS, Table
from longtrail.splits import SPLITS, TEST, TRAIN, VALID

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from longtrail.division import Split
    from longtrail.engines import Engine

CHUNK = 1_000_000  # rows in memory at once
_ROW_GROUP = 1 << 17
log = logging.getLogger(__name__)

Ints = NDArray[np.int64]


def write_examples(engine: "Engine", point_in_time: PointInTime, split: "Split", folder: Path) -> dict[str, dict[str, int]]:
    """Write NAME.parquet for each split, EXAMPLES sorted by timestamp, request_id, position; returns {split: {examples, requests}}."""
    counts = {}
    for code, name in enumerate(SPLITS):
        rows = split.rows(IMPRESSIONS, code)
        ordered = rows.order_by("timestamp", "request_id", "position")
        written = _write(engine, point_in_time, RANKING, ordered, EXAMPLES, folder / f"{name}.parquet")
        distinct = engine.fetch(rows.agg(n=rows.request_id.nunique()))["n"][0].as_py()
        counts[name] = {"examples": written, "requests": distinct}
        log.info("%s: %s examples in %s requests", name, f"{written:,}", f"{distinct:,}")
    return counts


def write_targets(engine: "Engine", point_in_time: PointInTime, split: "Split", folder: Path, events: int) -> dict[str, int]:
    """Write valid.parquet and test.parquet, TARGETS sorted by user_id, timestamp; returns the interactions of each split, of `events` in all.

    With leave-one-out a target's history is all that stands before it in its user's history, as in the papers' protocol: logs with coarse or tied
    times would otherwise lose the end of it (MovieLens-1M: six events of the median user). With the temporal split it is what was available
    strictly before the target's time, which is what the service could have read.
    """
    counts = {}
    for code in (VALID, TEST):
        name = SPLITS[code]
        ordered = split.rows(INTERACTIONS, code).order_by("user_id", "timestamp", "row")
        lengths = None if split.bounds is not None else split.lengths + (code - VALID)
        counts[name] = _write(engine, point_in_time, RETRIEVAL, ordered, TARGETS, folder / f"{name}.parquet", lengths)
        log.info("%s: %s next items to retrieve", name, f"{counts[name]:,}")
    return counts | {SPLITS[TRAIN]: events - sum(counts.values())}


def _write(
    engine: "Engine", point_in_time: PointInTime, service: str, ordered: "ir.Table", table: Table, out: Path, lengths: Ints | None = None
) -> int:
    """`ordered` rows with the features of `service`, as `table`; returns how many.

    `lengths` [U + 1], where given, are the history lengths instead of those of the point-in-time join.
    """
    labels = out.with_name(f"{out.stem}.labels.parquet")  # (Spark does not see a file whose name begins with a dot)
    out.parent.mkdir(exist_ok=True)
    try:
        rows = _write_labels(engine, ordered, table, labels)
        with (
            atomic_file(out) as aside,
            pq.ParquetWriter(aside, table.arrow(), compression="zstd") as writer,
            tqdm(total=rows, unit=" rows", desc=out.stem, disable=None, leave=False) as bar,
        ):
            for block, features in _beside_features(point_in_time, service, labels, lengths):
                columns = [(block if name in block.column_names else features)[name] for name in table.names]
                writer.write_table(pa.table(columns, names=table.names).cast(table.arrow()), row_group_size=_ROW_GROUP)
                bar.update(block.num_rows)
    finally:
        labels.unlink(missing_ok=True)
    return rows


def _write_labels(engine: "Engine", ordered: "ir.Table", table: Table, out: Path) -> int:
    """The columns of `table` that `ordered` has, with what Feast asks of labels; returns the rows."""
    names = [name for name in table.names if name in ordered.columns]
    types = {name: table[name].kind.arrow for name in names} | {ROW: pa.int64(), STAMP: table["timestamp"].kind.arrow}
    rows = 0
    with pq.ParquetWriter(out, pa.schema(types), compression="lz4") as writer:
        for block in blocks(engine.stream(ordered.select(names), CHUNK), CHUNK):
            numbers = pa.array(np.arange(rows, rows + block.num_rows))
            columns = [*(block[name] for name in names), numbers, block["timestamp"]]
            writer.write_table(pa.table(columns, names=list(types)).cast(pa.schema(types)))
            rows += block.num_rows
    return rows


def _beside_features(point_in_time: PointInTime, service: str, labels: Path, lengths: Ints | None) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Blocks of labels, each with the features of its rows."""
    parts = blocks(pq.ParquetFile(labels).iter_batches(CHUNK), CHUNK)
    if lengths is not None:
        for block in parts:
            yield block, pa.table({"history_length": lengths[block["user_id"].to_numpy()]})
        return
    yield from zip(parts, point_in_time.stream(service, labels, CHUNK), strict=True)
