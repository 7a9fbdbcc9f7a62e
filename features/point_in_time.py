"""Feature values as they were at given moments, through Feast."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from features.definitions import COUNTED
from features.repository import FeatureStoreError, open_repository, quiet_feast

Ints = NDArray[np.int64]
_ROW = "row_id"
_STAMP = "event_timestamp"


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
            definition = self._store.get_feature_service(service, allow_cache=True)
            names = [name for projection in definition.feature_view_projections for name in COUNTED[projection.name]]
            if len(times_n) == 0:
                return {name: np.zeros(0, dtype=np.int64) for name in names}
            stamps = pd.DatetimeIndex(np.asarray(times_n, dtype=np.int64).view("datetime64[us]")).tz_localize("UTC")
            entity = pd.DataFrame({_ROW: np.arange(len(times_n)), **keys_n, _STAMP: stamps})
            job = self._store.get_historical_features(entity_df=entity, features=definition, filter_by_created_timestamp=True)
            answer = job.to_arrow()
        return _in_order(answer, names, len(times_n), service)


def _in_order(answer: Any, names: list[str], n: int, service: str) -> dict[str, Ints]:
    rows = answer[_ROW].to_numpy()
    if len(rows) != n or not np.array_equal(np.sort(rows), np.arange(n)):
        raise FeatureStoreError(f"{service}: Feast returned {len(rows)} rows, {len(np.unique(rows))} of them distinct; expected one for each of {n}")
    columns = {}
    for name in names:
        values = answer[name]
        in_order = np.zeros(n, dtype=np.int64)
        in_order[rows] = values.fill_null(0).to_numpy()
        columns[name] = in_order
    return columns
