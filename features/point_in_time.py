"""Feature values as they were at given moments, through Feast."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from features.definitions import COUNTED, ENTITY_OF
from features.repository import FeatureStoreError, open_repository, quiet_feast
from longtrail.blocks import blocks

Ints = NDArray[np.int64]
ROW = "row_id"
STAMP = "event_timestamp"


class PointInTime:
    """Asks a Feast repository what was available strictly before each row's time."""

    def __init__(self, feast: Path, *, named: bool = True) -> None:
        """`feast` is the folder that build_features writes.

        The joins are those of the offline store that it names; with `named` False DuckDB's, which give the same values: who asks for a sample's
        rows then needs no Spark. Raises FeatureStoreError where it is no repository.
        """
        self._store = open_repository(feast, offline=named)

    def features(self, service: str, times_n: Ints, **keys_n: Ints) -> dict[str, Ints]:
        """The fields of `service` for each row, in the order of the rows: int64 [n] by name, 0 where nothing was available.

        `times_n` is UTC µs; `keys_n` are the service's keys: user_id, item_id. Raises FeatureStoreError unless exactly one value came back
        for every row (Feast keeps no row order, and a join that drops or repeats rows must not pass unseen).
        """
        with quiet_feast():
            definition, names = self._service(service)
            if len(times_n) == 0:
                return {name: np.zeros(0, dtype=np.int64) for name in names}
            stamps = pd.DatetimeIndex(np.asarray(times_n, dtype=np.int64).view("datetime64[us]")).tz_localize("UTC")
            entity = pd.DataFrame({ROW: np.arange(len(times_n)), **keys_n, STAMP: stamps})
            job = self._store.get_historical_features(entity_df=entity, features=definition, filter_by_created_timestamp=True)
            answer = job.to_arrow()
        return _in_order(answer, names, len(times_n), service)

    def stream(self, service: str, labels: Path, size: int) -> Iterator[pa.Table]:
        """The same for the rows of a Parquet file: one join of all of them by the store's engine, and neither they nor the answer in memory.

        `labels` has ROW (int64, 0, 1, …), STAMP (timestamp, UTC) and the service's keys. Gives the fields of each row in order of ROW, int64
        without nulls, `size` rows at a time. Raises FeatureStoreError unless exactly one value came back for every row.
        """
        rows, seen = pq.read_metadata(labels).num_rows, 0
        if rows == 0:
            return
        with quiet_feast():
            definition, names = self._service(service)
            keys = sorted({ENTITY_OF[projection.name] for projection in definition.feature_view_projections})
            query = import_module(type(self._store.provider.offline_store).__module__).labels_query(labels, [ROW, *keys, STAMP])
            job = self._store.get_historical_features(entity_df=query, features=definition, filter_by_created_timestamp=True)
        for block in blocks(job.stream(ROW, size), size):
            if not np.array_equal(block[ROW].to_numpy(), np.arange(seen, seen + block.num_rows)):
                raise FeatureStoreError(f"{service}: Feast returned other rows than asked for, from row {seen} on; expected each of {rows} once")
            seen += block.num_rows
            yield pa.table({name: block[name].cast(pa.int64()).fill_null(0) for name in names})
        if seen != rows:
            raise FeatureStoreError(f"{service}: Feast returned {seen} rows; expected one for each of {rows}")

    def _service(self, name: str) -> tuple[Any, list[str]]:
        """A feature service and the names of its fields."""
        definition = self._store.get_feature_service(name, allow_cache=True)
        return definition, [field for projection in definition.feature_view_projections for field in COUNTED[projection.name]]


def _in_order(answer: Any, names: list[str], n: int, service: str) -> dict[str, Ints]:
    rows = answer[ROW].to_numpy()
    if len(rows) != n or not np.array_equal(np.sort(rows), np.arange(n)):
        raise FeatureStoreError(f"{service}: Feast returned {len(rows)} rows, {len(np.unique(rows))} of them distinct; expected one for each of {n}")
    columns = {}
    for name in names:
        values = answer[name]
        in_order = np.zeros(n, dtype=np.int64)
        in_order[rows] = values.fill_null(0).to_numpy()
        columns[name] = in_order
    return columns
