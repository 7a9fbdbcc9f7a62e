"""An offline store for Feast: DuckDB with an as-of join.

Feast's own join pairs each label with *every* older row of its key and keeps the newest: 500 million pairs at MovieLens-1M. An as-of
join finds that row by sorting both sides: O(n log n). It is taken only where it is exact; everything else goes through Feast's join,
which is also the oracle in the tests. Files are found relative to the repository (Feast's DuckDB store looks in the working directory).

Named in feature_store.yaml as `offline_store: {type: features.asof.AsOfDuckDBOfflineStore}`; imported by Feast only.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import ibis
import pandas as pd
import pyarrow as pa
from feast.data_source import DataSource
from feast.feature_view import FeatureView
from feast.infra.offline_stores import ibis as feast_ibis
from feast.infra.offline_stores.duckdb import DuckDBOfflineStore, DuckDBOfflineStoreConfig, _write_data_source
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.offline_store import RetrievalJob
from feast.infra.offline_stores.offline_utils import infer_event_timestamp_from_entity_df
from feast.infra.registry.base_registry import BaseRegistry
from feast.repo_config import RepoConfig

from features.repository import ensure_duckdb
from features.sources import literal


class AsOfDuckDBOfflineStoreConfig(DuckDBOfflineStoreConfig):
    type: Literal["features.asof.AsOfDuckDBOfflineStore"] = "features.asof.AsOfDuckDBOfflineStore"
    join: Literal["asof", "feast"] = "asof"


def _read(source: DataSource | None, repo_path: str) -> Any:
    """The source's Parquet file as an Ibis table. Raises ValueError for any other kind of source."""
    if not isinstance(source, FileSource) or not source.path.endswith(".parquet"):
        raise ValueError(f"source {getattr(source, 'name', None)}: expected a Parquet file, got {source}")
    ensure_duckdb()
    return ibis.read_parquet(str(Path(repo_path) / source.path))


def _utc(column: Any) -> Any:
    return column.cast("timestamp('UTC', 6)")


def _is_exact(view: FeatureView, table: Any, by_created: bool) -> bool:
    """Whether an as-of join on the timestamp alone gives the view's point-in-time values."""
    source: Any = view.batch_source
    if view.ttl or source.field_mapping or view.projection.join_key_map:
        return False
    if not by_created or not source.created_timestamp_column:
        return True
    late = _utc(table[source.created_timestamp_column]) > _utc(table[source.timestamp_field])
    return not bool(table.aggregate(late=late.any().fill_null(False)).execute()["late"].iloc[0])


class StreamedJob(feast_ibis.IbisRetrievalJob):
    """An answer that need not be in memory as a whole."""

    def stream(self, order: str | None, size: int) -> Iterator[pa.RecordBatch]:
        """The rows by the column `order` (None: as they are found), in batches of about `size`; DuckDB sorts on disk where they are many."""
        backend, rows = ibis.get_backend(self.table), self.table if order is None else self.table.order_by(order)
        backend._run_pre_execute_hooks(rows)  # labels that are in memory
        yield from backend.con.sql(backend.compile(rows)).to_arrow_reader(size)


