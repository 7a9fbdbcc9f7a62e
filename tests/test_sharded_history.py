"""The store in shards against the one-file store and the list of tuples of tests/test_history.py."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtrail import segments
from longtrail.errors import HistoryError
from longtrail.files import hash_path
from longtrail.history import HistoryStore, build_history
from tests.test_history import ACTIONS, ROWS, USERS, Event, as_table, check, events, quick

SHARDS = (2, 3, USERS, USERS + 3)  # fewer than users, as many, more: empty shards


@quick
@given(rows=events, shards=st.sampled_from(SHARDS), chunk=st.sampled_from([1, 3, 1 << 20]))
def test_shards_give_the_answers_of_one_file(rows: list[Event], shards: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "ROWS", chunk)
    pq.write_table(as_table(rows), tmp_path / "interactions.parquet")
    store = build_history(tmp_path / "interactions.parquet", tmp_path / "store", users=USERS, actions=ACTIONS, shards=shards)
    check(store, rows)
    assert store.shards == shards and not list((tmp_path / "store").glob(".*"))
    one = build_history(as_table(rows), tmp_path / "one", users=USERS, actions=ACTIONS)
    users = np.array([0, *range(USERS, -1, -1), 2, 2])  # in any order, repeated, nobody
    lengths = one.lengths(users)
    for most in (1, 2, 100):
        ours, theirs = store.gather(users, lengths, most), one.gather(users, lengths, most)
        for name in ("items_BL", "actions_BL", "times_BL", "lengths_B"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@quick
@given(rows=events, cuts=st.lists(st.integers(0, 40), max_size=3), shards=st.sampled_from(SHARDS))
def test_appended_and_compacted(rows: list[Event], cuts: list[int], shards: int, tmp_path: Path) -> None:
    rows = sorted(rows, key=lambda row: (row[3], row[2]))
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    first = rows[: edges[1]]
    store = build_history(as_table(first), tmp_path / "store", users=2 if all(r[0] <= 2 for r in first) else USERS, actions=ACTIONS, shards=shards)
    for low, high in pairwise(edges[1:]):
        store = store.append(as_table(rows[low:high]), users=USERS)
    store = store.append(as_table([]), users=USERS)
    check(store, rows)
    compacted = store.compact()
    check(compacted, rows)
    assert compacted.segments == 1 and len(list((tmp_path / "store").glob("shard-*/segment-*"))) == shards
    check(store, rows)  # opened before the compaction
    check(compacted.append(as_table([(USERS, 1, 99, 99, "buy")])), [*rows, (USERS, 1, 99, 99, "buy")])


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return build_history(as_table(ROWS), tmp_path / "store", users=3, actions=ACTIONS, shards=2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((4, 1, 0, 0, "click"), "row 5: user_id is 4; expected 1 to 3"),
        ((1, 0, 0, 0, "click"), "row 5: item_id is 0"),
        ((1, 1, 0, 0, "kick"), "row 5: action is 'kick'"),
        ((1, 1, None, 0, "click"), "row 5: timestamp is missing"),
    ],
)
def test_a_bad_row_is_named_by_its_place_in_the_whole_table(tmp_path: Path, store: HistoryStore, row: tuple, message: str) -> None:
    before = hash_path(store.path)
    pq.write_table(as_table([*ROWS, row]), tmp_path / "log.parquet")
    with pytest.raises(HistoryError, match=rf"log\.parquet: {message}"):
        build_history(tmp_path / "log.parquet", store.path, users=3, actions=ACTIONS, shards=2)
    with pytest.raises(HistoryError, match=rf"log\.parquet: {message}"):
        store.append(tmp_path / "log.parquet")
    (store.path / "lock").unlink()
    assert hash_path(store.path) == before


def test_a_late_row_is_refused_in_all_shards_or_none(store: HistoryStore) -> None:
    before = hash_path(store.path)
    with pytest.raises(
        HistoryError,
        match=r"user_id 2: an event available at 1970\S+000099\+00:00 would stand before a stored one, available at 1970\S+000100\+00:00",
    ):
        store.append(as_table([(1, 9, 900, 900, "click"), (2, 9, 99, 99, "click")]))  # user 1's shard was written before user 2's was refused
    (store.path / "lock").unlink()
    assert hash_path(store.path) == before


def test_a_worker_opens_its_shards_alone(store: HistoryStore) -> None:
    mine = HistoryStore.open(store.path, shards=[1])
    assert mine.events == store.events and mine.lengths(np.array([2, 0])).tolist() == [1, 0]
    with pytest.raises(HistoryError, match=r"user_id 3 is in shard 0; expected one of \[1\], which are open"):
        mine.lengths(np.array([2, 3]))
    with pytest.raises(HistoryError, match="shard 2 is asked for; expected 0 to 1"):
        HistoryStore.open(store.path, shards=[2])
    assert mine.append(as_table([(3, 5, 900, 900, "click")])).lengths(np.array([1, 2, 3])).tolist() == [3, 1, 1]


def test_one_file_has_one_shard(tmp_path: Path) -> None:
    one = build_history(as_table(ROWS), tmp_path / "one", users=3, actions=ACTIONS)
    assert one.shards == 1 and HistoryStore.open(one.path, shards=[0]).events == len(ROWS)
    with pytest.raises(HistoryError, match="the store is not sharded"):
        HistoryStore.open(one.path, shards=[1])


def test_what_points_nowhere_and_damage_are_named(store: HistoryStore) -> None:
    with pytest.raises(HistoryError, match="history_length 2 of user_id 2; expected 0 to 1"):
        store.gather(np.array([1, 2]), np.array([3, 2]), 5)
    with pytest.raises(HistoryError, match="user_id 4 is unknown"):
        store.gather(np.array([4]), np.array([0]), 5)
    with pytest.raises(HistoryError, match="max_length is 0"):
        store.gather(np.array([1]), np.array([1]), 0)
    next(iter(store.path.glob("shard-0001/segment-*/items.npy"))).unlink()
    with pytest.raises(HistoryError, match=r"items\.npy: missing"):
        HistoryStore.open(store.path)
    assert HistoryStore.open(store.path, shards=[0]).lengths(np.array([1])).tolist() == [3]
