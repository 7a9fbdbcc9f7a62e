"""Step `build_features`: the history store, Feast's repository with its online store, and pointer examples for train, valid and test."""

import hashlib
import json
import logging
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from components.command import run
from components.labels import Split, divide, write_examples, write_targets
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
    users = pq.read_metadata(tables / "users.parquet").num_rows
    hashes = {"tables": _tables_hash(tables), "feature_definitions": definitions_hash()}
    feast, spill = out / "feast", out / ".spill"
    limits = (config.ingest.memory_limit, config.ingest.threads, spill)
    with sources.duckdb_session(*limits) as connection, duckdb_for_feast(*limits):
        split = divide(tables, config.split, users)
        shards = config.features.history_shards
        store = build_history(tables / "interactions.parquet", out / "history", users=users, actions=counts["actions"], shards=shards)
        catalogue, prior = _catalogue(connection, tables, split, store)
        pq.write_table(catalogue, out / "catalogue.parquet", compression="zstd")
        log.info("history store: %s events of %s users", f"{store.events:,}", f"{users:,}")
        offline = feast / "offline"
        _write_sources(config, tables, offline, spill / "engine")
        length = config.features.online_history_length
        sources.write_histories(connection, store, offline / f"{definitions.CLOCK}.parquet", length, offline / f"{definitions.HISTORY}.parquet")
        log.info("Feast: sources of %d views written", len(sources.COUNTS) + 1)
        write_repository(feast, project_name(hashes, config.features), config.features, config.ingest.spark)
        apply(feast, length)
        point_in_time = PointInTime(feast)
        rows: dict[str, Any] = write_examples(connection, point_in_time, tables, split, out / "examples")
        for name, targets in write_targets(connection, point_in_time, tables, split, out / "targets").items():
            rows[name]["targets"] = targets
        materialise(feast)
        OnlineFeatures(feast).remember_snapshot()
        log.info("Feast: online store (%s) holds the newest %d events of each user", config.features.online_store, length)
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


def _write_sources(config: Config, tables: Path, offline: Path, folder: Path) -> None:
    from longtrail.engines import open_engine

    engine = open_engine(folder, config.ingest)
    try:
        for view in sources.COUNTS:
            sources.write_cumulative(engine, view, tables, offline / f"{view}.parquet")
    finally:
        engine.disconnect()


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


def _catalogue(connection: Any, tables: Path, split: Split, store: HistoryStore) -> tuple[pa.Table, float]:
    """The catalogue table, and the click rate of the training impressions (0 where there are none)."""
    items = connection.sql(f"SELECT * FROM read_parquet({sources.literal(tables / 'items.parquet')}) ORDER BY item_id").to_arrow_table()
    count = items.num_rows
    shown = pq.read_table(tables / "impressions.parquet", columns=["item_id", "click"])
    shown_n, clicked_n, training_n = shown["item_id"].to_numpy(), shown["click"].to_numpy() == 1, split.impressions == TRAIN
    done_n = pq.read_table(tables / "interactions.parquet", columns=["item_id"])["item_id"].to_numpy()

    def per_item(items_n: np.ndarray) -> pa.Array:
        return pa.array(np.bincount(items_n, minlength=count + 1)[1:].astype(np.int64))

    counts = {
        "train_events": pa.array(_training_events(store, split.lengths, count)[1:]),
        "train_impressions": per_item(shown_n[training_n]),
        "train_clicks": per_item(shown_n[training_n & clicked_n]),
        "item_events": per_item(done_n),
        "item_impressions": per_item(shown_n),
        "item_clicks": per_item(shown_n[clicked_n]),
    }
    columns = [counts[name] if name in counts else items[name] for name in CATALOGUE.names]
    prior = float(clicked_n[training_n].mean()) if training_n.any() else 0.0
    return pa.table(columns, names=CATALOGUE.names).cast(CATALOGUE.arrow()), prior


def _training_events(store: HistoryStore, lengths: np.ndarray, items: int) -> np.ndarray:
    """int64 [N + 1]: events with each item among the first `lengths` of every user."""
    total = np.zeros(items + 1, dtype=np.int64)
    for users in np.array_split(np.arange(1, store.users + 1), max(store.events // 2_000_000, 1)):
        total += np.bincount(store.flat(users, lengths[users]).items, minlength=items + 1)
    return total


def _iso(split: Split, bound: int) -> str | None:
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
