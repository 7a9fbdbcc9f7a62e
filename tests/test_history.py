"""The history store against a list of tuples sorted in Python."""

import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longtrail import segments
from longtrail.errors import HistoryError
from longtrail.files import hash_path, read_json, write_json
from longtrail.history import HistoryArrays, HistoryStore, build_history
from longtrail.schema import INTERACTIONS

ACTIONS = ("click", "view", "buy")
USERS = 5
Event = tuple[int, int, int, int, str]  # user, item, timestamp, available_at, action

events = st.lists(
    st.tuples(st.integers(1, USERS), st.integers(1, 9), st.integers(0, 6), st.integers(0, 3), st.sampled_from(ACTIONS)).map(
        lambda e: (e[0], e[1], e[2], e[2] + e[3], e[4])
    ),
    max_size=40,
)
quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_table(rows: list[Event]) -> pa.Table:
    names = ("user_id", "item_id", "timestamp", "available_at", "action")
    columns = dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else {name: () for name in names}
    schema = pa.schema([INTERACTIONS.arrow().field(name).with_nullable(True) for name in names])
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def oracle(rows: list[Event], user: int) -> list[tuple[int, int, int]]:
    """(item, action id, time) of a user's events in the order they became available."""
    mine = sorted((row for row in rows if row[0] == user), key=lambda row: (row[3], row[2]))
    return [(item, ACTIONS.index(action) + 1, time) for _, item, time, _, action in mine]


def listed(arrays: HistoryArrays, b: int) -> list[tuple[int, int, int]]:
    rows = np.stack([arrays.items_BL[b], arrays.actions_BL[b], arrays.times_BL[b]], axis=1)
    assert (rows[arrays.lengths_B[b] :] == 0).all()
    return [tuple(row) for row in rows[: arrays.lengths_B[b]].tolist()]


def check(store: HistoryStore, rows: list[Event], users: int = USERS) -> None:
    """Every pointer there is, in one gather, for a few widths."""
    everyone = np.arange(users + 1)
    histories = [oracle(rows, user) for user in range(users + 1)]
    assert store.users == users and store.events == len(rows)
    assert store.lengths(everyone).tolist() == [len(h) for h in histories]
    pointers = np.array([(u, n) for u in everyone for n in range(len(histories[u]) + 1)])
    for most in (1, 3, 100):
        arrays = store.gather(pointers[:, 0], pointers[:, 1], most)
        assert arrays.items_BL.shape[1] == max(1, min(most, max(len(h) for h in histories)))
        for b, (user, length) in enumerate(pointers):
            assert listed(arrays, b) == histories[user][:length][-most:]
    flat = store.flat(pointers[:, 0], pointers[:, 1])
    assert flat.items.tolist() == [item for u, n in pointers for item, _, _ in histories[u][:n]]


@quick
@given(rows=events, chunk=st.sampled_from([1, 3, 1 << 20]))
def test_build_and_gather_equal_the_oracle(rows: list[Event], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "ROWS", chunk)  # so that batches and users straddle chunks
    pq.write_table(as_table(rows), tmp_path / "interactions.parquet")
    check(build_history(tmp_path / "interactions.parquet", tmp_path / "store", users=USERS, actions=ACTIONS), rows)
    check(HistoryStore.build(as_table(rows), tmp_path / "store", users=USERS, actions=ACTIONS), rows)  # replaces the folder


