"""Files of a log as raw tables of text: the edge between the readers of datasets and the engine that expressions run on."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path

import ibis.expr.types as ir

from longtrail.datasets.raw import RAW_COLUMNS
from longtrail.engines import Engine
from longtrail.engines.formats import CsvFormat
from longtrail.errors import DatasetError

__all__ = ["CsvFormat", "find_files", "load", "load_text"]


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
    engine: Engine, key: str, files: Sequence[Path], names: Mapping[str, str], *, csv_format: CsvFormat, unit: str = "iso", label: str | None = None
) -> ir.Table:
    """Read `files` into the raw table `key`: order, then RAW_COLUMNS. `names` maps raw columns to the files' own names.

    `unit` is what Parquet columns that are times are written as. Raises DatasetError naming the file.
    """
    columns = {name: names.get(name) for name in RAW_COLUMNS}
    return load_text(engine, key, files, columns, csv_format=csv_format, unit=unit, label=label)


def load_text(
    engine: Engine,
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
    return engine.load_text(key, files, columns, csv_format=csv_format, unit=unit, label=label)
