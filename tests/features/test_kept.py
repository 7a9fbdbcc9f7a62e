"""What is kept of users: compare and set under many writers, on SQLite and on Redis; namespaces that nobody serves are removed."""

import threading
import time
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from features.kept import Kept, KeptStore, SQLiteKept, Write
from features.online import OnlineFeatures
from features.repository import FeatureStoreError


@pytest.fixture
def online(built: Path, tmp_path: Path) -> OnlineFeatures:
    return OnlineFeatures(built / "feast", state=tmp_path)


@pytest.fixture
def store(online: OnlineFeatures) -> KeptStore:
    return online.kept(uuid4().hex)


def test_what_was_written_is_read(store: KeptStore) -> None:
    content = np.random.default_rng(0).bytes(3_000)
    assert store.read([1, 2]) == [None, None] and store.read([]) == [] and store.write([]) == []
    assert store.write([Write(1, None, Kept(3, content)), Write(2, None, Kept(0, b"")), Write(3, 4, Kept(5, b"x"))]) == [True, True, False]
    assert store.read([3, 2, 1, 1]) == [None, Kept(0, b""), Kept(3, content), Kept(3, content)]
    assert store.write([Write(1, 3, Kept(4, b"5 6")), Write(2, None, Kept(9, b"")), Write(1, 3, Kept(7, b""))]) == [True, False, False]
    assert store.read([1, 2]) == [Kept(4, b"5 6"), Kept(0, b"")]
    assert store.write([Write(1, 4, Kept(2, b"less"))]) == [True], "a count may go back: the history it follows may be another one"
    store.remove([1, 77])
    store.remove([])
    assert store.read([1, 2]) == [None, Kept(0, b"")]


def test_many_open_a_new_store_at_the_same_instant(tmp_path: Path) -> None:
    """As the workers of a service do. SQLite does not wait for a journal mode that another connection is changing."""
    openers, rounds = 4, 60
    opened: list[SQLiteKept] = []
    together = threading.Barrier(openers)

    def open_each() -> None:
        for number in range(rounds):
            together.wait(30)
            opened.append(SQLiteKept(tmp_path / f"{number}.sqlite", "one"))

    threads = [threading.Thread(target=open_each) for _ in range(openers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == openers * rounds


def test_no_write_of_many_writers_is_lost(online: OnlineFeatures) -> None:
    """Each adds 1 to the number of a user, 40 times, reading again whenever another was faster."""
    name, writers, each = uuid4().hex, 4, 40
    tries = [0] * writers

    def add(writer: int) -> None:
        store = online.kept(name)
        for _ in range(each):
            done = False
            while not done:
                (kept,) = store.read([5])
                tries[writer] += 1
                number = 1 if kept is None else int(kept.content) + 1
                (done,) = store.write([Write(5, None if kept is None else kept.events, Kept(number, b"%d" % number))])

    threads = [threading.Thread(target=add, args=(writer,)) for writer in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert online.kept(name).read([5]) == [Kept(writers * each, b"%d" % (writers * each))]


def test_namespaces_that_nobody_opened_lately_are_removed(online: OnlineFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    old, kept, now = (uuid4().hex for _ in range(3))
    moment = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: moment - 7200)
        for name in (old, kept):
            online.kept(name).write([Write(1, None, Kept(1, b"x"))])
    store = online.kept(now)
    store.write([Write(1, None, Kept(1, b"y"))])
    assert store.forget_others([kept], hours=3) == []
    assert store.forget_others([kept], hours=1) == [old]
    assert [online.kept(name).read([1]) for name in (kept, now, old)] == [[Kept(1, b"x")], [Kept(1, b"y")], [None]]


def test_it_outlives_the_process_and_stands_beside_the_histories(sqlite_features: Path, tmp_path: Path) -> None:
    OnlineFeatures(sqlite_features / "feast", state=tmp_path).kept("abc").write([Write(1, None, Kept(1, b"x"))])
    assert OnlineFeatures(sqlite_features / "feast", state=tmp_path).kept("abc").read([1]) == [Kept(1, b"x")]
    (histories,) = (file for file in tmp_path.glob("*.db"))
    assert (tmp_path / f"{histories.stem}.states.sqlite").exists()


def test_what_is_no_database_or_no_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no database, but some text that is long enough to be taken for the header of one" * 20)
    with pytest.raises(FeatureStoreError, match=r"x: file is not a database"):
        SQLiteKept(tmp_path / "x", "abc")
    with pytest.raises(ValueError, match="namespace"):
        SQLiteKept(tmp_path / "y", 'a"; DROP TABLE x')
