"""Raw text to typed events, and what is wrong with the rows that cannot be. Ibis expressions only: they run on any engine.

A row has at most one fault: the first of the list that `faults` makes, in the order a reader of the row would meet them.
"""

from dataclasses import dataclass

import ibis
import ibis.expr.types as ir

from longtrail.datasets.raw import RAW_COLUMNS, RawEvents, Rules
from longtrail.engines.functions import to_microseconds, to_number
from longtrail.schema import EARLIEST

LATEST = 4_102_444_800_000_000  # 2100-01-01: fixed rather than "now", so that a log is read the same on any day
_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1}
_UNIT = {"s": "seconds since 1970", "ms": "milliseconds since 1970", "us": "microseconds since 1970", "iso": "ISO 8601 text"}
_FINITE = 3.4e38  # what a float32 can hold
_NEGATIVE = r"^-[0-9]+([.][0-9]+)?$"
_MISSING = ("", "nan", "none", "null", "\\n")  # how exports write a key that is not there


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What can be wrong with a row: where, what was expected, and the rows it holds for."""

    column: str  # raw column
    reason: str
    holds: ir.BooleanValue


def check(raw: RawEvents) -> tuple[ir.Table, list[Fault]]:
    """Typed events with `fault`: 0 where the row is good, else 1 + its place in the list of faults.

    Columns: order, user_key, item_key (string), timestamp, available_at (int64 µs), action (string), value (float32), click (int8),
    is_interaction, is_impression (bool), by_place (bool: a row is known by its place in a list), request (string), position (int32),
    propensity (float64), policy, category, title (string), fault (int8).
    """
    rules = raw.rules
    # a column the source does not have is a constant, which costs nothing to look at
    texts = {name: raw.rows[name].strip().nullif("") if name in raw.names else ibis.null("string") for name in RAW_COLUMNS}
    rows = raw.rows.select("order", **texts)
    rows = rows.mutate(
        timestamp_us=_microseconds(rows.timestamp, rules),
        written_us=_microseconds(rows.written_at, rules),
        number=to_number(rows.value),
        clicked=_zero_or_one(rows.click),
        place=to_number(rows.position),
        probability=to_number(rows.propensity),
    )
    faults = _faults(rows, raw)
    fault = ibis.cases(*((f.holds, i) for i, f in enumerate(faults, 1)), else_=0)
    click = _click(rows, rules)
    is_impression = rules.click_from != "nothing"
    events = rows.select(
        "order",
        user_key=rows.user,
        item_key=rows.item,
        timestamp=rows.timestamp_us,
        available_at=ibis.coalesce(ibis.greatest(rows.timestamp_us, rows.written_us), rows.timestamp_us),
        action=_action(rows, rules),
        value=rows.number.try_cast("float32"),
        click=click.cast("int8"),
        is_interaction=(click == 1) if rules.click_from == "column" else ibis.literal(True),
        is_impression=ibis.literal(is_impression),
        by_place=ibis.literal(is_impression and (rules.click_from == "column" or "position" in raw.names)),
        request=_request(rows, rules),
        position=(rows.place + (1 - rules.first_position)).try_cast("int32") if "position" in raw.names else ibis.null("int32"),
        propensity=rows.probability,
        policy=ibis.coalesce(rows.policy, ibis.literal(rules.policy)),
        category=rows.category,
        title=rows.title,
        fault=fault.cast("int8"),
    )
    return events, faults


def raw_text(raw: RawEvents) -> ir.StringValue:
    """The fields that were read, as they stood, in the file's order."""
    fields = [ibis.coalesce(raw.rows[name], ibis.literal("")) for name in raw.names]
    text = fields[0]
    for value in fields[1:]:
        text = text + ibis.literal(raw.delimiter) + value
    return text


