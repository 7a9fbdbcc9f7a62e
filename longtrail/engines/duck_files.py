"""CSV and Parquet files as DuckDB's SELECTs, every column as text. Raises DatasetError, naming the file, for what cannot be one."""

import codecs
import csv
import gzip
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from longtrail.engines.formats import CsvFormat
from longtrail.errors import DatasetError

_LINE_END = re.compile(rb"\r\n|\r|\n")
_CODECS = {"utf-8": "utf-8-sig", "utf-16": "utf-16", "latin-1": "latin-1"}


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def is_parquet(path: Path) -> bool:
    with path.open("rb") as content:
        return content.read(4) == b"PAR1" or path.suffix in {".parquet", ".pq"}


def _missing(shown: str, found: Sequence[str], wanted: Sequence[str], hint: str) -> DatasetError:
    columns = ", ".join(repr(name) for name in found)
    return DatasetError(f"{shown}: no column {', '.join(repr(w) for w in wanted)}; the file has {columns}; {hint}")


def _select(columns: Mapping[str, str | None], texts: Mapping[str, str]) -> str:
    return ", ".join(f"{texts[own] if own is not None else 'NULL'} AS {quoted(wanted)}" for wanted, own in columns.items())


def parquet_schema(path: Path, shown: str, columns: Mapping[str, str | None]) -> pa.Schema:
    """The file's schema. Raises DatasetError where it is damaged or lacks one of `columns`."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DatasetError(f"{shown}: not a whole Parquet file: {error}") from None
    if missing := [own for own in columns.values() if own is not None and own not in schema.names]:
        raise _missing(shown, schema.names, missing, "expected those named under dataset.columns")
    return schema


def select_parquet(path: Path, shown: str, columns: Mapping[str, str | None], unit: str) -> str:
    schema = parquet_schema(path, shown, columns)
    texts = {own: _parquet_text(schema.field(own), unit) for own in columns.values() if own is not None}
    return f"SELECT {_select(columns, texts)} FROM read_parquet({literal(str(path))})"


def _parquet_text(field: pa.Field, unit: str) -> str:
    """SQL that turns a Parquet column into the text a CSV of the same log would hold."""
    name, kind = quoted(field.name), field.type
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


def select_text(path: Path, shown: str, columns: Mapping[str, str | None], layout: CsvFormat) -> str:
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
    quote = literal(layout.quote)
    return (
        f"SELECT {select} FROM read_csv({literal(str(path))}, auto_detect=false, header={layout.header is None}, columns={{{types}}}, "
        f"delim={literal(layout.delimiter)}, quote={quote}, escape={quote}, encoding={literal(layout.encoding)}, "
        "store_rejects=true, rejects_limit=0)"
    )


def _header(path: Path, shown: str, layout: CsvFormat) -> list[str]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as content:
        start = content.read(1 << 16)
    if layout.encoding != "utf-16" and start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise bad_encoding(shown, layout, "it starts with the byte order mark of utf-16")
    codec = _CODECS[layout.encoding]
    if layout.encoding == "utf-16":
        if not start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            codec = "utf-16-le"
    else:
        start = start.split(b"\n", 1)[0]  # the rest is decoded, and judged, where it is read
    try:
        text = codecs.getincrementaldecoder(codec)().decode(start)  # keeps back a character that the block cuts in two
    except UnicodeError as error:
        raise bad_encoding(shown, layout, f"its header is none of that encoding ({error})") from None
    line = text.splitlines()[0] if text.strip() else ""
    if "\0" in line:
        raise bad_encoding(shown, layout, "its first line has null characters")
    if layout.quote and len(layout.delimiter) == 1:
        return next(csv.reader([line], delimiter=layout.delimiter, quotechar=layout.quote), [])
    return line.split(layout.delimiter)


def other_line_end(path: Path) -> str | None:
    """Which line of a text file ends unlike its first, and how; None where all end alike. Line ends within quotes count too."""
    spelt = {b"\n": "LF", b"\r\n": "CR LF", b"\r": "CR"}
    first, line, kept = None, 1, b""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as content:
        while block := content.read(1 << 20):
            block, kept = kept + block, b""
            if block.endswith(b"\r"):  # the other half may follow
                block, kept = block[:-1], b"\r"
            for end in _LINE_END.findall(block):
                first = first or end
                if end != first:
                    return (
                        f"line {line} ends in {spelt[end]}, line 1 in {spelt[first]}, so the rows cannot be told apart; "
                        r"expected one kind of line end (sed 's/\r$//' FILE makes them LF)"
                    )
                line += 1
    return None


def bad_encoding(shown: str, layout: CsvFormat, why: str) -> DatasetError:
    return DatasetError(f"{shown}: not {layout.encoding} text: {why}; expected dataset.encoding to be the file's (utf-8, utf-16 or latin-1)")
