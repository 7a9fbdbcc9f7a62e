"""The service's log as a data set: `python -m serving.export_log STATE OUT`.

STATE is the service's state folder ($LONGTRAIL_STATE; it may be in use), OUT a folder that is replaced:
  impressions.parquet  one row an item shown (user, item, timestamp, click, request, position, propensity, policy); the click came through /events
  candidates.parquet   one row an item that could have been shown (request, item): what an offline A/B test on this log needs
  events.parquet       events that were no click on a list (user, item, timestamp, action, value, written_at)
  dataset.yaml         the `dataset` section of params.yaml that reads the three
  assigned.parquet     for components.live_test: as impressions, of all lists of known users, fallbacks too (`fallback`: why; null for the arm's own).
                       `policy` is the arm that the user was assigned, whoever made the list
Keys are raw, times UTC, propensities conditional on the items above (of a fallback: 1, for it is the same list for everyone).
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer
import yaml

from longtrail.errors import DatasetError, LongtrailError
from longtrail.files import atomic_directory
from serving.answer_log import ANSWERS
from serving.event_log import FOLDER
from serving.event_records import COLUMNS, damaged_lines, read_events
from serving.lists import FALLBACK_ARM, UNKNOWN_USER
from serving.segments import SHOWN, load_answers, quoted

# A list stands for the arm that its user was assigned (intention to treat). Who is unknown gets the popular list whatever the arm, so it is no arm's.
_ASSIGNED = (
    "SELECT s.*, coalesce(a.assigned, a.arm) AS arm, a.fallback FROM everything s JOIN answers a ON a.request_id = s.request "
    f"WHERE a.fallback IS DISTINCT FROM '{UNKNOWN_USER}'"
)
_CLICKED = "(c.item IS NOT NULL)::TINYINT AS click"
_CLICKS = "LEFT JOIN clicked c ON c.request = s.request AND c.item = s.item ORDER BY s.timestamp, s.request, s.position"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Rows written, clicks that fit no shown item, and lines that a crash left torn; `fallbacks`: rows of `assigned` that no arm chose."""

    impressions: int
    clicks: int
    candidates: int
    events: int
    assigned: int
    fallbacks: int
    clicks_without_impression: int
    torn_lines: int


def export_log(state: Path, out: Path, *, fallback: bool = False) -> Exported:
    """Write OUT from STATE. impressions.parquet has lists of the popularity fallback only with `fallback`: they were no draw of a policy.

    Raises DatasetError where there is no log.
    """
    import duckdb

    events = state / "log" / FOLDER
    for place in (state / "log" / ANSWERS, events):
        if not place.exists():
            raise DatasetError(f"{place}: not there; expected the log of a service whose state folder is {state}")
    with duckdb.connect() as connection, atomic_directory(out) as aside:
        torn = load_answers(connection, state) + _read_events(connection, events)
        connection.execute("SET TimeZone = 'UTC'")
        kept = "" if fallback else f"WHERE arm <> '{FALLBACK_ARM}'"
        connection.execute(f"CREATE VIEW lists AS SELECT * FROM answers {kept}")
        connection.execute(f"CREATE VIEW shown AS {SHOWN} FROM lists")
        connection.execute(f"CREATE VIEW everything AS {SHOWN} FROM answers")
        connection.execute("CREATE TABLE clicked AS SELECT DISTINCT request, item FROM events WHERE request IS NOT NULL")
        impressions = _write(
            connection,
            f"SELECT s.user, s.item, s.timestamp, {_CLICKED}, s.request, s.position, s.propensity, s.policy FROM shown s {_CLICKS}",
            aside / "impressions.parquet",
        )
        assigned = _write(
            connection,
            f"SELECT s.user, s.item, s.timestamp, {_CLICKED}, s.request, s.position, s.propensity, s.arm AS policy, s.fallback "
            f"FROM ({_ASSIGNED}) s {_CLICKS}",
            aside / "assigned.parquet",
        )
        candidates = _write(
            connection,
            "SELECT request_id AS request, unnest(candidates) AS item FROM lists ORDER BY timestamp, request_id",
            aside / "candidates.parquet",
        )
        others = _write(
            connection,
            "SELECT user, item, make_timestamptz(timestamp) AS timestamp, action, value, make_timestamptz(written_at) AS written_at FROM events e "
            "WHERE NOT EXISTS (FROM shown s WHERE s.request = e.request AND s.item = e.item) ORDER BY written_at",
            aside / "events.parquet",
        )
        clicks = _count(connection, f"FROM read_parquet({quoted(aside / 'impressions.parquet')}) WHERE click = 1")
        fallbacks = _count(connection, f"FROM read_parquet({quoted(aside / 'assigned.parquet')}) WHERE fallback IS NOT NULL")
        stray = _count(connection, "FROM clicked c WHERE NOT EXISTS (FROM everything s WHERE s.request = c.request AND s.item = c.item)")
        (aside / "dataset.yaml").write_text(yaml.safe_dump(_dataset(out, events=others > 0), sort_keys=False), encoding="utf-8")
    return Exported(
        impressions=impressions,
        clicks=clicks,
        candidates=candidates,
        events=others,
        assigned=assigned,
        fallbacks=fallbacks,
        clicks_without_impression=stray,
        torn_lines=torn,
    )


def _read_events(connection: Any, folder: Path) -> int:
    """Table `events`; returns how many lines were no whole records."""
    kinds = {"timestamp": pa.int64(), "value": pa.float64(), "written_at": pa.int64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS[:-1]])
    batches = (pa.record_batch({name: [getattr(event, name) for event in chunk] for name in schema.names}, schema) for chunk in read_events(folder))
    connection.register("logged", pa.RecordBatchReader.from_batches(schema, batches))
    connection.execute("CREATE TABLE events AS FROM logged")
    return damaged_lines(folder)


def _write(connection: Any, query: str, path: Path) -> int:
    connection.execute(f"COPY ({query}) TO {quoted(path)} (FORMAT parquet, COMPRESSION zstd)")
    return _count(connection, f"FROM read_parquet({quoted(path)})")


def _count(connection: Any, rows: str) -> int:
    return int(connection.execute(f"SELECT count(*) {rows}").fetchall()[0][0])


def _dataset(out: Path, *, events: bool) -> dict[str, Any]:
    """Settings that read what was written; absolute, so that they hold wherever the pipeline runs."""
    out = out.absolute()
    dataset: dict[str, Any] = {
        "kind": "event_log",
        "source": str(out / "impressions.parquet"),
        "columns": {name: name for name in ("user", "item", "timestamp", "click", "request", "position", "propensity", "policy")},
        "timestamp_unit": "us",
        "propensity_kind": "conditional",
        "candidates": str(out / "candidates.parquet"),
    }
    if events:
        dataset["events"] = str(out / "events.parquet")
        dataset["event_columns"] = {name: name for name in ("user", "item", "timestamp", "action", "value", "written_at")}
    return {"dataset": dataset}


def main(
    state: Annotated[Path, typer.Argument(help="the service's state folder ($LONGTRAIL_STATE)")],
    out: Annotated[Path, typer.Argument(help="folder to write; what stands there is replaced")],
    fallback: Annotated[bool, typer.Option(help="impressions.parquet also has the lists of the popularity fallback")] = False,
) -> None:
    """Turn the service's log into impressions, candidates and events that ingest and ab_test read."""
    try:
        exported = export_log(state, out, fallback=fallback)
    except LongtrailError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in asdict(exported).items()), f"-> {out}")


if __name__ == "__main__":
    typer.run(main)
