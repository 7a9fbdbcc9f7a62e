"""Spark: the same expressions on many machines. Parquet logs are read by the executors; CSV logs pass through DuckDB on the driver first.

Each table is computed once, to Parquet in the engine's folder, which driver and executors must both see. What DuckDB judges row by row in a
CSV (quotes, encodings, rows that do not fit their header) has one implementation, so the quarantine of a log is the same on both engines.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse
from uuid import uuid4

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from longtrail.config import IngestSettings, SparkSettings
from longtrail.engines.duck import DuckDBEngine
from longtrail.engines.duck_files import is_parquet, parquet_schema
from longtrail.engines.formats import CsvFormat
from longtrail.engines.functions import SPARK, define
from longtrail.errors import ConfigError

log = logging.getLogger(__name__)
_MOMENT = pa.timestamp("us", tz="UTC")  # what Spark calls a timestamp
_ROW_GROUP = 1 << 18  # rows
_PATH = "regexp_replace(_metadata.file_path, '^file:/+', '/')"  # it begins with one slash or three


class SparkEngine:
    """An `Engine` on Spark. Where a Spark session is active already it is used, and left running."""

    def __init__(self, folder: Path, settings: IngestSettings) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder.absolute()
        self._session, self._ours = open_session(settings.spark, spill=self._folder / "spill")
        self._edge = DuckDBEngine(folder / "edge", settings)
        self._engine = ibis.pyspark.connect(self._session)
        define(SPARK, self._session.sql)

    def load_text(
        self, key: str, files: Sequence[Path], columns: Mapping[str, str | None], *, csv_format: CsvFormat, unit: str, label: str | None
    ) -> ir.Table:
        selects = _parquet_selects(files, columns, unit, label)
        if selects is None:
            rows = self._edge.load_text(key, files, columns, csv_format=csv_format, unit=unit, label=label)
            return self._from_edge(f"rows_{key}", rows)
        first = self._first_rows(key, files, label)
        parts = []
        for select, paths in selects.items():
            frame = self._session.read.parquet(*(_uri(path) for path in paths))
            at = [(urlparse(uri).path, first[Path(unquote(urlparse(uri).path))]) for uri in frame.inputFiles()]
            places = self._session.createDataFrame(at, "__file STRING, __first BIGINT")
            texts = frame.selectExpr(*select, f"{_PATH} AS __file", "_metadata.row_index AS __row").join(places.hint("broadcast"), "__file", "left")
            order = "coalesce(__first, raise_error('a file that was not asked for: ' || __file)) + __row AS `order`"
            parts.append(texts.selectExpr(order, *(f"`{name}`" for name in columns)))
        whole = parts[0]
        for part in parts[1:]:
            whole = whole.unionAll(part)
        whole.createOrReplaceTempView(f"rows_{key}")
        return self._engine.table(f"rows_{key}")

    def read_rows(self, key: str) -> tuple[int, int]:
        return self._edge.read_rows(key)

    def locate(self, key: str, found: ir.Table) -> ir.Table:
        folder = self._write(f"found_{key}", found)
        return self._from_edge(f"quarantined_{key}", self._edge.locate(key, self._edge.parquet(folder / "*.parquet")))

    def parquet(self, path: Path, *, places: bool = False) -> ir.Table:
        frame = self._session.read.parquet(_uri(path))
        return self._view(f"parquet_{uuid4().hex[:12]}", frame.selectExpr("*", "_metadata.row_index AS row") if places else frame)

    def create_table(self, name: str, rows: ir.Table) -> ir.Table:
        return self._view(name, self._session.read.parquet(_uri(self._write(name, rows))))

    def create_view(self, name: str, rows: ir.Table) -> ir.Table:
        return self._view(name, self._frame(rows))

    def fetch(self, rows: ir.Table) -> pa.Table:
        return self._frame(rows).toArrow()

    def stream(self, rows: ir.Table, size: int) -> Iterator[pa.RecordBatch]:
        folder = self._write(f"stream_{uuid4().hex[:12]}", rows)
        for part in sorted(folder.glob("part-*.parquet")):  # Spark numbers the parts of a sorted frame in its order
            yield from pq.ParquetFile(part).iter_batches(size)
        shutil.rmtree(folder)

    def write(self, rows: ir.Table, path: Path) -> None:
        schema = pa.schema([(field.name, _MOMENT if pa.types.is_timestamp(field.type) else field.type) for field in rows.schema().to_pyarrow()])
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in self.stream(rows, _ROW_GROUP):
                writer.write_batch(batch.cast(schema), row_group_size=_ROW_GROUP)

    def disconnect(self) -> None:
        self._edge.disconnect()
        if self._ours:
            self._session.stop()

    def _frame(self, rows: ir.Table) -> Any:
        from ibis.backends.pyspark.datatypes import PySparkSchema

        frame = self._session.sql(self._engine.compile(rows))
        wanted = PySparkSchema.from_ibis(rows.schema())  # Spark's row_number is an int where ours, and DuckDB's, is a bigint
        return frame.select(*(frame[field.name].cast(field.dataType) for field in wanted))

    def _view(self, name: str, frame: Any) -> ir.Table:
        frame.createOrReplaceTempView(name)
        return self._engine.table(name)

    def _write(self, name: str, rows: ir.Table) -> Path:
        folder = self._folder / name
        self._frame(rows).write.parquet(_uri(folder), compression="zstd")
        return folder

    def _from_edge(self, name: str, rows: ir.Table) -> ir.Table:
        path = self._folder / f"{name}.parquet"
        self._edge.write(rows, path)
        return self._view(name, self._session.read.parquet(_uri(path)))

    def _first_rows(self, key: str, files: Sequence[Path], label: str | None) -> dict[Path, int]:
        first, rows = {}, 0
        for path in files:
            count = pq.read_metadata(path).num_rows
            self._edge.add_file(key, label or str(path), rows, count)
            first[path.absolute()] = rows
            rows += count
        return first


def open_session(settings: SparkSettings, *, spill: Path) -> tuple[Any, bool]:
    """(a session of its own names and functions, whether its context was started here). Raises ConfigError where Spark cannot be had."""
    try:
        from pyspark.sql import SparkSession
    except ModuleNotFoundError:
        instead = "pip install 'longtrail[spark]', or on a cluster cluster.spark_image"
        raise ConfigError(f"params.yaml asks for Spark, but pyspark is not installed; expected {instead}") from None
    active = SparkSession.getActiveSession()
    if active is None and not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        raise ConfigError("params.yaml asks for Spark, but there is no Java: expected java on the PATH, or JAVA_HOME; Spark 4 needs 17 or 21")
    session = active
    if session is None:
        builder = SparkSession.builder.config("spark.local.dir", str(spill))
        for name, value in context_options(settings).items():
            builder = builder.config(name, value)
        session = builder.getOrCreate()
        logging.getLogger("py4j").setLevel(logging.WARNING)  # else it tells of its connections, in the end to a closed log
    own = session.newSession()
    for name, value in session_options(settings).items():
        own.conf.set(name, value)
    return own, active is None


def context_options(settings: SparkSettings) -> dict[str, str]:
    """What Spark is started with; `settings.options` have the last word."""
    options = {
        "spark.app.name": "longtrail",
        "spark.master": settings.master,
        "spark.driver.memory": settings.driver_memory,
        "spark.executor.memory": settings.executor_memory,
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
        # Nothing is kept there, but Spark makes the folder, and the one it would choose, where it was started, may be read-only.
        "spark.sql.warehouse.dir": f"{tempfile.gettempdir()}/spark-warehouse",
    }
    if settings.master.startswith("local"):
        options |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    return options | settings.options


def session_options(settings: SparkSettings) -> dict[str, str]:
    """What every session of ours is set to, so that its answers are DuckDB's."""
    return {
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.ansi.enabled": "true",  # a number that does not fit is an error, or null with TRY_CAST: as DuckDB has it
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
        "spark.sql.shuffle.partitions": str(settings.shuffle_partitions),
        "spark.sql.execution.arrow.pyspark.enabled": "true",
    }


