"""Every table Longtrail reads or writes: column names, types, bounds and meaning. The one place.

The Parquet schemas, the Great Expectations suites, the Feast fields and the service's request models are all derived from these
objects, so that they cannot drift apart. Dense ids start at 1; 0 is padding and never stands in a table. Times are UTC, in microseconds.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import pyarrow as pa

PADDING_ID = 0
EARLIEST = 631_152_000_000_000  # 1990-01-01 UTC in µs: no log of clicks is older, so a smaller number is in another unit


class Kind(Enum):
    """A column's type, named once and mapped to every system's own name for it."""

    INT8 = "int8"
    INT32 = "int32"
    INT64 = "int64"
    FLOAT32 = "float32"
    FLOAT64 = "float64"
    STRING = "string"
    TIMESTAMP = "timestamp"

    @property
    def arrow(self) -> pa.DataType:
        return pa.timestamp("us", tz="UTC") if self is Kind.TIMESTAMP else getattr(pa, self.value)()


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column. `minimum`, `maximum` (inclusive) and `allowed` bound its values; None means unbounded."""

    name: str
    kind: Kind
    meaning: str
    nullable: bool = False
    minimum: float | None = None
    maximum: float | None = None
    allowed: tuple[Any, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table: what a row is, its columns in order, and the columns that together identify a row (empty: none do)."""

    name: str
    row: str
    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    def __getitem__(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(f"table {self.name} has no column {name!r}; it has {', '.join(self.names)}")

    def arrow(self, **metadata: str) -> pa.Schema:
        """The Parquet schema; `metadata` is stored with the file (see PROPENSITY_METADATA)."""
        fields = [pa.field(c.name, c.kind.arrow, nullable=c.nullable, metadata={"meaning": c.meaning}) for c in self.columns]
        return pa.schema(fields, metadata={"table": self.name, **metadata})


def _user_id() -> Column:
    return Column(name="user_id", kind=Kind.INT64, minimum=1, meaning="dense user id")


def _item_id() -> Column:
    return Column(name="item_id", kind=Kind.INT64, minimum=1, meaning="dense item id")


def _timestamp() -> Column:
    return Column(name="timestamp", kind=Kind.TIMESTAMP, meaning="when it happened")


def _available_at() -> Column:
    return Column(
        name="available_at",
        kind=Kind.TIMESTAMP,
        meaning="when the row could first be read: the later of `timestamp` and the time the log says it was written",
    )


INTERACTIONS = Table(
    name="interactions",
    row="something a user did",
    columns=(
        _user_id(),
        _item_id(),
        _timestamp(),
        _available_at(),
        Column(name="action", kind=Kind.STRING, meaning="what was done: click, view, rated_4, …"),
        Column(name="value", kind=Kind.FLOAT32, nullable=True, meaning="its strength, where it has one: a rating, seconds watched"),
    ),
)

IMPRESSIONS = Table(
    name="impressions",
    row="an item shown to a user",
    columns=(
        Column(name="request_id", kind=Kind.STRING, meaning="the list (slate) the item was shown in"),
        _user_id(),
        _item_id(),
        _timestamp(),
        _available_at(),
        Column(name="position", kind=Kind.INT32, minimum=1, meaning="place in the list, from 1 at the top"),
        Column(name="click", kind=Kind.INT8, allowed=(0, 1), meaning="1 if the user clicked (or liked) it"),
        Column(
            name="propensity",
            kind=Kind.FLOAT64,
            nullable=True,
            minimum=0.0,
            maximum=1.0,
            meaning="P(the logging policy shows this item at this position); in a slate conditional or marginal, see PROPENSITY_METADATA",
        ),
        Column(name="policy", kind=Kind.STRING, meaning="the logging policy (arm) that chose the item"),
    ),
    key=("request_id", "position"),
)

PROPENSITY_METADATA = "propensity"  # key in the Parquet metadata of an impressions file
PROPENSITY_SOURCE_METADATA = "propensity_source"  # "estimated" where nobody logged them; absent or anything else: logged
ESTIMATED = "estimated"


class Propensity(Enum):
    """What `impressions.propensity` means in a slate; estimators refuse the wrong one."""

    CONDITIONAL = "conditional"  # P(item at this position | the items above it): Plackett-Luce's natural log
    MARGINAL = "marginal"  # P(item at this position), summed over what may stand above it
    NONE = "none"  # not logged


ITEMS = Table(
    name="items",
    row="an item of the catalogue",
    columns=(
        _item_id(),
        Column(name="item_key", kind=Kind.STRING, meaning="the raw key in the log"),
        Column(name="category_id", kind=Kind.INT32, minimum=0, meaning="dense category id; 0 is unknown"),
        Column(name="category", kind=Kind.STRING, nullable=True, meaning="the raw category"),
        Column(name="title", kind=Kind.STRING, nullable=True, meaning="a name people know it by"),
        Column(name="first_seen", kind=Kind.TIMESTAMP, meaning="first time it stands in the log"),
        Column(name="popularity", kind=Kind.INT64, minimum=0, meaning="interactions in the whole log: descriptive, never a model's input"),
    ),
    key=("item_id",),
)

USERS = Table(
    name="users",
    row="a user",
    columns=(
        _user_id(),
        Column(name="user_key", kind=Kind.STRING, meaning="the raw key in the log"),
        Column(name="first_seen", kind=Kind.TIMESTAMP, meaning="first time they stand in the log"),
        Column(name="events", kind=Kind.INT64, minimum=0, meaning="interactions in the whole log: descriptive, never a model's input"),
    ),
    key=("user_id",),
)

QUARANTINE = Table(
    name="quarantine",
    row="a row of the log that was rejected",
    columns=(
        Column(name="file", kind=Kind.STRING, meaning="the file it came from"),
        Column(name="row", kind=Kind.INT64, nullable=True, minimum=1, meaning="its row there, from 1 after the header, where known"),
        Column(name="field", kind=Kind.STRING, meaning="the field at fault"),
        Column(name="reason", kind=Kind.STRING, meaning="what was wrong and what was expected"),
        Column(name="raw", kind=Kind.STRING, nullable=True, meaning="the row as it was read"),
    ),
)

CANDIDATES = Table(
    name="candidates",
    row="an item that the logging policy could have shown in a request (an optional table: only logs that recorded them have it)",
    columns=(
        Column(name="request_id", kind=Kind.STRING, meaning="the list (slate), as in impressions"),
        _item_id(),
    ),
    key=("request_id", "item_id"),
)

TABLES = (INTERACTIONS, IMPRESSIONS, ITEMS, USERS, QUARANTINE)

# Point-in-time statistics: counts over rows available strictly before the moment they are asked for.
USER_STATISTICS = ("user_impressions", "user_clicks")
ITEM_STATISTICS = ("item_events", "item_impressions", "item_clicks")


def _count(name: str) -> Column:
    return Column(name=name, kind=Kind.INT64, minimum=0, meaning=f"{name.replace('_', ' ')} available strictly before `timestamp`")


EXAMPLES = Table(
    name="examples",
    row="an impression as a pointer into the history store, with its point-in-time statistics",
    columns=(
        Column(name="request_id", kind=Kind.STRING, meaning="the list (slate) the item was shown in"),
        _user_id(),
        _item_id(),
        _timestamp(),
        Column(name="position", kind=Kind.INT32, minimum=1, meaning="place in the list, from 1 at the top"),
        Column(name="click", kind=Kind.INT8, allowed=(0, 1), meaning="the label"),
        Column(
            name="history_length",
            kind=Kind.INT64,
            minimum=0,
            meaning="events of the user available strictly before `timestamp`: the history is that long a prefix of theirs in the store",
        ),
        *(_count(name) for name in (*USER_STATISTICS, *ITEM_STATISTICS)),
    ),
)

TARGETS = Table(
    name="targets",
    row="a next item to be retrieved, as a pointer into the history store",
    columns=(
        _user_id(),
        Column(name="item_id", kind=Kind.INT64, minimum=1, meaning="the item the user acted on next"),
        _timestamp(),
        Column(
            name="history_length", kind=Kind.INT64, minimum=0,
            meaning="events of the user available strictly before `timestamp`; with leave-one-out, all that stand before this one",
        ),
    ),
)  # fmt: skip

CATALOGUE = Table(
    name="catalogue",
    row="an item as models and the service know it",
    columns=(
        *(ITEMS[name] for name in ("item_id", "item_key", "category_id", "category", "title", "first_seen")),
        Column(name="train_events", kind=Kind.INT64, minimum=0, meaning="interactions in the training period"),
        Column(name="train_impressions", kind=Kind.INT64, minimum=0, meaning="impressions in the training period"),
        Column(name="train_clicks", kind=Kind.INT64, minimum=0, meaning="clicks in the training period"),
        *(
            Column(name=name, kind=Kind.INT64, minimum=0, meaning=f"{name.replace('_', ' ')} at the end of the log: what the service starts from")
            for name in ITEM_STATISTICS
        ),
    ),
    key=("item_id",),
)
