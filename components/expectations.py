"""The expectations of every table: those the schema implies, and those on the log's distributions. Data, not Great Expectations objects.

Declared apart from the engine so that they can be read, listed and tested at once, and so that importing this costs nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from longtrail.config import ValidationSettings
from longtrail.schema import IMPRESSIONS, INTERACTIONS, ITEMS, USERS, Kind, Table

CHECKED = (INTERACTIONS, IMPRESSIONS, ITEMS, USERS)
SUMMARY = "summary"  # a one-row table of figures over the whole log, made by components.validate


class Severity(Enum):
    CRITICAL = "critical"  # a failure stops the pipeline
    WARNING = "warning"  # a failure is reported


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """One expectation. `type` is Great Expectations' own name for it, `arguments` are its arguments."""

    name: str
    table: str
    type: str
    severity: Severity = Severity.CRITICAL
    arguments: dict[str, Any] = field(default_factory=dict)
    says: str

    @property
    def column(self) -> str | None:
        pair = [self.arguments[key] for key in ("column", "column_A", "column_B") if key in self.arguments]
        return ", ".join(pair) or None


def schema_expectations(table: Table) -> Iterator[Expectation]:
    """What the schema says of a table: its columns in order, their types, bounds and values, and its key."""

    def expect(name: str, expectation: str, says: str, **arguments: Any) -> Expectation:
        return Expectation(name=f"{table.name}.{name}", table=table.name, type=expectation, arguments=arguments, says=says)

    yield expect("columns", "expect_table_columns_to_match_ordered_list", f"the columns are {', '.join(table.names)}", column_list=list(table.names))
    for column in table.columns:
        if column.kind not in (Kind.STRING, Kind.TIMESTAMP):
            kind = column.kind.value
            yield expect(f"{column.name}.type", "expect_column_values_to_be_of_type", f"{column.name} is {kind}", column=column.name, type_=kind)
        if not column.nullable:
            yield expect(f"{column.name}.present", "expect_column_values_to_not_be_null", f"{column.name} is never missing", column=column.name)
        if column.minimum is not None or column.maximum is not None:
            bounds = f"{'any' if column.minimum is None else column.minimum} to {'any' if column.maximum is None else column.maximum}"
            yield expect(
                f"{column.name}.bounds",
                "expect_column_values_to_be_between",
                f"{column.name} is from {bounds}",
                column=column.name,
                min_value=column.minimum,
                max_value=column.maximum,
            )
        if column.allowed is not None:
            yield expect(
                f"{column.name}.allowed",
                "expect_column_values_to_be_in_set",
                f"{column.name} is one of {', '.join(map(str, column.allowed))}",
                column=column.name,
                value_set=list(column.allowed),
            )
    if len(table.key) == 1:
        yield expect("key", "expect_column_values_to_be_unique", f"{table.key[0]} names one row", column=table.key[0])
    if {"timestamp", "available_at"} <= set(table.names):
        yield expect(
            "available_after_event",
            "expect_column_pair_values_a_to_be_greater_than_b",
            "no row could be read before it happened",
            column_A="available_at",
            column_B="timestamp",
            or_equal=True,
        )


def distribution_expectations(settings: ValidationSettings, *, has_impressions: bool) -> Iterator[Expectation]:
    """What a sane log looks like, as bounds on the summary table's figures."""

    def between(column: str, low: float | None, high: float | None, says: str, severity: Severity = Severity.CRITICAL) -> Expectation:
        name = f"{SUMMARY}.{column}"
        if name in settings.warn_only or column in settings.warn_only:
            severity = Severity.WARNING
        arguments = {"column": column, "min_value": low, "max_value": high}
        return Expectation(name=name, table=SUMMARY, type="expect_column_values_to_be_between", severity=severity, arguments=arguments, says=says)

    yield between("users", settings.min_users, None, f"at least {settings.min_users} users")
    yield between("items", settings.min_items, None, f"at least {settings.min_items} items")
    yield between("interactions", settings.min_events, None, f"at least {settings.min_events} interactions")
    yield between("unknown_users", 0, 0, "every user_id stands in the users table")
    yield between("unknown_items", 0, 0, "every item_id stands in the items table")
    yield between("time_disorder", 0, 0, "rows are in time order")
    yield between("duplicated_positions", 0, 0, "a request shows one item at each position")
    low, high = settings.median_history_length
    yield between("median_history_length", low, high, f"the median user has {low} to {high} events", Severity.WARNING)
    share = settings.max_duplicate_share
    yield between("repeated_interactions", 0, share, f"at most {share:.0%} of interactions repeat user, item, time and action", Severity.WARNING)
    share = settings.max_top_item_share
    yield between("top_item_share", 0, share, f"no item has more than {share:.0%} of all interactions", Severity.WARNING)
    share = settings.max_new_item_share
    yield between("new_item_share", 0, share, f"at most {share:.0%} of the items are first seen in the test period", Severity.WARNING)
    if has_impressions:
        low_rate, high_rate = settings.click_rate
        yield between("click_rate", low_rate, high_rate, f"the click rate is from {low_rate:g} to {high_rate:g}")


def all_expectations(settings: ValidationSettings, *, has_impressions: bool) -> list[Expectation]:
    """Every expectation of a run, table by table."""
    tables = [table for table in CHECKED if has_impressions or table is not IMPRESSIONS]
    return [e for table in tables for e in schema_expectations(table)] + list(distribution_expectations(settings, has_impressions=has_impressions))
