"""The online store holds what the offline store holds at the end of the log, and follows the events that come after, on SQLite and on Redis."""

import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from features.definitions import CLOCK, CREATED, HISTORY, RANKING, TIMESTAMP, USER_VIEW
from features.online import OnlineFeatures, check_redis
from features.point_in_time import PointInTime
from features.repository import FeatureStoreError, apply, materialise, open_repository
from longtrail.files import hash_path
from longtrail.history import HistoryArrays, HistoryStore
from longtrail.schema import USER_STATISTICS
from tests.features.helpers import ONLINE_LENGTH

END = 4_000_000_000_000_000  # µs, long after the log
UNKNOWN = 10_000
_fresh_users = iter(range(100_000, 1_000_000, 100))  # users no other test writes to: Redis is shared


def rows_of(history: HistoryArrays) -> list[list[tuple[int, int, int]]]:
    """Each history as a list of (item, action, time), and padding checked to be zero."""
    arrays = np.stack([history.items_BL, history.actions_BL, history.times_BL], axis=-1)
    for row, length in zip(arrays, history.lengths_B, strict=True):
        assert (row[length:] == 0).all()
    return [[tuple(event) for event in row[:length].tolist()] for row, length in zip(arrays, history.lengths_B, strict=True)]


def test_online_equals_offline_at_the_end_of_the_log(built: Path, tmp_path: Path) -> None:
    online = OnlineFeatures(built / "feast", state=tmp_path)
    store = HistoryStore.open(built / "history")
    users = np.arange(1, store.users + 1)
    offline = PointInTime(built / "feast").features(RANKING, np.full(len(users), END), user_id=users, item_id=np.ones_like(users))
    statistics = online.user_statistics(users)
    assert set(statistics) == {"history_length", *USER_STATISTICS}
    for name, values in statistics.items():
        np.testing.assert_array_equal(values, offline[name])
    np.testing.assert_array_equal(statistics["history_length"], store.lengths(users))
    for length in (1, 3, ONLINE_LENGTH):
        expected = store.gather(users, offline["history_length"], length)
        assert rows_of(online.history(users, length)) == rows_of(expected)
    assert online.history(users, 1_000).items_BL.shape[1] == ONLINE_LENGTH == online.length


def test_one_read_gives_what_the_single_ones_give(built: Path, tmp_path: Path) -> None:
    online = OnlineFeatures(built / "feast", state=tmp_path)
    users = [5, UNKNOWN, 5, 1]
    read = online.read(users, 3)
    assert rows_of(read.history) == rows_of(online.history(users, 3))
    statistics = online.user_statistics(users)
    np.testing.assert_array_equal(read.totals_B, statistics.pop("history_length"))
    np.testing.assert_equal(read.statistics, statistics)
    assert read.history.lengths_B.tolist() == [3, 0, 3, 3]
    assert read.totals_B[1] == 0 and read.totals_B[0] == read.totals_B[2] > 3


def test_no_users_and_only_unknown_users(built: Path, tmp_path: Path) -> None:
    online = OnlineFeatures(built / "feast", state=tmp_path)
    assert online.history([], 5).items_BL.shape == (0, 1)
    assert online.user_statistics([])["user_clicks"].shape == (0,)
    assert online.history([UNKNOWN], 5).items_BL.tolist() == [[0]]
    assert {name: values.tolist() for name, values in online.user_statistics([UNKNOWN]).items()} == {
        "history_length": [0],
        "user_impressions": [0],
        "user_clicks": [0],
    }