class AsOfDuckDBOfflineStore(DuckDBOfflineStore):
    """DuckDBOfflineStore with the as-of join; `join: feast` in its settings asks for Feast's."""

    @staticmethod
    def get_historical_features(  # type: ignore[override]
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
    ) -> RetrievalJob:
        """The newest row of each view at or before each entity row's timestamp; entity rows in any order, null where there is none."""
        repo_path = str(config.repo_path)
        sources = {view.name: _read(view.batch_source, repo_path) for view in feature_views}
        plain = not full_feature_names and config.offline_store.join == "asof"
        if not plain or not all(_is_exact(v, sources[v.name], filter_by_created_timestamp) for v in feature_views):
            job = feast_ibis.get_historical_features_ibis(
                config,
                feature_views,
                feature_refs,
                _labels(entity_df).execute() if isinstance(entity_df, str) else entity_df,
                registry,
                project,
                _read,
                _write_data_source,
                full_feature_names,
                filter_by_created_timestamp=filter_by_created_timestamp,
            )
            return _streamed(job.table, repo_path, job)  # type: ignore[attr-defined]
        labels = _labels(entity_df)
        stamp = infer_event_timestamp_from_entity_df(dict(labels.limit(0).execute().dtypes))  # type: ignore[arg-type]
        joined = labels.mutate(**{stamp: _utc(labels[stamp])})
        names = list(joined.columns)
        newest = joined[stamp].max().execute()
        for view in feature_views:
            prefix = f"{view.projection.name_to_use()}:"
            wanted = [ref.removeprefix(prefix) for ref in feature_refs if ref.startswith(prefix)]
            stamped = sources[view.name].filter(_utc(sources[view.name][view.batch_source.timestamp_field]) <= newest)  # type: ignore[union-attr]
            joined = _as_of(joined, stamped, view, stamp, wanted)
            names += wanted
        return _streamed(joined.select(names), repo_path)

    @staticmethod
    def pull_latest_from_table_or_query(  # type: ignore[override]
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """The newest row of each key in a span of time, in the order of the file: no sort of all rows where no two of a key are of one instant."""
        rows = _read(data_source, str(config.repo_path))
        time = _utc(rows[timestamp_field])
        rows = rows.filter(time >= ibis.literal(start_date.astimezone(UTC)), time <= ibis.literal(end_date.astimezone(UTC)))
        newest = rows.group_by(join_key_columns).agg(**{timestamp_field: rows[timestamp_field].max()})
        latest = rows.semi_join(newest, [*join_key_columns, timestamp_field])
        if latest.count().execute() != newest.count().execute():
            parts = (join_key_columns, feature_name_columns, timestamp_field, created_timestamp_column, start_date, end_date)
            job = _pull(feast_ibis.pull_latest_from_table_or_query_ibis, config, data_source, *parts)
            return _streamed(job.table, str(config.repo_path))  # type: ignore[attr-defined]
        names = [*join_key_columns, *feature_name_columns, timestamp_field, *([created_timestamp_column] if created_timestamp_column else [])]
        return _streamed(latest.select(names), str(config.repo_path))

    @staticmethod
    def pull_all_from_table_or_query(config: RepoConfig, *args: Any, **kwargs: Any) -> RetrievalJob:
        """As DuckDBOfflineStore's, with files relative to the repository."""
        return _pull(feast_ibis.pull_all_from_table_or_query_ibis, config, *args, **kwargs)


def _streamed(table: Any, repo_path: str, job: RetrievalJob | None = None) -> StreamedJob:
    return StreamedJob(
        table,
        job.on_demand_feature_views if job else [],
        job.full_feature_names if job else False,
        metadata=job.metadata if job else None,
        data_source_writer=_write_data_source,
        staging_location=None,
        staging_location_endpoint_override=None,
        repo_path=repo_path,
    )


def _pull(function: Any, config: RepoConfig, *args: Any, **kwargs: Any) -> RetrievalJob:
    return partial(function, data_source_reader=_read, data_source_writer=_write_data_source)(config, *args, **kwargs)


def labels_query(labels: Path, columns: Sequence[str]) -> str:
    """The rows of a Parquet file as what `get_historical_features` takes for `entity_df`."""
    return f"SELECT {', '.join(columns)} FROM read_parquet({literal(labels)})"


def _labels(entity_df: pd.DataFrame | str) -> Any:
    if not isinstance(entity_df, str):
        return ibis.memtable(entity_df)
    backend, name = ibis.get_backend(), f"labels_{uuid4().hex[:12]}"
    backend.con.execute(f"CREATE TEMPORARY VIEW {name} AS {entity_df}")  # (Ibis 12's own `sql` calls what DuckDB 2 dropped)
    return backend.table(name)


def _as_of(labels: Any, source: Any, view: FeatureView, stamp: str, wanted: list[str]) -> Any:
    keys = {column.name: f"__{view.name}_{column.name}" for column in view.entity_columns}
    time, batch_source = f"__{view.name}_timestamp", view.batch_source
    assert batch_source is not None  # _read refused it
    renamed = {theirs: source[key] for key, theirs in keys.items()}
    rows = source.select(**renamed, **{time: _utc(source[batch_source.timestamp_field])}, **{name: source[name] for name in wanted})
    matches = [labels[key] == rows[theirs] for key, theirs in keys.items()]
    return labels.asof_join(rows, on=labels[stamp] >= rows[time], predicates=matches)
