"""Where expressions run: DuckDB on this machine (the default), or Spark on many. One setting, `ingest.engine`, says which.

The expressions themselves (datasets/checks.py, datasets/derive.py, features/sources.py) are Ibis and know neither.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import ibis.expr.types as ir
import pyarrow as pa

from longtrail.config import IngestSettings
from longtrail.engines.formats import CsvFormat


class Engine(Protocol):
    """Tables by name, computed from expressions over other tables."""

    def load_text(
        self, key: str, files: Sequence[Path], columns: Mapping[str, str | None], *, csv_format: CsvFormat, unit: str, label: str | None
    ) -> ir.Table:
        """Files as a table of text, see `longtrail.datasets.reading.load_text`."""
        ...

    def read_rows(self, key: str) -> tuple[int, int]:
        """(rows loaded, rows set aside because they did not fit their header) of a raw table."""
        ...

    def locate(self, key: str, found: ir.Table) -> ir.Table:
        """`found` (order, field, reason, raw) as quarantine rows (file, row, field, reason, raw), with those that did not fit their header."""
        ...

    def parquet(self, path: Path, *, places: bool = False) -> ir.Table:
        """A Parquet file, read where it is used; with `places` also `row` (int64), the place of each row in the file, from 0."""
        ...

    def create_table(self, name: str, rows: ir.Table) -> ir.Table:
        """`rows`, computed now and once."""
        ...

    def create_view(self, name: str, rows: ir.Table) -> ir.Table:
        """`rows` by name, computed where they are used."""
        ...

    def fetch(self, rows: ir.Table) -> pa.Table:
        """A small result, in memory."""
        ...

    def stream(self, rows: ir.Table, size: int) -> Iterator[pa.RecordBatch]:
        """The rows in their order, in batches of about `size`, never all in memory."""
        ...

    def write(self, rows: ir.Table, path: Path) -> None:
        """Write the rows, in their order, as one Parquet file."""
        ...

    def disconnect(self) -> None:
        """End it; what it wrote to its folder is the caller's to remove."""
        ...


def open_engine(folder: Path, settings: IngestSettings) -> Engine:
    """The engine of `settings`; `folder` takes its intermediate files. Raises ConfigError where Spark is asked for and cannot be had."""
    if settings.engine == "spark":
        from longtrail.engines.spark import SparkEngine

        return SparkEngine(folder, settings)
    from longtrail.engines.duck import DuckDBEngine

    return DuckDBEngine(folder, settings)
