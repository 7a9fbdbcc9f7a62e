"""Step `build_features`: the history store, Feast's repository with its online store, and pointer examples for train, valid and test."""

import hashlib
import json
import logging
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from components.command import run
from components.labels import write_examples, write_targets
from features import definitions, sources
from features.online import OnlineFeatures, check_redis
from features.point_in_time import PointInTime
from features.repository import apply, duckdb_for_feast, materialise, write_repository
from longtrail.config import Config, FeatureSettings, load_config
from longtrail.errors import DatasetError, ValidationError
from longtrail.files import atomic_directory, hash_path, read_json, write_json
from longtrail.history import HistoryStore, build_history
from longtrail.schema import CATALOGUE, IMPRESSIONS, INTERACTIONS, ITEMS, USERS
from longtrail.splits import TRAIN

if TYPE_CHECKING:
    from longtrail.division import Split
    from longtrail.engines import Engine

log = logging.getLogger(__name__)
_READ = (INTERACTIONS, IMPRESSIONS, ITEMS, USERS)


def build_features(
    tables: Annotated[Path, typer.Option(help="the folder that ingest wrote")] = Path("build/tables"),
    validation: Annotated[Path, typer.Option(help="the folder that validate wrote; a failed result stops this step")] = Path("build/validation"),
    params: Annotated[Path, typer.Option(help="settings: sections `features`, `split` and `ingest`")] = Path("params.yaml"),
    features: Annotated[Path, typer.Option(help="output: histories, examples, targets, catalogue and the Feast repository")] = Path("build/features"),
) -> None:
    """Turn validated tables into everything that models learn from and the service reads.

    Raises ValidationError if the tables failed validation, DatasetError naming a table or column that is missing, EvaluationError where
    the log is too short to be split, FeatureStoreError where the online store cannot be reached. `features` is whole or as it was.
    """
    config = load_config(params)
    _check_validated(validation)
    counts = _check_tables(tables)
    if config.features.online_store == "redis":
        check_redis(config.features.redis_address)
    with atomic_directory(features) as out:
        _build(tables, config, counts, out)
    log.info("features are in %s", features)


def _build(tables: Path, config: Config, counts: dict[str, Any], out: Path) -> None:
    from longtrail.division import divide
    from longtrail.engines import open_engine

    users = pq.read_metadata(tables / "users.parquet").num_rows
    hashes = {"tables": _tables_hash(tables), "feature_definitions": definitions_hash()}
    feast, spill = out / "feast", out / ".spill"
    engine = open_engine(spill / "engine", config.ingest)
    try:
        split = divide(engine, tables, config.split, users)
        shards = config.features.history_shards
        store = build_history(tables / "interactions.parquet", out / "history", users=users, actions=counts["actions"], shards=shards)
        log.info("history store: %s events of %s users", f"{store.events:,}", f"{users:,}")
        catalogue, prior = _catalogue(engine, tables, split, store)
        pq.write_table(catalogue, out / "catalogue.parquet", compression="zstd")
        _write_repository(engine, tables, config, store, feast, project_name(hashes, config.features))
        with duckdb_for_feast(config.ingest.memory_limit, config.ingest.threads, spill):
            point_in_time = PointInTime(feast)
            rows: dict[str, Any] = write_examples(engine, point_in_time, split, out / "examples")
            for name, targets in write_targets(engine, point_in_time, split, out / "targets", store.events).items():
                rows[name]["targets"] = targets
            materialise(feast)
        OnlineFeatures(feast).remember_snapshot()
        log.info(
            "Feast: online store (%s) holds the newest %d events of each user", config.features.online_store, config.features.online_history_length
        )
    finally:
        engine.disconnect()
    shutil.rmtree(spill, ignore_errors=True)
    shutil.copyfile(tables / "users.parquet", out / "users.parquet")
    np.save(out / "train_lengths.npy", split.lengths)
    categories = int(catalogue["category_id"].to_numpy().max(initial=0))
    summary = {
        "sizes": {"items": catalogue.num_rows, "categories": categories, "actions": len(counts["actions"])},
        "users": users,
        "actions": counts["actions"],
        "prior_click_rate": prior,
        "split": {"kind": split.kind, "valid_from": _iso(split, 0), "test_from": _iso(split, 1), **rows},
        "hashes": hashes,
    }
    write_json(out / "features.json", summary)


def _write_repository(engine: "Engine", tables: Path, config: Config, store: HistoryStore, feast: Path, project: str) -> None:
    """Feast's sources, its configuration and its registry."""
    offline, length = feast / "offline", config.features.online_history_length
    for view in sources.COUNTS:
        sources.write_cumulative(engine, view, tables, offline / f"{view}.parquet")
    sources.write_histories(engine, store, offline / f"{definitions.CLOCK}.parquet", length, offline / f"{definitions.HISTORY}.parquet")
    log.info("Feast: sources of %d views written", len(sources.COUNTS) + 1)
    write_repository(feast, project, config.features, config.ingest.spark)
    apply(feast, length)


