"""Nothing that was not available strictly before a moment may be seen at it."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from features.definitions import CLOCK, COUNTED, RANKING, RETRIEVAL
from features.point_in_time import ROW, STAMP, PointInTime
from features.repository import FeatureStoreError, apply, open_repository, quiet_feast, write_repository
from features.sources import COUNTS, write_cumulative, write_histories
from longtrail.config import FeatureSettings, IngestSettings
from longtrail.engines import open_engine
from longtrail.history import HistoryStore, build_history
from tests.features.helpers import write_events, write_impressions

T0 = 1_700_000_000_000_000  # µs
USERS, ITEMS = 3, 3


class Log:
    """A registered repository whose log can be replaced."""

    def __init__(self, folder: Path) -> None:
        self.tables, self.feast = folder / "tables", folder / "feast"
        self.history = folder / "history"
        self.engine = open_engine(folder / "engine", IngestSettings(memory_limit="500MB", threads=1))
        self.write([(1, 1, T0, T0)], [(1, 1, T0, T0, 1)])
        write_repository(self.feast, "property", FeatureSettings())
        apply(self.feast, 100)
        self.point_in_time = PointInTime(self.feast)

    def write(self, events: list[tuple[int, int, int, int]], impressions: list[tuple[int, int, int, int, int]]) -> HistoryStore:
        write_events(self.tables, events)
        write_impressions(self.tables, impressions)
        store = build_history(self.tables / "interactions.parquet", self.history, users=USERS, actions=["view"])
        for view in COUNTS:
            write_cumulative(self.engine, view, self.tables, self.source(view))
        write_histories(self.engine, store, self.source(CLOCK), 100, self.source("user_history"))
        return store

    def source(self, view: str) -> Path:
        return self.feast / "offline" / f"{view}.parquet"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return Log(tmp_path_factory.mktemp("log"))


# Few users, items and moments: same instants, late rows and rows of the future all come up again and again. Moments are 1 µs apart,
# the store's own resolution, so that an offset too many or too few shows.
_moment = st.integers(0, 6)
_delay = st.sampled_from([0, 0, 0, 1, 2, 5])
_user, _item = st.integers(1, USERS), st.integers(1, ITEMS)
_event = st.tuples(_user, _item, _moment, _delay)
_shown = st.tuples(_user, _item, _moment, _delay, st.integers(0, 1))


# Without shrinking, which would take minutes of a failing run: the tables are small enough to read.
@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(
    events=st.lists(_event, min_size=1, max_size=25),
    shown=st.lists(_shown, max_size=25),
    asked=st.lists(st.tuples(_user, _item, _moment), max_size=12),
)
def test_no_crafted_row_reaches_a_history_or_a_statistic(log: Log, events: Any, shown: Any, asked: Any) -> None:
    happened = [(u, i, T0 + t, T0 + t + d) for u, i, t, d in events]
    impressions = [(u, i, T0 + t, T0 + t + d, c) for u, i, t, d, c in shown]
    store = log.write(happened, impressions)
    asked = [(u, i, T0 + t) for u, i, t in asked] + [(u, i, t) for u, i, t, _, _ in impressions]  # labels at the very instants too
    users, items, times = (np.array([row[k] for row in asked], dtype=np.int64) for k in range(3))
    found = log.point_in_time.features(RANKING, times, user_id=users, item_id=items)
    for n, (user, item, time) in enumerate(asked):
        expected = {
            "history_length": sum(u == user and a < time for u, _, _, a in happened),
            "user_impressions": sum(u == user and a < time for u, _, _, a, _ in impressions),
            "user_clicks": sum(c for u, _, _, a, c in impressions if u == user and a < time),
            "item_events": sum(i == item and a < time for _, i, _, a in happened),
            "item_impressions": sum(i == item and a < time for _, i, _, a, _ in impressions),
            "item_clicks": sum(c for _, i, _, a, c in impressions if i == item and a < time),
        }
        assert {name: int(values[n]) for name, values in found.items()} == expected
    history = store.gather(users, found["history_length"], 100)
    for n, (user, _, time) in enumerate(asked):
        seen = zip(history.items_BL[n, : history.lengths_B[n]], history.times_BL[n, : history.lengths_B[n]], strict=True)
        assert sorted(seen) == sorted((i, t) for u, i, t, a in happened if u == user and a < time)


def test_as_of_join_equals_feasts_own_join(log: Log) -> None:
    rng = np.random.default_rng(1)
    moments = T0 + rng.integers(0, 50, (400, 2)).cumsum(axis=1)
    rows = np.column_stack([rng.integers(1, USERS + 1, 400), rng.integers(1, ITEMS + 1, 400), moments])
    log.write([tuple(r) for r in rows.tolist()], [(*r, int(c)) for r, c in zip(rows.tolist(), rng.integers(0, 2, 400), strict=True)])
    users, items, times = rng.integers(1, USERS + 2, 300), rng.integers(1, ITEMS + 2, 300), T0 + rng.integers(-5, 120, 300)
    fast = log.point_in_time.features(RANKING, times, user_id=users, item_id=items)
    slow = _with_feasts_join(log).features(RANKING, times, user_id=users, item_id=items)
    assert fast.keys() == slow.keys()
    for name in fast:
        np.testing.assert_array_equal(fast[name], slow[name])
    assert all(values.max() > 10 and values.min() == 0 for values in fast.values())


@pytest.mark.parametrize("size", [7, 1_000])
def test_a_file_of_labels_is_joined_as_rows_in_memory_are(log: Log, size: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    log.write([(u, i, T0 + t, T0 + t) for u, i, t in rng.integers(1, USERS + 1, (200, 3)).tolist()], [(1, 2, T0 + 2, T0 + 2, 1)])
    users, items, times = rng.integers(1, USERS + 2, 40), rng.integers(1, ITEMS + 2, 40), T0 + rng.integers(0, 6, 40)
    labels = write_labels(tmp_path / "labels.parquet", users, items, times)
    for past in (log.point_in_time, _with_feasts_join(log)):
        expected = past.features(RANKING, times, user_id=users, item_id=items)
        found = list(past.stream(RANKING, labels, size))
        assert [block.num_rows for block in found] == ([size] * 5 + [5] if size == 7 else [40])
        for name, values in expected.items():
            assert pa.concat_tables(found)[name].to_pylist() == values.tolist()
    nothing = write_labels(tmp_path / "none.parquet", users[:0], items[:0], times[:0])
    assert list(log.point_in_time.stream(RANKING, nothing, size)) == []


@pytest.mark.parametrize("spoil", [lambda rows: rows.limit(3), lambda rows: rows.union(rows.limit(1)), lambda rows: rows.filter(rows.row_id > 0)])
def test_a_join_of_a_file_that_drops_or_repeats_rows_is_caught(log: Log, spoil: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from features import asof

    whole = asof.StreamedJob.stream
    monkeypatch.setattr(asof.StreamedJob, "stream", lambda job, order, size: whole(asof._streamed(spoil(job.table), job.repo_path), order, size))
    labels = write_labels(tmp_path / "labels.parquet", np.array([1, 2, 3, 1]), np.ones(4, dtype=np.int64), np.full(4, T0))
    with pytest.raises(FeatureStoreError, match=r"retrieval_v1: Feast returned .* expected .* of 4"):
        list(log.point_in_time.stream(RETRIEVAL, labels, 2))


def write_labels(path: Path, users: np.ndarray, items: np.ndarray, times: np.ndarray) -> Path:
    stamps = pa.array(times, pa.timestamp("us", tz="UTC"))
    pq.write_table(pa.table({ROW: np.arange(len(users)), "user_id": users, "item_id": items, STAMP: stamps}), path)
    return path


def test_rows_written_after_their_own_timestamp_fall_to_feasts_join(log: Log) -> None:
    """Not a source that we write, but one that a user may add: a value of 10:00 that was written at 20:00 is not seen at 15:00."""
    hour = 3_600_000_000
    _write_clock(log, [(1, T0, T0, 5), (1, T0 + 10 * hour, T0 + 20 * hour, 9)])
    times = T0 + np.array([-1, 0, 9, 10, 15, 19, 20, 30]) * hour
    users = np.ones(len(times), dtype=np.int64)
    found = log.point_in_time.features(RETRIEVAL, times, user_id=users)["history_length"]
    assert found.tolist() == [0, 5, 5, 5, 5, 5, 9, 9]
    np.testing.assert_array_equal(found, _with_feasts_join(log).features(RETRIEVAL, times, user_id=users)["history_length"])


def test_feast_returns_the_row_of_the_labels_own_instant(log: Log) -> None:
    """Why a source's timestamp is a microsecond after its rows became available."""
    _write_clock(log, [(1, T0, T0 - 1, 5)])
    found = log.point_in_time.features(RETRIEVAL, np.array([T0 - 1, T0, T0 + 1]), user_id=np.array([1, 1, 1]))
    assert found["history_length"].tolist() == [0, 5, 5]


