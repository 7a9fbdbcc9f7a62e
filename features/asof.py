"""An offline store for Feast: DuckDB with an as-of join.

Feast's own join pairs each label with *every* older row of its key and keeps the newest: 500 million pairs at MovieLens-1M. An as-of
join finds that row by sorting both sides: O(n log n). It is taken only where it is exact; everything else goes through Feast's join,
which is also the oracle in the tests. Files are found relative to the repository (Feast's DuckDB store looks in the working directory).

Named in feature_store.yaml as `offline_store: {type: features.asof.AsOfDuckDBOfflineStore}`; imported by Feast only.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import ibis
import pandas as pd
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
        plain = isinstance(entity_df, pd.DataFrame) and not full_feature_names and config.offline_store.join == "asof"
        if not plain or not all(_is_exact(v, sources[v.name], filter_by_created_timestamp) for v in feature_views):
            return feast_ibis.get_historical_features_ibis(
                config,
                feature_views,
                feature_refs,
                entity_df,
                registry,
                project,
                _read,
                _write_data_source,
                full_feature_names,
                filter_by_created_timestamp=filter_by_created_timestamp,
            )
        stamp = infer_event_timestamp_from_entity_df(dict(entity_df.dtypes))  # type: ignore[union-attr,arg-type]
        labels = ibis.memtable(entity_df)
        joined = labels.mutate(**{stamp: _utc(labels[stamp])})
        names = list(joined.columns)
        newest = pd.to_datetime(entity_df[stamp], utc=True).max()  # type: ignore[index,operator]
        for view in feature_views:
            prefix = f"{view.projection.name_to_use()}:"
            wanted = [ref.removeprefix(prefix) for ref in feature_refs if ref.startswith(prefix)]
            stamped = sources[view.name].filter(_utc(sources[view.name][view.batch_source.timestamp_field]) <= newest)  # type: ignore[union-attr]
            joined = _as_of(joined, stamped, view, stamp, wanted)
            names += wanted
        return feast_ibis.IbisRetrievalJob(
            joined.select(names),
            [],
            full_feature_names,
            metadata=None,
            data_source_writer=_write_data_source,
            staging_location=None,
            staging_location_endpoint_override=None,
            repo_path=repo_path,
        )

    @staticmethod
    def pull_latest_from_table_or_query(config: RepoConfig, *args: Any, **kwargs: Any) -> RetrievalJob:
        """As DuckDBOfflineStore's, with files relative to the repository."""
        return _pull(feast_ibis.pull_latest_from_table_or_query_ibis, config, *args, **kwargs)

    @staticmethod
    def pull_all_from_table_or_query(config: RepoConfig, *args: Any, **kwargs: Any) -> RetrievalJob:
        """As DuckDBOfflineStore's, with files relative to the repository."""
        return _pull(feast_ibis.pull_all_from_table_or_query_ibis, config, *args, **kwargs)


def _pull(function: Any, config: RepoConfig, *args: Any, **kwargs: Any) -> RetrievalJob:
    return partial(function, data_source_reader=_read, data_source_writer=_write_data_source)(config, *args, **kwargs)


def _as_of(labels: Any, source: Any, view: FeatureView, stamp: str, wanted: list[str]) -> Any:
    keys = {column.name: f"__{view.name}_{column.name}" for column in view.entity_columns}
    time, batch_source = f"__{view.name}_timestamp", view.batch_source
    assert batch_source is not None  # _read refused it
    renamed = {theirs: source[key] for key, theirs in keys.items()}
    rows = source.select(**renamed, **{time: _utc(source[batch_source.timestamp_field])}, **{name: source[name] for name in wanted})
    matches = [labels[key] == rows[theirs] for key, theirs in keys.items()]
    return labels.asof_join(rows, on=labels[stamp] >= rows[time], predicates=matches)
