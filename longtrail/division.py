"""The splits of longtrail/splits.py as expressions of an engine: tables larger than memory, the same result to the row.

What is in memory is a number a user and some hundred thousand counts of spans of time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import ibis
import ibis.expr.types as ir
import numpy as np
from numpy.typing import NDArray

from longtrail.config import SplitSettings
from longtrail.engines.functions import microseconds_of
from longtrail.schema import IMPRESSIONS, INTERACTIONS, Table
from longtrail.splits import TEST, TRAIN, VALID, split_bounds

if TYPE_CHECKING:
    from longtrail.engines import Engine

_SPANS = 1 << 16  # spans of time that one pass over the log counts
_ROWS = 1 << 18  # rows of which each instant is counted, in the last pass

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which rows of the tables are in which split; `bounds` (µs) where it is global in time."""

    kind: str
    bounds: tuple[int, int] | None
    lengths: Ints  # [U + 1], events of each user in the training period
    rows: Callable[[Table, int], ir.Table]  # INTERACTIONS or IMPRESSIONS, code of a split → its rows, with `row`, their place in the table's file


class EngineInstants:
    """`longtrail.splits.Instants` of a column of moments: exact, by counting spans of time and then ever shorter ones."""

    def __init__(self, engine: "Engine", rows: ir.Table, column: str) -> None:
        self._engine = engine
        self._times = rows.select(time=microseconds_of(rows[column]))
        whole = self._times.agg(n=self._times.count(), first=self._times.time.min(), last=self._times.time.max())
        found = engine.fetch(whole).to_pylist()[0]
        self._n, self._first, self._last = found["n"], found["first"], found["last"]

    def count(self) -> int:
        return int(self._n)

    def at(self, place: int) -> tuple[int, int, int]:
        low, high, earlier, same = self._first, self._last + 1, 0, self._n
        while high - low > 1:  # the one sought is in low..high, with `earlier` rows before that span and `same` in it
            width = 1 if same <= _ROWS else -(-(high - low) // _SPANS)
            rows = self._times.filter(self._times.time >= low, self._times.time < high)
            past = rows.time - low
            spans = rows.select(start=past - past % width)  # (division is one of floats)
            counts = self._engine.fetch(spans.group_by("start").agg(n=spans.count()).order_by("start"))
            upto = earlier + np.cumsum(counts["n"].to_numpy())
            found = int(np.searchsorted(upto, place, side="right"))
            same = counts["n"][found].as_py()
            earlier = int(upto[found]) - same
            low += counts["start"][found].as_py()
            high = min(low + width, high)
        return low, earlier, same


def divide(engine: "Engine", tables: Path, settings: SplitSettings, users: int) -> Split:
    """Divide both tables. Raises EvaluationError where the log is too short for its splits."""
    found = {table.name: engine.parquet(tables / f"{table.name}.parquet", places=True) for table in (IMPRESSIONS, INTERACTIONS)}
    shown, done = found[IMPRESSIONS.name], found[INTERACTIONS.name]
    if settings.kind == "temporal":
        instants = EngineInstants(engine, shown, "timestamp")
        bounds = split_bounds(instants if instants.count() else EngineInstants(engine, done, "timestamp"), settings)
        lengths = _events_of_users(engine, done.filter(done.available_at < _moment(bounds[0])), users)
        return Split(kind=settings.kind, bounds=bounds, lengths=lengths, rows=lambda table, code: _between(found[table.name], bounds, code))
    held = {
        IMPRESSIONS.name: engine.create_table(f"held_{uuid4().hex[:12]}", _last_requests(shown)),
        INTERACTIONS.name: engine.create_table(f"held_{uuid4().hex[:12]}", _last_events(done)),
    }
    total = _events_of_users(engine, done, users)
    lengths = np.where(total >= 3, total - 2, total)
    return Split(kind=settings.kind, bounds=None, lengths=lengths, rows=lambda table, code: _held_out(found[table.name], held[table.name], code))


def _moment(micros: int) -> ir.TimestampScalar:
    return ibis.literal(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros))


def _between(rows: ir.Table, bounds: tuple[int, int], code: int) -> ir.Table:
    t1, t2 = (_moment(bound) for bound in bounds)
    time = rows.timestamp
    return rows.filter({TRAIN: time < t1, VALID: (time >= t1) & (time < t2), TEST: time >= t2}[code])


def _held_out(rows: ir.Table, held: ir.Table, code: int) -> ir.Table:
    return rows.anti_join(held, "row") if code == TRAIN else rows.semi_join(held.filter(held.split == code), "row")


def _events_of_users(engine: "Engine", rows: ir.Table, users: int) -> Ints:
    """int64 [users + 1]: rows of each user."""
    counted = engine.fetch(rows.group_by("user_id").agg(n=rows.count()))
    total = np.zeros(users + 1, dtype=np.int64)
    total[counted["user_id"].to_numpy()] = counted["n"].to_numpy()
    return total


def _last_events(done: ir.Table) -> ir.Table:
    """row and split of each user's last two interactions, in the order of the history store; see `longtrail.splits.leave_one_out`."""
    return _from_the_end(done, [done.available_at, done.timestamp, done.row]).select("row", "split")


def _last_requests(shown: ir.Table) -> ir.Table:
    """The same for impressions: each user's last two requests. Those of one instant stand in the order in which the file has them first."""
    first = shown.group_by("request_id").agg(first=shown.row.min())
    requests = shown.select("user_id", "timestamp", "request_id").distinct().join(first, "request_id")
    held = _from_the_end(requests, [requests.timestamp, requests["first"]]).select("user_id", "timestamp", "request_id", "split")
    return shown.join(held, ["user_id", "timestamp", "request_id"]).select("row", "split")


def _from_the_end(rows: ir.Table, order: list[ir.Value]) -> ir.Table:
    """The last (TEST) and last but one (VALID) of each user with at least 3."""
    newest_first = ibis.window(group_by="user_id", order_by=[key.desc() for key in order])
    ranked = rows.mutate(behind=ibis.row_number().over(newest_first), of=rows.count().over(ibis.window(group_by="user_id")))
    last = ranked.filter(ranked.behind < 2, ranked["of"] >= 3)
    return last.mutate(split=(last.behind == 0).ifelse(TEST, VALID).cast("int8"))