@quick
@given(rows=events, cuts=st.lists(st.integers(0, 40), max_size=3), chunk=st.sampled_from([2, 1 << 20]))
def test_appended_equals_rebuilt(rows: list[Event], cuts: list[int], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "ROWS", chunk)
    rows = sorted(rows, key=lambda row: (row[3], row[2]))
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    store = build_history(
        as_table(rows[: edges[1]]), tmp_path / "store", users=2 if all(r[0] <= 2 for r in rows[: edges[1]]) else USERS, actions=ACTIONS
    )
    for low, high in pairwise(edges[1:]):
        store = store.append(as_table(rows[low:high]), users=USERS)
    store = store.append(as_table([]), users=USERS)
    check(store, rows)
    compacted = store.compact()
    check(compacted, rows)
    assert compacted.segments == 1
    assert sorted(p.name for p in (tmp_path / "store").iterdir() if p.is_dir()) == [compacted._segments[0].path.name]
    check(store, rows)  # opened before the compaction
    check(compacted.append(as_table([(USERS, 1, 99, 99, "buy")])), [*rows, (USERS, 1, 99, 99, "buy")])


@quick
@given(rows=events, moment=st.integers(-1, 11))
def test_what_was_available_strictly_before_is_a_prefix(rows: list[Event], moment: int, tmp_path: Path) -> None:
    store = build_history(as_table(rows), tmp_path / "store", users=USERS, actions=ACTIONS)
    everyone = np.arange(USERS + 1)
    lengths = np.array([sum(row[0] == user and row[3] < moment for row in rows) for user in everyone])
    arrays = store.gather(everyone, lengths, 100)
    for user in range(USERS + 1):
        expected = sorted(item for u, item, _, available, _ in rows if u == user and available < moment)
        assert sorted(item for item, _, _ in listed(arrays, user)) == expected


ROWS: list[Event] = [
    (1, 11, 100, 100, "click"),
    (2, 21, 100, 100, "view"),
    (1, 12, 200, 500, "view"),  # written late: it stands behind the event of 300
    (1, 13, 300, 300, "buy"),
]


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return build_history(as_table(ROWS), tmp_path / "store", users=3, actions=ACTIONS)


def test_by_hand(store: HistoryStore) -> None:
    arrays = store.gather(np.array([1, 2, 3, 0, 1]), np.array([3, 1, 0, 0, 2]), 2)
    assert arrays.items_BL.tolist() == [[13, 12], [21, 0], [0, 0], [0, 0], [11, 13]]
    assert arrays.actions_BL.tolist() == [[3, 2], [2, 0], [0, 0], [0, 0], [1, 3]]
    assert arrays.times_BL.tolist() == [[300, 200], [100, 0], [0, 0], [0, 0], [100, 300]]
    assert arrays.lengths_B.tolist() == [2, 1, 0, 0, 2]
    assert {arrays.items_BL.dtype, arrays.actions_BL.dtype, arrays.times_BL.dtype, arrays.lengths_B.dtype} == {np.dtype(np.int64)}
    assert arrays.items_BL.flags.writeable  # torch.from_numpy asks for it


def test_no_requests_and_empty_histories(store: HistoryStore) -> None:
    none = store.gather(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 5)
    assert none.items_BL.shape == (0, 1)
    empty = store.gather(np.array([3, 0]), np.array([0, 0]), 5)
    assert empty.items_BL.tolist() == [[0], [0]]


def test_thirteen_bytes_an_event(tmp_path: Path) -> None:
    rows = [(1 + i % 3, 1, i, i, "click") for i in range(3_000)]
    store = build_history(as_table(rows), tmp_path / "store", users=3, actions=ACTIONS)
    assert store.bytes <= 13 * len(rows) + 6 * 128 + 8 * 3 * 5


