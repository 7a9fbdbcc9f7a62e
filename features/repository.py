"""A Feast repository on disk: written, registered, materialised and opened, quietly and wherever the folder stands.

    feast/  feature_store.yaml  repository.py (for the `feast` command)  registry.db  offline/NAME.parquet  online_store.db (SQLite only)

Every path inside is relative to the folder, so it can be moved, and opening it for reading writes nothing into it.
"""

import atexit
import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from features.definitions import HISTORY, LENGTH_TAG, USER_VIEW, definitions
from longtrail.config import FeatureSettings, SparkSettings
from longtrail.errors import LongtrailError
from longtrail.files import atomic_file

ONLINE_FILE = "online_store.db"
_CONFIG_FILE = "feature_store.yaml"
_SERVED = {"type": "features.asof.AsOfDuckDBOfflineStore"}
_BATCH_ENGINE = "features.materialising.StreamingComputeEngine"
_WRITE_BATCH = 1_000  # users a write to the online store: bounds memory (Feast's default is all at once)

_FEAST_COMMAND = '''"""What the `feast` command registers from this folder."""

from features.definitions import definitions

globals().update({{feature.name: feature for feature in definitions({length})}})
'''


class FeatureStoreError(LongtrailError):
    """A Feast repository is missing or damaged, its online store cannot be reached, or a join returned other rows than it was asked for."""