def _uri(path: Path) -> str:
    return f"file://{path.absolute()}"


def _parquet_selects(
    files: Sequence[Path], columns: Mapping[str, str | None], unit: str, label: str | None
) -> dict[tuple[str, ...], list[Path]] | None:
    """Spark's SELECT of each layout and the files that have it; None where one of the files is not for Spark to read."""
    found: dict[tuple[str, ...], list[Path]] = {}
    for path in files:
        if path.stat().st_size == 0 or not is_parquet(path):
            return None
        schema = parquet_schema(path, label or str(path), columns)
        texts = {name: "CAST(NULL AS STRING)" if own is None else _text(schema.field(own), unit) for name, own in columns.items()}
        if None in texts.values():
            return None
        found.setdefault(tuple(f"{text} AS `{name}`" for name, text in texts.items()), []).append(path)
    return found


def _text(field: pa.Field, unit: str) -> str | None:
    """SQL that turns a Parquet column into the text a CSV of the same log would hold; None where Spark cannot read its type as DuckDB does."""
    name, kind = "`" + field.name.replace("`", "``") + "`", field.type
    if pa.types.is_date(kind) or (pa.types.is_timestamp(kind) and kind.unit in ("ms", "us")):
        micros = f"unix_micros(CAST({name} AS TIMESTAMP))"
        if unit == "iso":
            return f"date_format(CAST({name} AS TIMESTAMP), \"yyyy-MM-dd'T'HH:mm:ss.SSSSSS'Z'\")"
        if unit == "us":
            return f"CAST({micros} AS STRING)"
        exact = f"CAST(CAST({micros} AS DECIMAL(20, 6)) / {1_000_000 if unit == 's' else 1_000} AS DECIMAL(26, 6))"
        return f"regexp_replace(CAST({exact} AS STRING), r'([.][0-9]+?)0+$', '$1')"
    if pa.types.is_floating(kind):  # whole numbers that a data frame kept as floats because some were missing: 12.0 is 12
        return f"CASE WHEN {name} = round({name}) AND abs({name}) < 9e15 THEN CAST(CAST({name} AS BIGINT) AS STRING) ELSE CAST({name} AS STRING) END"
    if pa.types.is_boolean(kind):
        return f"CAST(CAST({name} AS TINYINT) AS STRING)"
    if pa.types.is_signed_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return f"CAST({name} AS STRING)"
    return None
