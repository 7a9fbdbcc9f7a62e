"""The raw log: what every reader hands to ingest, whatever its source looked like.

Columns are text as it was read (null where the source has no such column), so that a value that cannot be understood is still there to be
quarantined with its reason. `order` numbers the rows of a source from 0, in file order. Expressions are Ibis: only `reading.py` knows the engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import ibis.expr.types as ir

from longtrail.schema import Propensity

# Text columns of a raw log, in this order after `order` (int64).
RAW_COLUMNS = (
    "user",
    "item",
    "timestamp",
    "written_at",
    "action",
    "value",
    "category",
    "title",
    "click",
    "request",
    "position",
    "propensity",
    "policy",
)

TimestampUnit = Literal["s", "ms", "us", "iso"]
ClickFrom = Literal["column", "value", "action", "nothing"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How the text of one source is to be understood.

    `click_from`: where an impression's click comes from: a column (then only clicked rows are interactions, too), `value >= like_from`,
    `action in click_actions` (then every row is both an interaction and an impression), or nothing (then no row is an impression).
    """

    timestamp_unit: TimestampUnit
    click_from: ClickFrom = "nothing"
    like_from: float | None = None
    click_actions: tuple[str, ...] = ()
    action: str = "event"  # the action of a row that names none
    action_from_value: str | None = None  # prefix: the action is this and the value, rounded up
    value_bounds: tuple[float, float] | None = None  # inclusive; None is any finite number
    first_position: int = 1
    policy: str = "logged"  # the policy of a row that names none
    request_prefix: str | None = None  # where set, every row is a request of its own: prefix and row number


@dataclass(frozen=True, kw_only=True)
class RawEvents:
    """One source of events: its rows, what its columns are called in the file, and how to understand them."""

    rows: ir.Table  # order int64, then RAW_COLUMNS as text
    names: Mapping[str, str]  # raw column → the source's own name, in file order; only those the source has
    rules: Rules
    delimiter: str = ","  # between the fields of `raw` in the quarantine
    key: str = ""  # name under which reading.locate finds file and row of an `order`


@dataclass(frozen=True, kw_only=True)
class RawLog:
    """All that a reader found.

    `items`: item, category, title (text), one row an item or more (the first counts). `candidates`: request, item (text): what the logging
    policy could have shown. `files`: what was read, for the log's hash. `propensity` says what the propensities mean in a slate.
    """

    events: tuple[RawEvents, ...]
    files: tuple[Path, ...]
    items: ir.Table | None = None
    candidates: ir.Table | None = None
    propensity: Propensity = Propensity.NONE
    notes: dict[str, str] = field(default_factory=dict)
