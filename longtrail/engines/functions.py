"""What the engines say differently: the functions our expressions call, and how each engine defines them. The only place with two dialects.

Expressions call `to_number`, `to_microseconds` and `microseconds_of`; an engine runs its definitions once when it is opened.
"""

from collections.abc import Callable
from datetime import datetime

import ibis


@ibis.udf.scalar.builtin(name="longtrail_number")
def to_number(text: str) -> float:  # type: ignore[empty-body]
    """The number that a stripped text says, null where it says none. NaN and infinity are numbers; `1_000` is, `1d` and `0x10` are not."""


@ibis.udf.scalar.builtin(name="longtrail_microseconds")
def to_microseconds(text: str) -> int:  # type: ignore[empty-body]
    """int64 µs since 1970 of a stripped ISO 8601 text, UTC where it names no zone; null where it is none."""


@ibis.udf.scalar.builtin(name="longtrail_epoch")
def microseconds_of(moment: datetime) -> int:  # type: ignore[empty-body]
    """int64 µs since 1970 of a moment in UTC."""


DUCKDB = (
    "CREATE MACRO longtrail_epoch(moment) AS epoch_us(moment)",
    "CREATE MACRO longtrail_number(text) AS TRY_CAST(text AS DOUBLE)",
    "CREATE MACRO longtrail_microseconds(text) AS epoch_us(TRY_CAST(text AS TIMESTAMPTZ))",
)

# Spark's own casts follow Java: `1d` is a number to them, `1_000` none; `2024` and `10:11` are times, `2024/01/02` and `10:11Z` none.
_ZONE = r"Z|[+-][0-9]{2}(:?[0-9]{2})?(:[0-9]{2})?| [A-Za-z_]+(/[A-Za-z_]+)*"
_ISO = rf"^-?[0-9]{{4,}}(-[0-9]{{1,2}}-|/[0-9]{{1,2}}/)[0-9]{{1,2}}([ T][0-9]{{1,2}}:[0-9]{{1,2}}(:[0-9]{{1,2}}([.][0-9]*)?)?({_ZONE})?)?$"
_DASHED = r"regexp_replace(text, r'^(-?[0-9]+)/([0-9]+)/', '$1-$2-')"
_WITH_SECONDS = rf"regexp_replace({_DASHED}, r'^([^ T]+[ T][0-9]+:[0-9]+)(Z|[+-].*| .*)?$', '$1:00$2')"
SPARK = (
    "CREATE OR REPLACE TEMPORARY FUNCTION longtrail_epoch(moment TIMESTAMP) RETURNS BIGINT RETURN unix_micros(moment)",
    "CREATE OR REPLACE TEMPORARY FUNCTION longtrail_number(text STRING) RETURNS DOUBLE RETURN "
    r"CASE WHEN text RLIKE r'[xX]|[0-9.][dDfF]$' THEN NULL "
    r"WHEN contains(text, '_') THEN TRY_CAST(regexp_replace(text, r'(?<=[0-9])_(?=[0-9])', '') AS DOUBLE) "
    "ELSE TRY_CAST(text AS DOUBLE) END",
    "CREATE OR REPLACE TEMPORARY FUNCTION longtrail_microseconds(text STRING) RETURNS BIGINT RETURN "
    f"CASE WHEN lower(text) = 'epoch' THEN 0 WHEN text RLIKE r'{_ISO}' THEN unix_micros(TRY_CAST({_WITH_SECONDS} AS TIMESTAMP)) END",
)


def define(statements: tuple[str, ...], run: Callable[[str], object]) -> None:
    """Run the definitions of one engine by `run`, which takes a statement."""
    for statement in statements:
        run(statement)
