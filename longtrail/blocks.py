"""Batches of whatever size an engine or a file gives, in blocks of one size: files are then equal where their rows are."""

from collections.abc import Iterable, Iterator

import pyarrow as pa


def blocks(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    """The rows in their order, `size` at a time; the last block may be smaller."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        waiting.append(batch)
        rows += batch.num_rows
        while rows >= size:
            joined = pa.Table.from_batches(waiting)
            yield joined.slice(0, size)
            waiting, rows = joined.slice(size).to_batches(), rows - size
    if rows:
        yield pa.Table.from_batches(waiting)
