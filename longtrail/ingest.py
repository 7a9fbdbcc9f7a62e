"""A raw log to the four tables, the quarantine and the counts: Ibis expressions, run by the engine that `ingest.engine` names.

Nothing of the size of the log is ever in Python's memory: rows go from file to the engine, which spills to disk beyond its memory, and
from there in blocks to Parquet. Equal input gives equal bytes, whichever the engine.
"""

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from longtrail.blocks import blocks
from longtrail.config import Dataset, IngestSettings
from longtrail.datasets import derive
from longtrail.datasets.checks import Fault, check, raw_text
from longtrail.datasets.fetching import hash_files
from longtrail.datasets.raw import RawEvents, RawLog
from longtrail.datasets.sources import read_dataset
from longtrail.engines import Engine, open_engine
from longtrail.errors import DatasetError, QuarantineError
from longtrail.files import atomic_directory, atomic_file, write_json
from longtrail.schema import CANDIDATES, IMPRESSIONS, INTERACTIONS, ITEMS, PROPENSITY_METADATA, QUARANTINE, USERS, Table

log = logging.getLogger(__name__)

ROW_GROUP = 1 << 18  # rows; fixed, so that equal tables are equal files
SOURCE_ROWS = 1 << 48  # `order` of source s starts at s times this
DUPLICATE_EVENT = "duplicate of an earlier row (same user, item, timestamp and action)"
DUPLICATE_IMPRESSION = "duplicate of an earlier row (same request and position)"


