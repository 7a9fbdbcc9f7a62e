"""What a file of a log looks like, whatever reads it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CsvFormat:
    """How a text file is laid out. `header` names the columns of a file without a header line. `quote` may be empty: no quoting."""

    delimiter: str = ","
    encoding: str = "utf-8"
    quote: str = '"'
    header: tuple[str, ...] | None = None