def test_rows_come_back_in_the_order_asked_for_also_the_same_row_twice(log: Log) -> None:
    log.write([(u, 1, T0 + u, T0 + u) for u in (1, 2, 2, 3, 3, 3)], [])
    users = np.array([3, 1, 2, 3, 3, 1, 2])
    found = log.point_in_time.features(RETRIEVAL, np.full(7, T0 + 10), user_id=users, item_id=users)
    assert found["history_length"].tolist() == users.tolist()


def test_no_rows_asked_for(log: Log) -> None:
    nothing = np.zeros(0, dtype=np.int64)
    found = log.point_in_time.features(RANKING, nothing, user_id=nothing, item_id=nothing)
    assert list(found) == [name for fields in COUNTED.values() for name in fields]
    assert all(len(values) == 0 for values in found.values())


@pytest.mark.parametrize("spoil", [lambda t: t.slice(1), lambda t: pa.concat_tables([t, t.slice(0, 1)]), lambda t: t.take([0, 0, 2])])
def test_a_join_that_drops_or_repeats_rows_is_caught(log: Log, spoil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from feast.infra.offline_stores.ibis import IbisRetrievalJob

    whole = IbisRetrievalJob.to_arrow
    monkeypatch.setattr(IbisRetrievalJob, "to_arrow", lambda job: spoil(whole(job)))
    with pytest.raises(FeatureStoreError, match=r"retrieval_v1: Feast returned \d rows, \d of them distinct; expected one for each of 3"):
        log.point_in_time.features(RETRIEVAL, np.full(3, T0), user_id=np.array([1, 2, 3]))


def test_a_folder_that_is_no_repository(tmp_path: Path) -> None:
    with pytest.raises(FeatureStoreError, match=r"no feature_store\.yaml; expected the feast folder"):
        PointInTime(tmp_path)
    (tmp_path / "feature_store.yaml").write_text("[]")
    with pytest.raises(FeatureStoreError, match="not a Feast configuration"):
        PointInTime(tmp_path)


def _with_feasts_join(log: Log) -> PointInTime:
    slow = PointInTime(log.feast)
    slow._store.config.offline_store.join = "feast"
    return slow


def _write_clock(log: Log, rows: list[tuple[int, int, int, int]]) -> None:
    frame = pd.DataFrame(rows, columns=["user_id", "timestamp", "created", "history_length"])
    for name in ("timestamp", "created"):
        frame[name] = pd.to_datetime(frame[name], unit="us", utc=True).astype("datetime64[us, UTC]")
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), log.source(CLOCK))


def test_definitions_follow_the_schema(log: Log) -> None:
    from features.definitions import feast_type
    from longtrail.schema import EXAMPLES

    with quiet_feast():
        store = open_repository(log.feast)
        for service in (RANKING, RETRIEVAL):
            for projection in store.get_feature_service(service).feature_view_projections:
                for field in projection.features:
                    assert field.dtype == feast_type(EXAMPLES[field.name].kind)
        ranked = {field.name for p in store.get_feature_service(RANKING).feature_view_projections for field in p.features}
    labels = {"request_id", "user_id", "item_id", "timestamp", "position", "click"}
    assert ranked == set(EXAMPLES.names) - labels
