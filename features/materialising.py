"""Materialisation for Feast that holds a batch of users in memory, not all of them.

Feast's local engine reads every row of a view's source into a data frame, sorts it there and keeps each intermediate table. Here the offline
store finds the newest row of each key and gives them in batches; converting and writing them is Feast's.

Named as `batch_engine` by `features.repository.materialise`; imported by Feast only.
"""

from typing import Any, Literal

from feast.feature_view import FeatureView
from feast.infra.common.materialization_job import MaterializationJobStatus, MaterializationTask
from feast.infra.compute_engines.local.compute import LocalComputeEngine
from feast.infra.compute_engines.local.job import LocalMaterializationJob
from feast.infra.registry.base_registry import BaseRegistry
from feast.repo_config import FeastConfigBaseModel
from feast.utils import _convert_arrow_to_proto, _get_column_names

_BATCH = 1_000  # rows


class StreamingComputeEngineConfig(FeastConfigBaseModel):
    type: Literal["features.materialising.StreamingComputeEngine"] = "features.materialising.StreamingComputeEngine"


class StreamingComputeEngine(LocalComputeEngine):
    """Feast's LocalComputeEngine for views without transformations over the offline stores of features/asof.py and features/spark_store.py."""

    def _materialize_one(self, registry: BaseRegistry, task: MaterializationTask, **kwargs: Any) -> LocalMaterializationJob:
        name = f"{task.feature_view.name}-{task.start_time}-{task.end_time}"
        try:
            self._write(registry, task)
        except Exception as error:  # Feast's protocol: who asked raises it
            return LocalMaterializationJob(job_id=name, status=MaterializationJobStatus.ERROR, error=error)
        return LocalMaterializationJob(job_id=name, status=MaterializationJobStatus.SUCCEEDED)

    def _write(self, registry: BaseRegistry, task: MaterializationTask) -> None:
        view, config = task.feature_view, self.repo_config
        assert isinstance(view, FeatureView) and view.batch_source is not None
        keys, fields, stamp, created = _get_column_names(view, [registry.get_entity(entity, task.project) for entity in view.entities])
        newest: Any = self.offline_store.pull_latest_from_table_or_query(
            config=config,
            data_source=view.batch_source,
            join_key_columns=keys,
            feature_name_columns=fields,
            timestamp_field=stamp,
            created_timestamp_column=created,
            start_date=task.start_time,
            end_date=task.end_time,
        )
        types = {column.name: column.dtype.to_value_type() for column in view.entity_columns}
        size = config.materialization_config.online_write_batch_size or _BATCH
        for batch in newest.stream(None, size):
            for start in range(0, batch.num_rows, size):
                rows = _convert_arrow_to_proto(batch.slice(start, size), view, types)
                self.online_store.online_write_batch(config, view, rows, None)