def test_appended_events_follow_a_plain_list(built: Path, tmp_path: Path) -> None:
    online = OnlineFeatures(built / "feast", state=tmp_path)
    rng = np.random.default_rng(2)
    known, new = 3, next(_fresh_users)
    users = [known, new, new + 1]
    expected: dict[int, list[tuple[int, int, int]]] = dict(zip(users, rows_of(online.history(users, 1_000)), strict=True))
    totals = dict(zip(users, online.user_statistics(users)["history_length"].tolist(), strict=True))
    for count in (1, 0, 2, 5, 1, 20, 3):
        batch = [(users[rng.integers(3)], *(int(n) for n in rng.integers(1, 100, 2)), int(rng.integers(1, END))) for _ in range(count)]  # any times
        online.append_events(*(list(column) for column in zip(*batch, strict=True)) if batch else ([], [], [], []))
        for user, *event in batch:
            expected[user] = [*expected[user], tuple(event)][-ONLINE_LENGTH:]
            totals[user] += 1
        assert rows_of(online.history(users, 1_000)) == [expected[user] for user in users]
        assert online.user_statistics(users)["history_length"].tolist() == [totals[user] for user in users]
    again = OnlineFeatures(built / "feast", state=tmp_path)  # what a restarted service finds
    assert rows_of(again.history(users, 2)) == [expected[user][-2:] for user in users]


def test_recorded_impressions_and_clicks(built: Path, tmp_path: Path) -> None:
    online = OnlineFeatures(built / "feast", state=tmp_path)
    user = next(_fresh_users)
    before = online.user_statistics([4])
    online.record_impressions([user, 4, user, user])
    online.record_clicks([user, 4])
    online.record_clicks([])
    after = online.user_statistics([4, user])
    assert after["user_impressions"].tolist() == [before["user_impressions"][0] + 1, 3]
    assert after["user_clicks"].tolist() == [before["user_clicks"][0] + 1, 1]
    np.testing.assert_array_equal(after["history_length"], [before["history_length"][0], 0])
    online.append_events([user], [9], [1], [5])  # the two views do not disturb each other
    assert online.user_statistics([user])["user_impressions"].tolist() == [3]


def test_writers_do_not_lose_each_others_events(built: Path, tmp_path: Path) -> None:
    user, each = next(_fresh_users), 40
    writers = [OnlineFeatures(built / "feast", state=tmp_path) for _ in range(2)]
    errors: list[BaseException] = []

    def write(online: OnlineFeatures) -> None:
        try:
            for n in range(each):
                online.append_events([user], [1], [1], [n])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(online,)) for online in writers for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert writers[0].user_statistics([user])["history_length"].tolist() == [4 * each]


def test_lengths_that_differ_are_refused(built: Path, tmp_path: Path) -> None:
    online = OnlineFeatures(built / "feast", state=tmp_path)
    with pytest.raises(ValueError, match="2 users"):
        online.append_events([1, 2], [1], [1], [1])


def test_with_a_state_folder_the_features_stay_as_they_are(sqlite_features: Path, tmp_path: Path) -> None:
    before = hash_path(sqlite_features / "feast")
    online = OnlineFeatures(sqlite_features / "feast", state=tmp_path / "state")
    online.append_events([1], [1], [1], [END])
    online.record_impressions([1])
    assert hash_path(sqlite_features / "feast") == before
    assert len(list((tmp_path / "state").glob("longtrail_*.db"))) == 1


