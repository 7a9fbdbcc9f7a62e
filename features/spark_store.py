"""An offline store for Feast: Feast's own Spark store, over the Parquet files of our repositories.

Feast's store wants sources of a kind whose class imports pyspark; our registries name plain files, found from the repository, so that the
service opens them without Spark. Here they are handed over as what Feast wants; the joins are Feast's. Its point-in-time join pairs each label
with every older row of its key: give the cluster memory for that, or keep the DuckDB store, whose as-of join sorts instead (docs/scale.md).

Named in feature_store.yaml as `offline_store: {type: features.spark_store.SparkFileOfflineStore}`; imported by Feast only.
"""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from feast.data_source import DataSource
from feast.feature_view import FeatureView
from feast.infra.offline_stores.contrib.spark_offline_store import spark
from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.offline_store import RetrievalJob
from feast.repo_config import RepoConfig

from longtrail.config import SparkSettings
from longtrail.engines.spark import session_options


class SparkFileOfflineStoreConfig(spark.SparkOfflineStoreConfig):
    type: Literal["features.spark_store.SparkFileOfflineStore"] = "features.spark_store.SparkFileOfflineStore"  # type: ignore[assignment]


class StreamedJob(spark.SparkRetrievalJob):
    """An answer that passes through the driver in batches, never as a whole."""

    def stream(self, order: str | None, size: int) -> Iterator[pa.RecordBatch]:
        """The rows by the column `order` (None: as they are found), in batches of at most `size`: the driver reads what the executors wrote."""
        with tempfile.TemporaryDirectory(dir=self._config.repo_path) as folder:  # which the executors see too
            frame = self.to_spark_df() if order is None else self.to_spark_df().orderBy(order)
            frame.write.mode("overwrite").parquet(f"file://{folder}/rows", compression="zstd")
            for part in sorted(Path(folder, "rows").glob("part-*.parquet")):  # numbered in the order of the rows
                yield from pq.ParquetFile(part).iter_batches(size)


class SparkFileOfflineStore(spark.SparkOfflineStore):
    """Feast's SparkOfflineStore; a Spark session that is active is used, else one is started with `spark_conf`."""

    @staticmethod
    def get_historical_features(config: RepoConfig, feature_views: list[FeatureView], *args: Any, **kwargs: Any) -> RetrievalJob:  # type: ignore[override]
        """The newest row of each view at or before each entity row's timestamp."""
        _in_utc(config)
        views = []
        for view in feature_views:
            views.append(copy.copy(view))
            views[-1].batch_source = _spark_source(view.batch_source, config)
        job = spark.SparkOfflineStore.get_historical_features(config, views, *args, **kwargs)
        return _streamed(job, config)

    @staticmethod
    def pull_latest_from_table_or_query(config: RepoConfig, data_source: DataSource, *args: Any, **kwargs: Any) -> RetrievalJob:
        """The newest row of each key in a span of time: what is materialised."""
        _in_utc(config)
        job = spark.SparkOfflineStore.pull_latest_from_table_or_query(config, _spark_source(data_source, config), *args, **kwargs)
        return _streamed(job, config)

    @staticmethod
    def pull_all_from_table_or_query(config: RepoConfig, data_source: DataSource, *args: Any, **kwargs: Any) -> RetrievalJob:
        """All rows in a span of time."""
        _in_utc(config)
        return spark.SparkOfflineStore.pull_all_from_table_or_query(config, _spark_source(data_source, config), *args, **kwargs)


def _streamed(job: Any, config: RepoConfig) -> StreamedJob:
    return StreamedJob(job.spark_session, job.query, job.full_feature_names, config)


def labels_query(labels: Path, columns: Sequence[str]) -> str:
    """The rows of a Parquet file as what `get_historical_features` takes for `entity_df`."""
    return f"SELECT {', '.join(columns)} FROM parquet.`file://{labels.absolute()}`"


def _spark_source(source: DataSource | None, config: RepoConfig) -> SparkSource:
    """Raises ValueError for a source that is no Parquet file."""
    if not isinstance(source, FileSource) or not source.path.endswith(".parquet"):
        raise ValueError(f"source {getattr(source, 'name', None)}: expected a Parquet file, got {source}")
    return SparkSource(
        name=source.name,
        path=f"file://{Path(str(config.repo_path)).absolute() / source.path}",
        file_format="parquet",
        timestamp_field=source.timestamp_field,
        created_timestamp_column=source.created_timestamp_column,
        field_mapping=dict(source.field_mapping),
    )


def _in_utc(config: RepoConfig) -> None:
    """Feast writes times into its SQL without a zone; they are UTC."""
    session = spark.get_spark_session_or_start_new_with_repoconfig(config.offline_store)
    for name, value in session_options(SparkSettings()).items():
        if name != "spark.sql.shuffle.partitions":  # that of spark_conf, or of who started the session
            session.conf.set(name, value)