@pytest.mark.parametrize(
    ("users", "lengths", "most", "message"),
    [
        ([4], [0], 5, r"user_id 4 is unknown; expected 0 \(nobody\) to 3"),
        ([-1], [0], 5, "user_id -1 is unknown"),
        ([1, 2], [3, 2], 5, "history_length 2 of user_id 2; expected 0 to 1"),
        ([0], [1], 5, "history_length 1 of user_id 0; expected 0 to 0"),
        ([1], [-1], 5, "history_length -1 of user_id 1"),
        ([1, 2], [1], 5, "1 lengths for 2 users"),
        ([1], [1], 0, "max_length is 0; expected at least 1"),
    ],
)
def test_pointers_that_point_nowhere(store: HistoryStore, users: list[int], lengths: list[int], most: int, message: str) -> None:
    with pytest.raises(HistoryError, match=message):
        store.gather(np.array(users), np.array(lengths), most)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((4, 1, 0, 0, "click"), "row 5: user_id is 4; expected 1 to 3"),
        ((0, 1, 0, 0, "click"), "row 5: user_id is 0"),
        ((1, 0, 0, 0, "click"), "row 5: item_id is 0; expected 1 to"),
        ((1, 1 << 31, 0, 0, "click"), "row 5: item_id is 2147483648"),
        ((1, 1, 0, 0, "kick"), "row 5: action is 'kick'; expected one of click, view, buy"),
        ((1, 1, None, 0, "click"), "row 5: timestamp is missing"),
        ((1, 1, 0, None, "click"), "row 5: available_at is missing"),
        ((1, 1, 0, 0, None), "row 5: action is missing"),
        ((None, 1, 0, 0, "click"), "row 5: user_id is missing"),
    ],
)
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_a_bad_row_is_named_and_nothing_is_written(
    tmp_path: Path, store: HistoryStore, row: tuple, message: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "ROWS", chunk)
    before = hash_path(tmp_path / "store")
    pq.write_table(as_table([*ROWS, row]), tmp_path / "log.parquet")
    with pytest.raises(HistoryError, match=f"log.parquet: {message}"):
        build_history(tmp_path / "log.parquet", tmp_path / "store", users=3, actions=ACTIONS)
    assert hash_path(tmp_path / "store") == before


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match=r"none\.parquet: no such file"):
        build_history(tmp_path / "none.parquet", tmp_path / "store", users=3, actions=ACTIONS)
    (tmp_path / "text.parquet").write_text("not parquet, but long enough to be taken for it")
    with pytest.raises(HistoryError, match=r"text\.parquet: not a Parquet file"):
        build_history(tmp_path / "text.parquet", tmp_path / "store", users=3, actions=ACTIONS)
    with pytest.raises(HistoryError, match="no column available_at"):
        build_history(as_table(ROWS).drop_columns(["available_at"]), tmp_path / "store", users=3, actions=ACTIONS)
    with pytest.raises(HistoryError, match="2 actions; expected at most 255, each once"):
        build_history(as_table([]), tmp_path / "store", users=3, actions=("click", "click"))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("extra", [0, 7])
def test_damage_is_noticed(store: HistoryStore, tmp_path: Path, extra: int) -> None:
    folder = store._segments[0].path
    for name in ("items", "times", "actions", "offsets", "first_available", "last_available"):
        copy = tmp_path / f"copy_{name}"
        shutil.copytree(store.path, copy)
        file = copy / folder.name / f"{name}.npy"
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2 + extra])
        with pytest.raises(HistoryError, match=f"{name}.npy"):
            HistoryStore.open(copy)
        file.unlink()
        with pytest.raises(HistoryError, match=f"{name}.npy: missing"):
            HistoryStore.open(copy)
    np.save(folder / "offsets.npy", np.array([0, 0, 4, 3, 4]))
    with pytest.raises(HistoryError, match="offsets that rise"):
        HistoryStore.open(store.path)


def test_damaged_manifest(store: HistoryStore, tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match=r"no manifest\.json; expected a history store"):
        HistoryStore.open(tmp_path / "nothing")
    file = store.path / "manifest.json"
    manifest = read_json(file)
    write_json(file, manifest | {"format": 99})
    with pytest.raises(HistoryError, match="format 99; expected 1"):
        HistoryStore.open(store.path)
    for text in ("[]", "{", "{}"):
        file.write_text(text)
        with pytest.raises(HistoryError, match=r"manifest\.json"):
            HistoryStore.open(store.path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            (1, 9, 500, 499, "click"),
            r"user_id 1: an event available at 1970\S+000499\+00:00 would stand before a stored one, available at 1970\S+000500\+00:00",
        ),
        ((1, 9, 199, 500, "click"), "user_id 1"),  # available at once with the stored one, but it happened earlier
        ((2, 9, 99, 99, "click"), "user_id 2"),
        ((4, 9, 0, 0, "click"), "user_id is 4; expected 1 to 3"),
        ((1, 9, 600, 600, "kick"), "action is 'kick'"),
    ],
)
def test_append_refuses_what_would_move_a_pointer(store: HistoryStore, row: Event, message: str) -> None:
    before = hash_path(store.path)
    with pytest.raises(HistoryError, match=message):
        store.append(as_table([(3, 1, 700, 700, "click"), row]))
    (store.path / "lock").unlink()
    assert hash_path(store.path) == before


