"""The reading edge: CSV and Parquet files into raw tables of DuckDB. With ingest's writer, the only code that knows the engine.

Every column is read as text. A CSV row that does not fit its header (too few fields, too many, a stray quote) is set aside by DuckDB's
rejects table and ends in the quarantine; what makes the rest of a file unreadable (encoding, an unclosed quote, damage) is a DatasetError.
"""

import codecs
import csv
import glob
import gzip
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.backends.duckdb import Backend

from longtrail.datasets.raw import RAW_COLUMNS
from longtrail.errors import DatasetError

log = logging.getLogger(__name__)

_CODECS = {"utf-8": "utf-8-sig", "utf-16": "utf-16", "latin-1": "latin-1"}
_STRUCTURE = {
    "MISSING COLUMNS": "too few fields in the row",
    "TOO MANY COLUMNS": "too many fields in the row",
    "UNQUOTED VALUE": "text before or after a quoted field",
    "LINE SIZE OVER MAXIMUM": "the row is longer than 2 MB",
}


def open_engine(folder: Path, *, memory_limit: str, threads: int) -> Backend:
    """DuckDB over a database file in `folder`, where it also spills: a log larger than memory works."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = ibis.duckdb.connect(folder / "ingest.duckdb", memory_limit=memory_limit, threads=threads, temp_directory=str(folder / "spill"))
    engine.raw_sql("SET TimeZone = 'UTC'; SET preserve_insertion_order = true; SET enable_progress_bar = false;")
    engine.raw_sql("CREATE TABLE files (source VARCHAR, file VARCHAR, first BIGINT, rows BIGINT)")
    engine.raw_sql("CREATE TABLE rejects (source VARCHAR, file VARCHAR, line BIGINT, field VARCHAR, reason VARCHAR, raw VARCHAR)")
    return engine


@dataclass(frozen=True, kw_only=True)
class CsvFormat:
    """How a text file is laid out. `header` names the columns of a file without a header line. `quote` may be empty: no quoting."""

    delimiter: str = ","
    encoding: str = "utf-8"
    quote: str = '"'
    header: tuple[str, ...] | None = None


def find_files(source: str) -> list[Path]:
    """The files a path or glob means, in name order. Raises DatasetError where there is none."""
    if Path(source).is_file():
        return [Path(source)]
    if Path(source).is_dir():
        raise DatasetError(f"{source}: is a folder; expected a file, or a glob such as {Path(source) / '*.parquet'}")
    found = sorted(
        Path(name)
        for name in glob.glob(source, recursive=True)  # noqa: PTH207 (a Path cannot glob from a pattern that may be absolute)
        if Path(name).is_file()
    )
    if not found:
        what = "no file matches this glob" if glob.has_magic(source) else "no such file"
        raise DatasetError(f"{source}: {what} (looked from {Path.cwd()}); expected a CSV or Parquet file, or a glob of them")
    return found


def load(
    engine: Backend, key: str, files: Sequence[Path], names: Mapping[str, str], *, csv_format: CsvFormat, unit: str = "iso", label: str | None = None
) -> ir.Table:
    """Read `files` into the raw table `key`: order, then RAW_COLUMNS. `names` maps raw columns to the files' own names.

    `unit` is what Parquet columns that are times are written as. Raises DatasetError naming the file.
    """
    columns = {name: names.get(name) for name in RAW_COLUMNS}
    return load_text(engine, key, files, columns, csv_format=csv_format, unit=unit, label=label)


def load_text(
    engine: Backend,
    key: str,
    files: Sequence[Path],
    columns: Mapping[str, str | None],
    *,
    csv_format: CsvFormat,
    unit: str = "iso",
    label: str | None = None,
) -> ir.Table:
    """As `load`, with any columns: wanted name → the files' own name, or None for a column of nulls.

    `label` is what messages and the quarantine call a single file that lies in a temporary folder, such as a member of a zip.
    """
    fields = ", ".join(f"{_name(column)} VARCHAR" for column in columns)
    engine.raw_sql(f"CREATE TABLE {_name('raw_' + key)} ({fields})")
    rows = 0
    for path in files:
        shown = label or str(path)
        if path.stat().st_size == 0:
            if len(files) == 1:
                raise DatasetError(f"{shown}: the file is empty; expected a header and rows")
            log.warning("%s is empty: nothing read from it", shown)
            continue
        log.info("reading %s", shown)
        select, rejects = _parquet(path, shown, columns, unit) if _is_parquet(path) else _text(path, shown, columns, csv_format)
        _insert(engine, key, shown, select)
        if rejects:
            _keep_rejects(engine, key, shown, csv_format)
        total = _one(engine, f"SELECT count(*) FROM {_name('raw_' + key)}")
        engine.raw_sql(f"INSERT INTO files VALUES ({_text_literal(key)}, {_text_literal(shown)}, {rows}, {total - rows})")
        rows = total
    engine.raw_sql(f'CREATE VIEW {_name("rows_" + key)} AS SELECT rowid AS "order", * FROM {_name("raw_" + key)}')
    return engine.table(f"rows_{key}")


def read_rows(engine: Backend, key: str) -> tuple[int, int]:
    """(rows loaded, rows set aside because they did not fit their header) of a raw table."""
    loaded = _one(engine, f"SELECT coalesce(sum(rows), 0) FROM files WHERE source = {_text_literal(key)}")
    return int(loaded), int(_one(engine, f"SELECT count(*) FROM rejects WHERE source = {_text_literal(key)}"))


def locate(engine: Backend, key: str, found: ir.Table) -> ir.Table:
    """`found` (order, field, reason, raw) as quarantine rows (file, row, field, reason, raw), with the rows that did not fit their header."""
    source = _text_literal(key)
    engine.create_view(f"found_{key}", found, overwrite=True)
    engine.raw_sql(f"""
        CREATE OR REPLACE VIEW {_name("quarantined_" + key)} AS
        WITH before AS (  -- the k-th reject of a file, at line l, has l - k accepted rows before it
            SELECT file, line - row_number() OVER (PARTITION BY file ORDER BY line) AS accepted,
                   row_number() OVER (PARTITION BY file ORDER BY line) AS rejected
            FROM rejects WHERE source = {source}
        ), placed AS (
            SELECT f.file, q."order" - f.first AS place, q.field, q.reason, q.raw
            FROM {_name("found_" + key)} q ASOF JOIN (SELECT * FROM files WHERE source = {source} AND rows > 0) f ON q."order" >= f.first
        )
        SELECT p.file, p.place + 1 + coalesce(b.rejected, 0) AS row, p.field, p.reason, p.raw
        FROM placed p ASOF LEFT JOIN before b ON p.file = b.file AND p.place >= b.accepted
        UNION ALL SELECT file, line, field, reason, raw FROM rejects WHERE source = {source}
    """)
    return engine.table(f"quarantined_{key}")


def stream(engine: Backend, rows: ir.Table, size: int) -> Iterator[pa.RecordBatch]:
    """The rows in their order, in batches of about `size`, never all in memory. (Ibis 12's own to_pyarrow_batches calls what DuckDB 2 dropped.)"""
    yield from engine.con.sql(engine.compile(rows)).to_arrow_reader(size)


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text_literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _one(engine: Backend, sql: str) -> int:
    return engine.con.execute(sql).fetchall()[0][0]


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as content:
        return content.read(4) == b"PAR1" or path.suffix in {".parquet", ".pq"}


def _missing(shown: str, found: Sequence[str], wanted: Sequence[str], hint: str) -> DatasetError:
    columns = ", ".join(repr(name) for name in found)
    return DatasetError(f"{shown}: no column {', '.join(repr(w) for w in wanted)}; the file has {columns}; {hint}")


def _select(columns: Mapping[str, str | None], texts: Mapping[str, str]) -> str:
    return ", ".join(f"{texts[own] if own is not None else 'NULL'} AS {_name(wanted)}" for wanted, own in columns.items())


def _parquet(path: Path, shown: str, columns: Mapping[str, str | None], unit: str) -> tuple[str, bool]:
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DatasetError(f"{shown}: not a whole Parquet file: {error}") from None
    if missing := [own for own in columns.values() if own is not None and own not in schema.names]:
        raise _missing(shown, schema.names, missing, "expected those named under dataset.columns")
    texts = {own: _parquet_text(schema.field(own), unit) for own in columns.values() if own is not None}
    return f"SELECT {_select(columns, texts)} FROM read_parquet({_text_literal(str(path))})", False


def _parquet_text(field: pa.Field, unit: str) -> str:
    """SQL that turns a Parquet column into the text a CSV of the same log would hold."""
    name, kind = _name(field.name), field.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        micros = f"epoch_us({name}::TIMESTAMP{'TZ' if getattr(kind, 'tz', None) else ''})"
        per = {"s": 1_000_000, "ms": 1_000, "us": 1}
        if unit == "iso":
            return f"strftime(make_timestamp({micros}), '%Y-%m-%dT%H:%M:%S.%fZ')"
        return f"CAST({micros} AS VARCHAR)" if unit == "us" else f"CAST({micros} / {per[unit]} AS VARCHAR)"
    if pa.types.is_floating(kind):  # whole numbers that a data frame kept as floats because some were missing: 12.0 is 12
        whole = f"{name} = round({name}) AND abs({name}) < 9e15"
        return f"CASE WHEN {whole} THEN CAST(CAST({name} AS BIGINT) AS VARCHAR) ELSE CAST({name} AS VARCHAR) END"
    if pa.types.is_boolean(kind):
        return f"CAST(CAST({name} AS TINYINT) AS VARCHAR)"
    return f"CAST({name} AS VARCHAR)"


def _text(path: Path, shown: str, columns: Mapping[str, str | None], layout: CsvFormat) -> tuple[str, bool]:
    header = list(layout.header) if layout.header is not None else _header(path, shown, layout)
    wanted = [own for own in columns.values() if own is not None]
    if missing := [own for own in wanted if own not in header]:
        raise _missing(shown, header, missing, f"expected them in its first line, between {layout.delimiter!r}, in {layout.encoding}")
    if repeated := sorted({own for own in wanted if header.count(own) > 1}):
        raise DatasetError(f"{shown}: column {', '.join(map(repr, repeated))} stands more than once in the header; expected one of each")
    # DuckDB wants distinct names; ours are places, so any header is allowed, an empty name included.
    places = {name: f"c{place}" for place, name in enumerate(header)}
    types = ", ".join(f"'c{place}': 'VARCHAR'" for place in range(len(header)))
    select = _select(columns, {own: places[own] for own in wanted})
    quote = _text_literal(layout.quote)
    return (
        f"SELECT {select} FROM read_csv({_text_literal(str(path))}, auto_detect=false, header={layout.header is None}, columns={{{types}}}, "
        f"delim={_text_literal(layout.delimiter)}, quote={quote}, escape={quote}, encoding={_text_literal(layout.encoding)}, "
        "store_rejects=true, rejects_limit=0)",
        True,
    )


def _header(path: Path, shown: str, layout: CsvFormat) -> list[str]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as content:
        start = content.read(1 << 16)
    if layout.encoding != "utf-16" and start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _bad_encoding(shown, layout, "it starts with the byte order mark of utf-16")
    codec = _CODECS[layout.encoding]
    if layout.encoding == "utf-16":
        if not start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            codec = "utf-16-le"
    else:
        start = start.split(b"\n", 1)[0]  # the rest is decoded, and judged, where it is read
    try:
        text = codecs.getincrementaldecoder(codec)().decode(start)  # keeps back a character that the block cuts in two
    except UnicodeError as error:
        raise _bad_encoding(shown, layout, f"its header is none of that encoding ({error})") from None
    line = text.splitlines()[0] if text.strip() else ""
    if "\0" in line:
        raise _bad_encoding(shown, layout, "its first line has null characters")
    if layout.quote and len(layout.delimiter) == 1:
        return next(csv.reader([line], delimiter=layout.delimiter, quotechar=layout.quote), [])
    return line.split(layout.delimiter)


def _bad_encoding(shown: str, layout: CsvFormat, why: str) -> DatasetError:
    return DatasetError(f"{shown}: not {layout.encoding} text: {why}; expected dataset.encoding to be the file's (utf-8, utf-16 or latin-1)")


def _insert(engine: Backend, key: str, shown: str, select: str) -> None:
    engine.raw_sql("DROP TABLE IF EXISTS reject_errors; DROP TABLE IF EXISTS reject_scans;")
    try:
        engine.raw_sql(f"INSERT INTO {_name('raw_' + key)} {select}")
    except duckdb.Error as error:
        if isinstance(error, duckdb.OutOfMemoryException):
            raise
        raise DatasetError(f"{shown}: cannot be read: {str(error).splitlines()[0]}") from None


def _keep_rejects(engine: Backend, key: str, shown: str, layout: CsvFormat) -> None:
    """Move DuckDB's rejects of the file just read to ours: one row each, the first line of the file being row 1 after its header."""
    first = "SELECT line, min(error_type::VARCHAR) AS kind, any_value(csv_line) AS raw FROM reject_errors GROUP BY line"
    open_quote = "kind = 'UNQUOTED VALUE' AND contains(trim(raw, chr(10) || chr(13)), chr(10))"
    bad = engine.con.execute(f"SELECT line, kind FROM ({first}) WHERE kind = 'INVALID ENCODING' OR ({open_quote}) ORDER BY line LIMIT 1").fetchall()
    if bad and bad[0][1] == "INVALID ENCODING":
        raise _bad_encoding(shown, layout, f"line {bad[0][0]} has bytes that are none of that encoding")
    if bad:
        raise DatasetError(
            f"{shown}: line {bad[0][0]} opens a quote that is never closed, so the rows after it cannot be told apart; "
            f"expected {layout.quote} in pairs"
        )
    reasons = " ".join(f"WHEN {_text_literal(kind)} THEN {_text_literal(reason)}" for kind, reason in _STRUCTURE.items())
    engine.raw_sql(
        f"INSERT INTO rejects SELECT {_text_literal(key)}, {_text_literal(shown)}, line - {int(layout.header is None)}, 'row', "
        f"CASE kind {reasons} ELSE lower(kind) END, trim(raw, chr(10) || chr(13)) FROM ({first})"
    )