def write_repository(folder: Path, project: str, settings: FeatureSettings, spark: SparkSettings | None = None) -> None:
    """Write feature_store.yaml and repository.py of a new repository. `project` prefixes every online key: letters, digits and underscores.

    `spark` says how Spark is started where `settings.offline_store` asks for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    online: dict[str, Any] = {"type": "sqlite", "path": ONLINE_FILE}
    if settings.online_store == "redis":
        online = {"type": "redis", "connection_string": settings.redis_address}
    config = {
        "project": project,
        "provider": "local",
        "registry": {"registry_type": "file", "path": "registry.db"},
        "offline_store": _SERVED if settings.offline_store == "duckdb" else _spark_store(spark or SparkSettings()),
        "online_store": online,
        "entity_key_serialization_version": 3,
        "materialization": {"online_write_batch_size": _WRITE_BATCH},
    }
    with atomic_file(folder / _CONFIG_FILE) as aside:
        aside.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    with atomic_file(folder / "repository.py") as aside:
        aside.write_text(_FEAST_COMMAND.format(length=settings.online_history_length), encoding="utf-8")


def _spark_store(settings: SparkSettings) -> dict[str, Any]:
    from longtrail.engines.spark import context_options

    conf = {"spark.sql.shuffle.partitions": str(settings.shuffle_partitions)} | context_options(settings)
    return {"type": "features.spark_store.SparkFileOfflineStore", "spark_conf": conf}


def open_repository(folder: Path, *, online: dict[str, Any] | None = None, offline: bool = False, batch_engine: str = "local") -> Any:
    """The `feast.FeatureStore` of `folder`; `online` overrides keys of its online store's settings (a path or an address, say).

    Only with `offline` is the offline store the one it names: else it is DuckDB's, so that who reads the online store needs no Spark.

    `${NAME}` in feature_store.yaml is read from the environment, as the `feast` command does: a password need not stand in a file.
    Raises FeatureStoreError where `folder` is not a repository.
    """
    folder = Path(folder).absolute()
    try:
        config = yaml.safe_load(os.path.expandvars((folder / _CONFIG_FILE).read_text(encoding="utf-8")))
        config["online_store"] |= online or {}
        config["batch_engine"] = batch_engine
        if not offline:
            config["offline_store"] = _SERVED
    except FileNotFoundError:
        raise FeatureStoreError(f"{folder}: no {_CONFIG_FILE}; expected the feast folder that build_features writes") from None
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise FeatureStoreError(f"{folder / _CONFIG_FILE}: not a Feast configuration: {error!r}") from None
    with quiet_feast():
        from feast import FeatureStore, RepoConfig

        config["registry"]["path"] = str(folder / config["registry"]["path"])
        return FeatureStore(repo_path=str(folder), config=RepoConfig(repo_path=folder, **config))


def apply(folder: Path, online_history_length: int) -> None:
    """Register the definitions and make the online tables. Needs the offline files; doing it twice changes nothing."""
    with quiet_feast():
        open_repository(folder).apply(definitions(online_history_length))


def materialise(folder: Path) -> None:
    """Copy the newest row of every user to the online store. Doing it twice changes nothing. Raises FeatureStoreError if it cannot be reached."""
    store = open_repository(folder, offline=True, batch_engine=_BATCH_ENGINE)
    with quiet_feast(), reachable(getattr(store.config.online_store, "connection_string", "")):
        store.materialize(datetime(1970, 1, 1, tzinfo=UTC), _newest(folder), feature_views=[HISTORY, USER_VIEW])


def _newest(folder: Path) -> datetime:
    """The newest timestamp of what is materialised: where `feast materialize-incremental` goes on from."""
    import duckdb

    with duckdb.connect() as connection:
        files = [str(folder / "offline" / f"{view}.parquet") for view in (HISTORY, USER_VIEW)]
        rows = connection.execute("SELECT epoch_us(max(timestamp)) FROM read_parquet($files, union_by_name = true)", {"files": files}).fetchall()
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=rows[0][0])


def newest_available(folder: Path) -> int:
    """When the newest event of the offline histories became available, UTC µs; 0 without any."""
    import duckdb

    with duckdb.connect() as connection:
        file = {"file": str(folder / "offline" / f"{HISTORY}.parquet")}
        rows = connection.execute("SELECT epoch_us(max(created)) FROM read_parquet($file)", file).fetchall()
    return int(rows[0][0] or 0)


def online_history_length(store: Any) -> int:
    """Events of each user that the online store keeps."""
    return int(store.get_feature_view(HISTORY).tags[LENGTH_TAG])


@contextlib.contextmanager
def duckdb_for_feast(memory_limit: str, threads: int, spill: Path) -> Iterator[None]:
    """Bounds the DuckDB that Feast's offline store works in, by way of Ibis's default backend: beyond `memory_limit` it spills to `spill`."""
    import ibis

    before = ibis.options.default_backend
    backend = ibis.duckdb.connect(":memory:", memory_limit=memory_limit, threads=threads, temp_directory=str(spill))
    ibis.set_backend(backend)
    try:
        yield
    finally:
        ibis.options.default_backend = before
        backend.disconnect()


def ensure_duckdb() -> None:
    """The same for a process that set no bounds: spill to the system's temporary folder, not the working directory, and end quietly."""
    import ibis

    if ibis.options.default_backend is not None:
        return
    backend = ibis.duckdb.connect(":memory:", temp_directory=str(Path(tempfile.gettempdir()) / f"longtrail-duckdb-{os.getpid()}"))
    ibis.set_backend(backend)

    def end() -> None:
        ibis.options.default_backend = None
        backend.disconnect()  # a connection that outlives the interpreter makes DuckDB's binding print a page of complaints

    atexit.register(end)


@contextlib.contextmanager
def reachable(address: str) -> Iterator[None]:
    """Turns a Redis that does not answer into a FeatureStoreError that names its `address`."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "redis":
            raise
        host = address.partition(",")[0]  # what follows may hold a password
        raise FeatureStoreError(f"online store: Redis at features.redis_address {host}: {error}") from error


@contextlib.contextmanager
def quiet_feast() -> Iterator[None]:
    """No telemetry, no warnings, no chatter on stdout while Feast works."""
    os.environ.setdefault("FEAST_USAGE", "False")
    os.environ.setdefault("POSTHOG_DISABLED", "1")
    logging.getLogger("feast").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