def test_append_looks_at_every_earlier_segment(store: HistoryStore) -> None:
    two = store.append(as_table([(3, 1, 900, 900, "click")]))
    with pytest.raises(HistoryError, match="user_id 1"):
        two.append(as_table([(1, 1, 400, 400, "click")]))  # user 1 stands in the oldest segment only
    with pytest.raises(HistoryError, match="user_id 3"):
        two.append(as_table([(3, 1, 800, 800, "click")]))
    three = two.append(as_table([(1, 1, 200, 500, "click")]))  # the very same instants as the stored one: it stands behind it
    assert three.segments == 3
    assert three.gather(np.array([1]), np.array([4]), 2).items_BL.tolist() == [[12, 1]]
    compacted = three.compact()
    with pytest.raises(HistoryError, match="user_id 1"):
        compacted.append(as_table([(1, 1, 400, 400, "click")]))


def test_vocabularies_only_grow(store: HistoryStore) -> None:
    grown = store.append(as_table([(5, 1, 900, 900, "click")]), users=5, actions=(*ACTIONS, "share"))
    assert grown.users == 5 and grown.actions == (*ACTIONS, "share")
    assert grown.lengths(np.array([1, 4, 5])).tolist() == [3, 0, 1]
    with pytest.raises(HistoryError, match="users is 3; expected at least the 5"):
        grown.append(as_table([]), users=3)
    with pytest.raises(HistoryError, match="expected a list that begins with click, view, buy, share"):
        grown.append(as_table([]), actions=ACTIONS)
    assert grown.append(as_table([]), users=9).users == 9
    with pytest.raises(HistoryError, match="user_id 4 is unknown"):
        store.gather(np.array([4]), np.array([0]), 1)  # a store shows what it held when it was opened


def test_a_killed_append_leaves_the_store_as_it_was(store: HistoryStore, tmp_path: Path) -> None:
    pq.write_table(as_table([(1, 77, 900, 900, "click")]), tmp_path / "new.parquet")
    program = f"""
        import os, pathlib, longtrail.history as history
        history._check_follows = lambda *_: os._exit(9)  # killed when all files of the segment are written
        history.HistoryStore.open(pathlib.Path({str(store.path)!r})).append(pathlib.Path({str(tmp_path / "new.parquet")!r}))
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False).returncode == 9
    assert len(list(store.path.glob("segment-*"))) == 2
    check(HistoryStore.open(store.path), ROWS, users=3)
    again = store.append(tmp_path / "new.parquet")
    assert again.lengths(np.array([1])).tolist() == [4]
    assert len(list(store.path.glob("segment-*"))) == 2  # what the killed one left is gone


def test_appends_at_once_take_turns(store: HistoryStore) -> None:
    rows: list[Event] = [(1 + n % 3, n + 1, 1_000, 1_000, "view") for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: HistoryStore.open(store.path).append(as_table([row])), rows))
    after = HistoryStore.open(store.path)
    assert after.events == len(ROWS) + len(rows) and after.segments == 9
    held = after.flat(np.array([1, 2, 3]), after.lengths(np.array([1, 2, 3]))).items.tolist()
    assert sorted(held) == sorted([item for _, item, *_ in (*ROWS, *rows)])