def ingest(
    dataset: Dataset, settings: IngestSettings, tables: Path, *, cache: Path = Path("data"), origin: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write `tables` (a folder, whole or not at all) and return its counts, as in counts.json.

    `origin` is what counts.json says of where the log came from, where that is more than `dataset.source` (components.source).

    Raises DatasetError if the source cannot be read, QuarantineError if more rows than `max_quarantined_share` were rejected; the
    rejected rows are then written beside `tables` (rejected_file), so that they can be looked at.
    """
    rejected_file(tables).unlink(missing_ok=True)
    with atomic_directory(tables) as out:
        work = out / "work"
        engine = open_engine(work, settings)
        try:
            raw = read_dataset(engine, dataset, work / "files", cache)
            counts = _ingest(engine, raw, settings, out, tables)
        finally:
            engine.disconnect()
        counts["dataset"] = {"kind": dataset.kind, "source": getattr(dataset, "source", dataset.kind), **(origin or {})}
        write_json(out / "counts.json", counts)
        shutil.rmtree(work)
    log.info(
        "%d interactions, %d impressions, %d users, %d items: %s", *(counts[k] for k in ("interactions", "impressions", "users", "items")), tables
    )
    return counts


def rejected_file(tables: Path) -> Path:
    """Where the quarantine goes when it is too large for the tables to be written."""
    return tables.with_name(f"{tables.name}.quarantine.parquet")


def _ingest(engine: Engine, raw: RawLog, settings: IngestSettings, out: Path, tables: Path) -> dict[str, Any]:
    read = sum(sum(engine.read_rows(source.key)) for source in raw.events)
    if read == 0:
        raise DatasetError(f"{_names(raw.files)}: a header but no rows; expected at least one row")
    log.info("read %s rows", f"{read:,}")
    checked, faults = _check(engine, raw.events)
    user_codes = engine.create_table("user_codes", derive.codes(checked, "user_key", "user_code"))
    item_codes = engine.create_table("item_codes", derive.codes(checked, "item_key", "item_code"))
    coded = engine.create_table("coded", derive.code(checked, user_codes, item_codes))
    repeated = engine.create_table("repeated", derive.duplicates(coded))
    quarantine = _quarantine(engine, raw.events, checked, faults, repeated)
    by_reason = quarantine.group_by("reason").agg(n=quarantine.count()).order_by("reason")
    reasons = {row["reason"]: row["n"] for row in engine.fetch(by_reason).to_pylist()}
    rejected = sum(reasons.values())
    if rejected > settings.max_quarantined_share * read or rejected == read:
        write_table(engine, _in_file_order(quarantine), QUARANTINE, rejected_file(tables))
        listed = _listed(reasons, _first_places(engine, quarantine))
        raise QuarantineError(_too_many(raw, listed, rejected, read, settings, rejected_file(tables)))
    _check_click_actions(engine, raw.events, checked)
    log.info("accepted %s rows, quarantined %s", f"{read - rejected:,}", f"{rejected:,}")
    if rejected:
        log.info("quarantined:\n%s", _listed(reasons, _first_places(engine, quarantine)))
    events = engine.create_view("events", coded.anti_join(repeated, "order"))
    counts = _write(engine, raw, events, user_codes, item_codes, out)
    write_table(engine, _in_file_order(quarantine), QUARANTINE, out / "quarantine.parquet")
    return {"rows_read": read, "rows_accepted": read - rejected, "rows_quarantined": rejected, "reasons": reasons, **counts}


def _check(engine: Engine, sources: Sequence[RawEvents]) -> tuple[ir.Table, list[list[Fault]]]:
    """The typed rows of all sources in one table, and each source's faults."""
    typed, faults = [], []
    for number, source in enumerate(sources):
        rows, found = check(source)
        typed.append(rows.mutate(order=rows.order + number * SOURCE_ROWS))
        faults.append(found)
    return engine.create_table("checked", ibis.union(*typed) if len(typed) > 1 else typed[0]), faults


def _check_click_actions(engine: Engine, sources: Sequence[RawEvents], checked: ir.Table) -> None:
    """Actions that should be clicks and that no row has are a misspelling, or an action that was rare. Raises DatasetError where none is there."""
    wanted = [action for source in sources if source.rules.click_from == "action" for action in source.rules.click_actions]
    if not wanted:
        return
    there = engine.fetch(checked.filter(checked.fault == 0).select("action").distinct().order_by("action"))["action"].to_pylist()
    if missing := [action for action in wanted if action not in there]:
        message = f"dataset.click_actions: no row has the action {' or '.join(map(repr, missing))}; the log has {', '.join(map(repr, there))}"
        if missing == wanted:
            raise DatasetError(f"{message}; expected one of them, else nothing is a click")
        log.warning("%s", message)


def _quarantine(engine: Engine, sources: Sequence[RawEvents], checked: ir.Table, faults: list[list[Fault]], repeated: ir.Table) -> ir.Table:
    """QUARANTINE rows of all sources, with the place of their source (`source`, int8)."""
    faulty = checked.filter(checked.fault > 0)
    parts = []
    for number, (source, found) in enumerate(zip(sources, faults, strict=True)):
        low, high = number * SOURCE_ROWS, (number + 1) * SOURCE_ROWS
        named = [(source.names.get(f.column, f.column), f.reason) for f in found]
        bad = faulty.filter(faulty.order >= low, faulty.order < high)
        wrong = bad.select(
            place=bad.order - low,
            field=_pick(bad.fault, [field for field, _ in named]),
            reason=_pick(bad.fault, [reason for _, reason in named]),
        )
        again = repeated.filter(repeated.order >= low, repeated.order < high)
        again = again.select(
            place=again.order - low,
            field=ibis.literal("row"),
            reason=again.by_place.ifelse(DUPLICATE_IMPRESSION, DUPLICATE_EVENT),
        )
        rejected = engine.create_table(f"rejected_{number}", wrong.union(again))
        rows = source.rows.mutate(raw=raw_text(source)).join(rejected, [("order", "place")]).select("order", "field", "reason", "raw")
        parts.append(engine.locate(source.key, rows).mutate(source=ibis.literal(number, "int8")))
    return engine.create_table("quarantine", ibis.union(*parts) if len(parts) > 1 else parts[0])


def _pick(fault: ir.IntegerValue, texts: Sequence[str]) -> ir.StringValue:
    return ibis.cases(*((fault == place, text) for place, text in enumerate(texts, 1)))


def _in_file_order(quarantine: ir.Table) -> ir.Table:
    return quarantine.order_by("source", "file", "row").select(*QUARANTINE.names)


def _write(engine: Engine, raw: RawLog, events: ir.Table, user_codes: ir.Table, item_codes: ir.Table, out: Path) -> dict[str, Any]:
    """Write all tables but the quarantine; the counts that come of them."""
    users = engine.create_table("users", derive.users_table(events, user_codes))
    items = engine.create_table("items_without_category_id", derive.items_table(events, item_codes, raw.items, raw.candidates))
    items = engine.create_table("items_table", derive.with_category_id(items))
    counts: dict[str, Any] = {}
    for table, rows, metadata in (
        (INTERACTIONS, derive.interactions(events, users, items), {}),
        (IMPRESSIONS, derive.impressions(events, users, items), {PROPENSITY_METADATA: raw.propensity.value}),
        (USERS, users.order_by("user_id"), {}),
        (ITEMS, items.order_by("item_id"), {}),
    ):
        counts[table.name] = write_table(engine, rows, table, out / f"{table.name}.parquet", **metadata)
        log.info("wrote %s %s", f"{counts[table.name]:,}", table.name)
    if raw.candidates is not None:
        offered = engine.fetch(raw.candidates.agg(n=raw.candidates.count()))["n"][0].as_py()
        counts["candidates"] = write_table(engine, derive.candidate_rows(raw.candidates, events, items), CANDIDATES, out / "candidates.parquet")
        counts["candidates_dropped"] = offered - counts["candidates"]
    done = events.filter(events.is_interaction).select("action").distinct().order_by("action")
    span = engine.fetch(events.agg(first=events.timestamp.min(), last=events.timestamp.max())).to_pylist()[0]
    return {
        **counts,
        "source_sha256": hash_files(raw.files),
        "categories": engine.fetch(items.agg(most=items.category_id.max()))["most"][0].as_py() or 0,
        "actions": engine.fetch(done)["action"].to_pylist(),
        "propensity": raw.propensity.value,
        "first": _iso(span["first"]),
        "last": _iso(span["last"]),
    }


def write_table(engine: Engine, rows: ir.Table, table: Table, path: Path, **metadata: str) -> int:
    """Stream `rows` (columns of `table` by name; times as int64 µs) to Parquet in exactly the table's schema; the number of rows."""
    schema = table.arrow(**metadata)
    written = 0
    with atomic_file(path) as aside, pq.ParquetWriter(aside, schema, compression="zstd") as writer:
        for block in _blocks(engine.stream(rows.select(*table.names), ROW_GROUP)):
            writer.write_table(_conform(block, schema), row_group_size=ROW_GROUP)
            written += block.num_rows
    return written


def _blocks(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The rows in blocks of ROW_GROUP, whatever the sizes of the batches: the engine's depend on its threads."""
    return blocks(batches, ROW_GROUP)


def _conform(block: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = []
    for field in schema:
        column = block[field.name].cast(field.type)
        if column.null_count and not field.nullable:
            raise AssertionError(f"{schema.metadata[b'table'].decode()}.{field.name} holds nulls: a check let them through")
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def _iso(micros: int) -> str:
    return datetime.fromtimestamp(micros / 1e6, UTC).isoformat()


def _names(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _first_places(engine: Engine, quarantine: ir.Table) -> dict[str, str]:
    """Where the first row of each reason stands. Not what it holds, which may be about people."""
    place = ibis.row_number().over(group_by="reason", order_by=["source", "file", "row"])
    first = engine.fetch(quarantine.mutate(place=place).filter(lambda table: table.place == 0).select("reason", "file", "row", "field"))
    return {
        found["reason"]: f"{found['file']}, row {found['row']}{'' if found['field'] == 'row' else ', column ' + repr(found['field'])}"
        for found in first.to_pylist()
    }


def _listed(reasons: dict[str, int], places: dict[str, str]) -> str:
    ordered = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
    return "\n".join(f"  - {n:,} × {reason}; first: {places[reason]}" for reason, n in ordered)


def _too_many(raw: RawLog, listed: str, rejected: int, read: int, settings: IngestSettings, kept: Path) -> str:
    found, allowed = (f"{share:.1%}" for share in (rejected / read, settings.max_quarantined_share))
    if found == allowed:
        found, allowed = f"{rejected / read:.3%}", f"{settings.max_quarantined_share:.3%}"
    return (
        f"{_names(raw.files)}: {rejected:,} of {read:,} rows were rejected ({found}), more than "
        f"ingest.max_quarantined_share ({allowed}) allows; the rows are in {kept}:\n{listed}"
    )
