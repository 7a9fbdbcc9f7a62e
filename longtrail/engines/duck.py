"""DuckDB: files into raw tables, expressions into tables and batches, on this machine and within a limit of memory.

A CSV row that does not fit its header (too few fields, too many, a stray quote) is set aside by DuckDB's rejects table and ends in the
quarantine; what makes the rest of a file unreadable (encoding, an unclosed quote, damage) is a DatasetError.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa

from longtrail.config import IngestSettings
from longtrail.engines.duck_files import bad_encoding, is_parquet, literal, other_line_end, quoted, select_parquet, select_text
from longtrail.engines.formats import CsvFormat
from longtrail.engines.functions import DUCKDB, define
from longtrail.errors import DatasetError

log = logging.getLogger(__name__)

_STRUCTURE = {
    "MISSING COLUMNS": "too few fields in the row",
    "TOO MANY COLUMNS": "too many fields in the row",
    "UNQUOTED VALUE": "text before or after a quoted field",
    "LINE SIZE OVER MAXIMUM": "the row is longer than 2 MB",
}


class DuckDBEngine:
    """An `Engine` over a database file in `folder`, where it also spills: a log larger than memory works."""

    def __init__(self, folder: Path, settings: IngestSettings) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        limits = {"memory_limit": settings.memory_limit, "threads": settings.threads}
        self._engine = ibis.duckdb.connect(folder / "engine.duckdb", temp_directory=str(folder / "spill"), **limits)
        self.run("SET TimeZone = 'UTC'; SET preserve_insertion_order = true; SET enable_progress_bar = false;")
        self.run("CREATE TABLE files (source VARCHAR, file VARCHAR, first BIGINT, rows BIGINT)")
        self.run("CREATE TABLE rejects (source VARCHAR, file VARCHAR, line BIGINT, field VARCHAR, reason VARCHAR, raw VARCHAR)")
        define(DUCKDB, self.run)

    def run(self, statement: str) -> None:
        """Run statements of DuckDB's SQL."""
        self._engine.con.execute(statement)

    def load_text(
        self,
        key: str,
        files: Sequence[Path],
        columns: Mapping[str, str | None],
        *,
        csv_format: CsvFormat,
        unit: str = "iso",
        label: str | None = None,
    ) -> ir.Table:
        fields = ", ".join(f"{quoted(column)} VARCHAR" for column in columns)
        self.run(f"CREATE TABLE {quoted('raw_' + key)} ({fields})")
        rows = 0
        for path in files:
            shown = label or str(path)
            if path.stat().st_size == 0:
                if len(files) == 1:
                    raise DatasetError(f"{shown}: the file is empty; expected a header and rows")
                log.warning("%s is empty: nothing read from it", shown)
                continue
            log.info("reading %s", shown)
            if is_parquet(path):
                self._insert(key, shown, select_parquet(path, shown, columns, unit))
            else:
                self._insert(key, shown, select_text(path, shown, columns, csv_format), text=None if csv_format.encoding == "utf-16" else path)
                self._keep_rejects(key, shown, csv_format)
            total = self._one(f"SELECT count(*) FROM {quoted('raw_' + key)}")
            self.add_file(key, shown, rows, total - rows)
            rows = total
        self.run(f'CREATE VIEW {quoted("rows_" + key)} AS SELECT rowid AS "order", * FROM {quoted("raw_" + key)}')
        return self._engine.table(f"rows_{key}")

    def add_file(self, key: str, shown: str, first: int, rows: int) -> None:
        """Remember that `rows` rows of the raw table `key`, from `first` on, are those of the file `shown`."""
        self.run(f"INSERT INTO files VALUES ({literal(key)}, {literal(shown)}, {first}, {rows})")

    def read_rows(self, key: str) -> tuple[int, int]:
        loaded = self._one(f"SELECT coalesce(sum(rows), 0) FROM files WHERE source = {literal(key)}")
        return int(loaded), int(self._one(f"SELECT count(*) FROM rejects WHERE source = {literal(key)}"))

    def locate(self, key: str, found: ir.Table) -> ir.Table:
        self._engine.create_view(f"found_{key}", found, overwrite=True)
        source = literal(key)
        self.run(f"""
            CREATE OR REPLACE VIEW {quoted("quarantined_" + key)} AS
            WITH before AS (  -- the k-th reject of a file, at line l, has l - k accepted rows before it
                SELECT file, line - row_number() OVER (PARTITION BY file ORDER BY line) AS accepted,
                       row_number() OVER (PARTITION BY file ORDER BY line) AS rejected
                FROM rejects WHERE source = {source}
            ), placed AS (
                SELECT f.file, q."order" - f.first AS place, q.field, q.reason, q.raw
                FROM {quoted("found_" + key)} q ASOF JOIN (SELECT * FROM files WHERE source = {source} AND rows > 0) f ON q."order" >= f.first
            )
            SELECT p.file, p.place + 1 + coalesce(b.rejected, 0) AS row, p.field, p.reason, p.raw
            FROM placed p ASOF LEFT JOIN before b ON p.file = b.file AND p.place >= b.accepted
            UNION ALL SELECT file, line, field, reason, raw FROM rejects WHERE source = {source}
        """)
        return self._engine.table(f"quarantined_{key}")

    def parquet(self, path: Path, *, places: bool = False) -> ir.Table:
        if not places:
            return self._engine.read_parquet(str(path))
        return self._engine.read_parquet(str(path), file_row_number=True).rename(row="file_row_number")

    def create_table(self, name: str, rows: ir.Table) -> ir.Table:
        return self._engine.create_table(name, rows)

    def create_view(self, name: str, rows: ir.Table) -> ir.Table:
        return self._engine.create_view(name, rows)

    def fetch(self, rows: ir.Table) -> pa.Table:
        return rows.to_pyarrow()

    def stream(self, rows: ir.Table, size: int) -> Iterator[pa.RecordBatch]:
        yield from self._engine.con.sql(self._engine.compile(rows)).to_arrow_reader(size)  # (Ibis 12's own calls what DuckDB 2 dropped)

    def write(self, rows: ir.Table, path: Path) -> None:
        # A sum of BIGINTs is a HUGEINT, which Parquet has as a double; Ibis calls it an int64 all the same, and so drops our casts.
        kinds = self._engine.compiler.type_mapper
        typed = ", ".join(f"CAST({quoted(name)} AS {kinds.to_string(kind)}) AS {quoted(name)}" for name, kind in rows.schema().items())
        self.run(f"COPY (SELECT {typed} FROM ({self._engine.compile(rows)})) TO {literal(str(path))} (FORMAT parquet, COMPRESSION zstd)")

    def disconnect(self) -> None:
        self._engine.disconnect()

    def _one(self, sql: str) -> int:
        return self._engine.con.execute(sql).fetchall()[0][0]

    def _insert(self, key: str, shown: str, select: str, *, text: Path | None = None) -> None:
        """`text`: the CSV file that the rows come from, of whose line ends DuckDB says no more than that they brought it to an invalid state."""
        self.run("DROP TABLE IF EXISTS reject_errors; DROP TABLE IF EXISTS reject_scans;")
        try:
            self.run(f"INSERT INTO {quoted('raw_' + key)} {select}")
        except duckdb.Error as error:
            if isinstance(error, duckdb.OutOfMemoryException):
                raise
            reason = other_line_end(text) if text is not None and "state machine" in str(error) else None
            raise DatasetError(f"{shown}: {reason or 'cannot be read: ' + str(error).splitlines()[0]}") from None

    def _keep_rejects(self, key: str, shown: str, layout: CsvFormat) -> None:
        """Move DuckDB's rejects of the file just read to ours: one row each, the first line of the file being row 1 after its header."""
        first = "SELECT line, min(error_type::VARCHAR) AS kind, any_value(csv_line) AS raw FROM reject_errors GROUP BY line"
        open_quote = "kind = 'UNQUOTED VALUE' AND contains(trim(raw, chr(10) || chr(13)), chr(10))"
        bad = self._engine.con.execute(
            f"SELECT line, kind FROM ({first}) WHERE kind = 'INVALID ENCODING' OR ({open_quote}) ORDER BY line LIMIT 1"
        ).fetchall()
        if bad and bad[0][1] == "INVALID ENCODING":
            raise bad_encoding(shown, layout, f"line {bad[0][0]} has bytes that are none of that encoding")
        if bad:
            raise DatasetError(
                f"{shown}: line {bad[0][0]} opens a quote that is never closed, so the rows after it cannot be told apart; "
                f"expected {layout.quote} in pairs"
            )
        reasons = " ".join(f"WHEN {literal(kind)} THEN {literal(reason)}" for kind, reason in _STRUCTURE.items())
        self.run(
            f"INSERT INTO rejects SELECT {literal(key)}, {literal(shown)}, line - {int(layout.header is None)}, 'row', "
            f"CASE kind {reasons} ELSE lower(kind) END, trim(raw, chr(10) || chr(13)) FROM ({first})"
        )