def _faults(rows: ir.Table, raw: RawEvents) -> list[Fault]:
    rules, unit = raw.rules, _UNIT[raw.rules.timestamp_unit]
    found: list[Fault] = []

    def fault(column: str, reason: str, holds: ir.BooleanValue) -> None:
        found.append(Fault(column=column, reason=reason, holds=holds.fill_null(True)))

    for key in ("user", "item"):
        fault(key, f"missing {key}", rows[key].isnull() | rows[key].lower().isin(_MISSING))
        fault(key, f"negative {key} id; expected an id from 0, or any text", rows[key].startswith("-") & rows[key].re_search(_NEGATIVE))
    _time_faults(fault, rows, "timestamp", "timestamp_us", unit)
    if "written_at" in raw.names:
        given = rows.written_at.notnull()
        fault("written_at", f"time written is not {unit}", given & (rows.written_us.isnull() | ~rows.written_us.between(EARLIEST, LATEST)))
    if "action" in raw.names and rules.click_from != "column":
        fault("action", "missing action", rows.action.isnull())
    if "value" in raw.names:
        required = rules.click_from == "value" or rules.action_from_value is not None
        if required:
            fault("value", "missing value", rows.value.isnull())
        finite = rows.number.notnull() & ~rows.number.isnan() & (rows.number.abs() <= _FINITE)
        fault("value", "value is not a finite number", rows.value.notnull() & ~finite)
        if rules.value_bounds is not None:
            low, high = rules.value_bounds
            fault("value", f"value outside {low:g} to {high:g}", ~rows.number.between(low, high) & rows.value.notnull())
    if rules.click_from == "column":
        fault("click", "unknown label; expected 0 or 1", rows.clicked.isnull())
    if "request" in raw.names:
        fault("request", "missing request", rows.request.isnull())
    if "position" in raw.names:
        if rules.first_position == 1:
            fault("position", "position 0; expected one from 1, or dataset.first_position: 0", (rows.place == 0).fill_null(False))
        whole = (rows.place % 1 == 0) & rows.place.between(rules.first_position, 2**31 - 2)
        fault("position", f"position is not a whole number from {rules.first_position}", ~whole)
    if "propensity" in raw.names:
        probable = (rows.probability > 0) & (rows.probability <= 1) & ~rows.probability.isnan()
        fault("propensity", "propensity is not in (0, 1]", rows.propensity.notnull() & ~probable.fill_null(False))
    return found


def _time_faults(fault, rows: ir.Table, column: str, micros: str, unit: str) -> None:  # type: ignore[no-untyped-def]
    fault(column, f"missing {column}", rows[column].isnull())
    fault(column, f"unparsable time; expected {unit}", rows[micros].isnull())
    fault(column, f"time before 1990; is it {unit}?", rows[micros] < EARLIEST)
    fault(column, f"time after 2100; is it {unit}?", rows[micros] > LATEST)


def _microseconds(text: ir.StringValue, rules: Rules) -> ir.IntegerValue:
    """int64 µs since 1970, null where it is no such time, or one beyond int64."""
    if rules.timestamp_unit == "iso":
        return to_microseconds(text)
    number = to_number(text) * _PER_UNIT[rules.timestamp_unit]  # exact to the µs: 2^53 µs are 285 years
    return _whole(number + 0.5)


def _whole(number: ir.FloatingValue) -> ir.IntegerValue:
    """int64 towards zero; null where it is NaN or beyond int64. (Ibis's own round, floor and ceil cast, which fails on those.)"""
    return (number - number % 1).try_cast("int64")


def _zero_or_one(text: ir.StringValue) -> ir.IntegerValue:
    number = to_number(text)
    lower = text.lower()
    return ibis.cases(((number == 1) | (lower == "true"), 1), ((number == 0) | (lower == "false"), 0))


def _click(rows: ir.Table, rules: Rules) -> ir.IntegerValue:
    if rules.click_from == "column":
        return rows.clicked
    if rules.click_from == "value":
        return (rows.number >= rules.like_from).ifelse(1, 0)
    if rules.click_from == "action":
        return rows.action.isin(rules.click_actions).ifelse(1, 0)
    return ibis.null("int8")


def _action(rows: ir.Table, rules: Rules) -> ir.StringValue:
    if rules.action_from_value is not None:
        return ibis.literal(rules.action_from_value) + _whole(rows.number + (rows.number % 1 > 0).ifelse(1, 0)).cast("string")
    return ibis.coalesce(rows.action, ibis.literal(rules.action))


def _request(rows: ir.Table, rules: Rules) -> ir.StringValue:
    if rules.request_prefix is not None:
        return ibis.literal(rules.request_prefix) + (rows.order + 1).cast("string")
    return rows.request