def test_a_moved_folder_works_and_may_be_written_in_place(sqlite_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feast = tmp_path / "elsewhere" / "feast"
    shutil.copytree(sqlite_features / "feast", feast)
    monkeypatch.chdir(tmp_path)
    relative = Path("elsewhere/feast")
    before = hash_path(feast)
    found = PointInTime(relative).features(RANKING, np.array([END]), user_id=np.array([1]), item_id=np.array([1]))
    online = OnlineFeatures(relative)
    assert online.user_statistics([1])["history_length"].tolist() == found["history_length"].tolist()
    assert hash_path(feast) == before, "opening and reading must write nothing"
    online.append_events([1], [7], [1], [END])
    assert online.history([1], 1).items_BL.tolist() == [[7]]


def test_a_state_folder_serves_two_builds(sqlite_features: Path, tmp_path: Path) -> None:
    other = tmp_path / "feast"
    shutil.copytree(sqlite_features / "feast", other)
    config = yaml.safe_load((other / "feature_store.yaml").read_text())
    project, config["project"] = config["project"], "another"
    (other / "feature_store.yaml").write_text(yaml.safe_dump(config))
    (other / "registry.db").unlink()
    apply(other, ONLINE_LENGTH)
    materialise(other)
    for feast in (sqlite_features / "feast", other):
        OnlineFeatures(feast, state=tmp_path / "state").append_events([UNKNOWN], [1], [1], [1])
    assert sorted(file.name for file in (tmp_path / "state").glob("*.db")) == sorted(["another.db", f"{project}.db"])


def test_apply_and_materialise_twice_change_nothing(sqlite_features: Path, tmp_path: Path) -> None:
    feast = tmp_path / "feast"
    shutil.copytree(sqlite_features / "feast", feast)

    def rows() -> dict[str, list[Any]]:
        project = open_repository(feast).project
        with sqlite3.connect(feast / "online_store.db") as connection:
            return {
                view: connection.execute(f'SELECT * FROM "{project}_{view}" ORDER BY entity_key, feature_name').fetchall()
                for view in (HISTORY, USER_VIEW)
            }

    before = rows()
    assert len(before[HISTORY]) == 60 * 4 and len(before[USER_VIEW]) == 60 * 2
    newest = open_repository(feast).get_feature_view(HISTORY).most_recent_end_time
    clock = pq.read_table(feast / "offline" / f"{CLOCK}.parquet")["timestamp"].cast("int64").to_numpy()
    shown = pq.read_table(feast / "offline" / f"{USER_VIEW}.parquet")["timestamp"].cast("int64").to_numpy()
    assert newest is not None and round(newest.timestamp() * 1e6) == max(clock.max(), shown.max())
    apply(feast, ONLINE_LENGTH)
    materialise(feast)
    assert rows() == before


def test_materialising_to_redis_again_keeps_newer_events(redis_features: Path) -> None:
    online = OnlineFeatures(redis_features / "feast")
    online.append_events([2], [5], [1], [END])
    before = rows_of(online.history(range(60), 100))
    materialise(redis_features / "feast")
    assert rows_of(online.history(range(60), 100)) == before
    assert before[2][-1] == (5, 1, END)


def test_redis_that_does_not_answer(redis_features: Path) -> None:
    with pytest.raises(FeatureStoreError, match=r"Redis at features\.redis_address 127\.0\.0\.1:1:"):
        OnlineFeatures(redis_features / "feast", redis_address="127.0.0.1:1")


def test_an_address_may_come_from_the_environment(redis_features: Path, redis_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(redis_features / "feast", tmp_path / "feast")
    config = tmp_path / "feast" / "feature_store.yaml"
    config.write_text(config.read_text().replace(redis_address, "${LONGTRAIL_TEST_REDIS}"))
    monkeypatch.setenv("LONGTRAIL_TEST_REDIS", redis_address)
    assert OnlineFeatures(tmp_path / "feast").history([1], 5).lengths_B.tolist() == [5]
    check_redis("${LONGTRAIL_TEST_REDIS}")


def test_an_online_store_that_is_missing(sqlite_features: Path, tmp_path: Path) -> None:
    feast = tmp_path / "feast"
    shutil.copytree(sqlite_features / "feast", feast)
    (feast / "online_store.db").unlink()
    for state in (None, tmp_path / "state"):
        with pytest.raises(FeatureStoreError, match=r"online_store\.db: no such file; expected the online store"):
            OnlineFeatures(feast, state=state)


def test_the_history_source_holds_the_columns_that_feast_reads(sqlite_features: Path) -> None:
    names = pq.read_schema(sqlite_features / "feast" / "offline" / f"{HISTORY}.parquet").names
    assert names == ["user_id", TIMESTAMP, CREATED, "items", "actions", "times", "history_length"]