def definitions_hash() -> str:
    """Identifies what the features mean: the code that defines and computes them."""
    digest = hashlib.sha256()
    for file in (definitions.__file__, sources.__file__):
        digest.update(Path(file or "").read_bytes())
    return digest.hexdigest()


def project_name(hashes: dict[str, str], settings: FeatureSettings) -> str:
    """Feast's project, the namespace of every online key.

    Another log or another definition gets another namespace, so that on a shared Redis the service of the last build keeps its own
    histories while, and after, the next is built.
    """
    identity = json.dumps([hashes, settings.online_history_length], sort_keys=True)
    return f"longtrail_{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _tables_hash(tables: Path) -> str:
    digests = {table.name: hash_path(tables / f"{table.name}.parquet") for table in _READ}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _catalogue(engine: "Engine", tables: Path, split: "Split", store: HistoryStore) -> tuple[pa.Table, float]:
    """The catalogue table, and the click rate of the training impressions (0 where there are none)."""
    items = pq.read_table(tables / "items.parquet").sort_by("item_id")
    shown, done = engine.parquet(tables / "impressions.parquet"), engine.parquet(tables / "interactions.parquet")
    impressions, clicks = _per_item(engine, shown, items.num_rows)
    train_impressions, train_clicks = _per_item(engine, split.rows(IMPRESSIONS, TRAIN), items.num_rows)
    counts = {
        "train_events": _training_events(store, split.lengths, items.num_rows)[1:],
        "train_impressions": train_impressions,
        "train_clicks": train_clicks,
        "item_events": _per_item(engine, done.mutate(click=0), items.num_rows)[0],
        "item_impressions": impressions,
        "item_clicks": clicks,
    }
    columns = [pa.array(counts[name]) if name in counts else items[name] for name in CATALOGUE.names]
    prior = float(train_clicks.sum() / train_impressions.sum()) if train_impressions.any() else 0.0
    return pa.table(columns, names=CATALOGUE.names).cast(CATALOGUE.arrow()), prior


def _per_item(engine: "Engine", rows: Any, items: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N] each: rows and clicks of items 1..N."""
    counted = engine.fetch(rows.group_by("item_id").agg(n=rows.count(), clicks=rows.click.cast("int64").sum().cast("int64")))
    found = np.zeros((2, items + 1), dtype=np.int64)
    for total, name in zip(found, ("n", "clicks"), strict=True):
        total[counted["item_id"].to_numpy()] = counted[name].to_numpy()
    return found[0, 1:], found[1, 1:]


def _training_events(store: HistoryStore, lengths: np.ndarray, items: int) -> np.ndarray:
    """int64 [N + 1]: events with each item among the first `lengths` of every user."""
    total = np.zeros(items + 1, dtype=np.int64)
    for users in np.array_split(np.arange(1, store.users + 1), max(store.events // 2_000_000, 1)):
        total += np.bincount(store.flat(users, lengths[users]).items, minlength=items + 1)
    return total


def _iso(split: "Split", bound: int) -> str | None:
    if split.bounds is None:
        return None
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=split.bounds[bound])).isoformat()


def _check_validated(validation: Path) -> None:
    path = validation / "result.json"
    try:
        result = read_json(path)
    except FileNotFoundError:
        raise ValidationError(f"{path}: no such file; expected the result of validate: the tables must be validated before they are used") from None
    except ValueError as error:
        raise ValidationError(f"{path}: not JSON: {error}; run validate again") from None
    if not result.get("success"):
        failed = [e["name"] for e in result.get("expectations", []) if not e["success"] and e["severity"] == "critical"]
        raise ValidationError(f"{path}: validation failed ({', '.join(failed) or 'success is false'}); features are not built from such tables")


def _check_tables(tables: Path) -> dict[str, Any]:
    """counts.json; raises DatasetError that names a table, or its column, that is not there, or an empty one."""
    for table in _READ:
        path = tables / f"{table.name}.parquet"
        try:
            schema, rows = pq.read_schema(path), pq.read_metadata(path).num_rows
        except FileNotFoundError:
            raise DatasetError(f"{path}: no such file; expected the table {table.name}, as ingest writes it") from None
        except pa.ArrowInvalid as error:
            raise DatasetError(f"{path}: not a Parquet file: {error}") from None
        for column in table.columns:
            if column.name not in schema.names or schema.field(column.name).type != column.kind.arrow:
                found = schema.field(column.name).type if column.name in schema.names else "no such column"
                raise DatasetError(f"{path}: column {column.name}: {found}; expected {column.kind.arrow}")
        if rows == 0 and table is not IMPRESSIONS:
            raise DatasetError(f"{path}: no rows; expected at least one: features cannot be built from an empty log")
    try:
        return read_json(tables / "counts.json")
    except FileNotFoundError:
        raise DatasetError(f"{tables / 'counts.json'}: no such file; expected it beside the tables, as ingest writes it") from None


if __name__ == "__main__":
    run(build_features)
