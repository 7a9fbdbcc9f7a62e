"""The direct read path gives what Feast gives, number for number, on SQLite and on Redis; and its decoder what protobuf's does."""

import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feast.protos.feast.types.Value_pb2 import Int64List, Value

from features.definitions import HISTORY_ARRAYS
from features.direct import number, numbers
from features.online import OnlineFeatures
from features.repository import FeatureStoreError
from longtrail.schema import USER_STATISTICS
from tests.features.helpers import ONLINE_LENGTH

ALL = 1 << 30
LARGEST = (1 << 63) - 1


def by_feast(online: OnlineFeatures, users: list[int]) -> dict[str, list[Any]]:
    """What `get_online_features` answers, as Python values."""
    return online._store.get_online_features(features=online._service, entity_rows=[{"user_id": user} for user in users]).to_dict()


def test_every_read_is_feasts_answer(built: Path, tmp_path: Path) -> None:
    online = OnlineFeatures(built / "feast", state=tmp_path)
    rng = np.random.default_rng(0)
    new = [500_000 + int(n) for n in rng.integers(0, 400_000, 3)]  # users no other test writes to: Redis is shared
    for user in new[:2]:
        many = int(rng.integers(1, 30))
        online.append_events([user] * many, rng.integers(1, 1 << 20, many), rng.integers(1, 5, many), rng.integers(0, 1 << 51, many))  # type: ignore[arg-type]
    online.record_impressions([new[2]])  # statistics, but no history
    users = [*rng.integers(1, 61, 20).tolist(), *new, 10_000, 0, 1, 1]  # known ones, unknown ones, and one twice
    expected = by_feast(online, users)
    for length in (0, 1, 3, ONLINE_LENGTH, ALL):
        read = online.read(users, length, seen=True)
        assert read.totals_B.tolist() == [value or 0 for value in expected["history_length"]]
        for name in USER_STATISTICS:
            assert read.statistics[name].tolist() == [value or 0 for value in expected[name]]
        for name in HISTORY_ARRAYS:
            kept = [(values or [])[-length:] if length else [] for values in expected[name]]
            values_BL = getattr(read.history, f"{name}_BL")
            assert [row[:many].tolist() for row, many in zip(values_BL, read.history.lengths_B, strict=True)] == kept
            assert values_BL.sum() == sum(map(sum, kept)), "padding is zero"
        assert [items.tolist() for items in read.seen] == [values or [] for values in expected["items"]]
    assert sum(value is None for value in expected["history_length"]) >= 2 and online.read([1], 1).seen == []


@pytest.mark.parametrize("largest", [1, 127, 128, 16_383, 16_384, 1 << 51, LARGEST])
def test_lists_are_decoded_as_protobuf_decodes_them(largest: int) -> None:
    rng = np.random.default_rng(largest % 1_000)
    for many in (0, 1, 2, 3, 17, 300):
        values = rng.integers(0, largest, many, endpoint=True)
        if many > 2:
            values[rng.integers(many)], values[rng.integers(many)] = 0, -int(values[0]) - 1
        stored = Value(int64_list_val=Int64List(val=values.tolist())).SerializeToString()
        for most in (1, 2, 16, 299, 300, ALL):
            found = numbers(stored, most)
            assert found.dtype == np.int64 and found.tolist() == values.tolist()[-most:]
        assert numbers(stored, 0).tolist() == []
    for value in (0, 1, 127, 128, largest, -1, -largest):
        assert number(Value(int64_val=value).SerializeToString()) == value


def test_what_is_unset_reads_as_nothing() -> None:
    unset = Value().SerializeToString()
    assert number(None) == number(unset) == 0
    assert numbers(None, 5).tolist() == numbers(unset, 5).tolist() == []


@pytest.mark.parametrize("value", [Value(string_val="1"), Value(int32_val=3), Value(double_val=0.5)])
def test_values_of_another_type_are_refused(value: Value) -> None:
    stored = value.SerializeToString()
    with pytest.raises(FeatureStoreError, match="no int64_list_val; expected"):
        numbers(stored, 3)
    with pytest.raises(FeatureStoreError, match="no int64_val; expected"):
        number(stored)


@pytest.mark.parametrize("cut", range(1, 12))
def test_values_that_were_cut_short_are_refused(cut: int) -> None:
    stored = Value(int64_list_val=Int64List(val=[300] * 200)).SerializeToString()
    for part in (stored[:-cut], stored[:cut]):
        with pytest.raises(FeatureStoreError, match="expected"):
            numbers(part, 3)


def test_readers_do_not_wait_for_a_writer(sqlite_features: Path, tmp_path: Path) -> None:
    """On SQLite with a state folder: a transaction that stays open holds nobody up, and what it wrote is not seen before it ends."""
    online = OnlineFeatures(sqlite_features / "feast", state=tmp_path)
    (database,) = tmp_path.glob("*.db")
    before = online.read([3], ALL)
    writer = sqlite3.connect(database, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute(f'DELETE FROM "{online._store.project}_user_history"')
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(online.read([3], ALL))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3)
    assert len(found) == 4
    for read in found:
        np.testing.assert_array_equal(read.history.items_BL, before.history.items_BL)
    writer.execute("COMMIT")
    writer.close()
    assert online.read([3], ALL).totals_B.tolist() == [0]


def test_a_store_that_is_no_database_is_named(sqlite_features: Path, tmp_path: Path) -> None:
    online = OnlineFeatures(sqlite_features / "feast", state=tmp_path)
    (database,) = tmp_path.glob("*.db")
    connections = online._reader._connections  # type: ignore[attr-defined]
    connections.close()
    connections._database = tmp_path / "gone" / "x.db"
    with pytest.raises(FeatureStoreError, match=r"gone/x\.db"):
        online.read([3], 1)
    assert database.exists()
