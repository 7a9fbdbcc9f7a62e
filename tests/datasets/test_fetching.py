"""Downloads that break off, lie, or come from nowhere: against a real server on loopback, and the real package index."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from longtrail.datasets import fetching, movielens, open_bandit
from longtrail.errors import DatasetError
from tests.datasets.logs import run, table, write_zip

CONTENT = bytes(range(256)) * 4000
SHA = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content`; the first `cuts` answers break off half way."""

    content: bytes = CONTENT
    cuts: int = 0
    asked: int = 0
    status: int = 200


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        cut = self.server.asked <= self.server.cuts
        self.wfile.write(self.server.content[: len(self.server.content) // 2] if cut else self.server.content)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


def url(server: Server, name: str = "file.bin") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/{name}"


def kept_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix != ".lock"]


def test_two_who_want_one_file_fetch_it_once(tmp_path: Path, server: Server) -> None:
    path = tmp_path / "cache" / "file.bin"
    threads = [threading.Thread(target=fetching.download, args=(url(server), path), kwargs={"checksum": SHA}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == CONTENT and server.asked == 1


def test_a_download_is_verified_and_kept(tmp_path: Path, server: Server) -> None:
    path = tmp_path / "cache" / "file.bin"
    assert fetching.download(url(server), path, checksum=SHA).read_bytes() == CONTENT
    assert fetching.download(url(server), path, checksum=SHA) == path and server.asked == 1


def test_an_interrupted_download_starts_again(tmp_path: Path, server: Server) -> None:
    server.cuts = 2
    path = tmp_path / "file.bin"
    assert fetching.download(url(server), path, checksum=SHA).read_bytes() == CONTENT
    assert server.asked == 3


@pytest.mark.parametrize("checksum", [SHA, None])
def test_a_download_that_always_breaks_off_leaves_nothing(tmp_path: Path, server: Server, checksum: str | None) -> None:
    server.cuts = 99
    with pytest.raises(fetching.UnreachableError, match=r"file\.bin"):
        fetching.download(url(server), tmp_path / "file.bin", checksum=checksum)
    assert kept_in(tmp_path) == []
    server.cuts = 0
    assert fetching.download(url(server), tmp_path / "file.bin", checksum=checksum).read_bytes() == CONTENT


def test_what_a_killed_download_left_is_never_taken_for_whole(tmp_path: Path, server: Server) -> None:
    (tmp_path / ".file.bin.partial").write_bytes(CONTENT[:1000])
    assert fetching.download(url(server), tmp_path / "file.bin", checksum=None).read_bytes() == CONTENT
    assert [p.name for p in kept_in(tmp_path)] == ["file.bin"]


def test_a_wrong_checksum_names_file_expected_and_found(tmp_path: Path, server: Server) -> None:
    server.content = CONTENT[::-1]
    found = hashlib.sha256(server.content).hexdigest()
    path = tmp_path / "file.bin"
    with pytest.raises(DatasetError, match=f"{path}: wrong sha256 checksum: expected {SHA[7:]}, found {found}; it came from"):
        fetching.download(url(server), path, checksum=SHA)
    assert kept_in(tmp_path) == [] and server.asked == 1  # not kept, and not asked for again
    path.write_bytes(b"changed on disk")
    with pytest.raises(DatasetError, match=f"{path}: wrong sha256 checksum.*delete it"):
        fetching.download(url(server), path, checksum=SHA)


def test_addresses_that_do_not_answer(tmp_path: Path, server: Server) -> None:
    server.status = 404
    with pytest.raises(fetching.UnreachableError, match="404"):
        fetching.download(url(server), tmp_path / "file.bin", checksum=SHA)
    with pytest.raises(fetching.UnreachableError):
        fetching.download("http://127.0.0.1:9/file.bin", tmp_path / "file.bin", checksum=SHA)  # the discard port: nothing listens
    assert kept_in(tmp_path) == []


def test_movielens_comes_from_its_official_address(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped = write_zip(tmp_path / "x.zip", {"ml-1m/ratings.dat": b"1::2::5::900000000\n"})
    server.content = zipped.read_bytes()
    monkeypatch.setattr(movielens, "_ADDRESS", url(server, "datasets"))
    monkeypatch.setitem(movielens.OFFICIAL, "ml-1m", "md5:" + hashlib.md5(server.content).hexdigest())
    assert run(tmp_path, {"kind": "movielens", "source": "ml-1m"})["interactions"] == 1
    assert (tmp_path / "cache" / "ml-1m.zip").read_bytes() == server.content
    monkeypatch.setattr(movielens, "_ADDRESS", "http://127.0.0.1:9")
    assert run(tmp_path, {"kind": "movielens", "source": "ml-1m"})["interactions"] == 1  # from the cache


def test_a_variant_without_a_wheel_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movielens, "_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(DatasetError, match=r"download http://127\.0\.0\.1:9/ml-25m\.zip yourself and set dataset\.source to its path"):
        run(tmp_path, {"kind": "movielens", "source": "ml-25m"})


def test_movielens_100k_from_the_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(movielens, "_ADDRESS", "http://127.0.0.1:9")
    with caplog.at_level("INFO"):
        counts = run(tmp_path, {"kind": "movielens", "source": "ml-100k"}, max_quarantined_share=0.0)
    assert [counts[k] for k in ("interactions", "users", "items")] == [100_000, 943, 1_682]
    said = [r.message for r in caplog.records if "package index" in r.message]
    assert len(said) == 1 and "recbole==1.2.1" in said[0]
    kept = sorted(p.relative_to(tmp_path / "cache").as_posix() for p in (tmp_path / "cache").rglob("*") if p.suffix != ".lock")
    assert kept == ["recbole-1.2.1", "recbole-1.2.1/ml-100k.inter", "recbole-1.2.1/ml-100k.item"]
    titles = table(tmp_path, "items").set_index("item_key")
    assert titles.loc["1", ["title", "category"]].tolist() == ["Toy Story", "Animation|Children's|Comedy"]
    monkeypatch.setattr(fetching.subprocess, "run", lambda *_, **__: pytest.fail("asked pip again"))
    run(tmp_path, {"kind": "movielens", "source": "ml-100k"})


def test_a_wheel_with_another_checksum_is_refused(tmp_path: Path) -> None:
    wheel = fetching.Wheel(requirement="obp==0.4.1", sha256="0" * 64, members=open_bandit.SMALL.members)
    with pytest.raises(DatasetError, match=f"obp-0.4.1.*: wrong sha256 checksum: expected {'0' * 64}, found {open_bandit.SMALL.sha256}"):
        fetching.from_wheel(wheel, tmp_path)
    assert kept_in(tmp_path) == []


def test_a_wheel_that_is_not_there(tmp_path: Path) -> None:
    wheel = fetching.Wheel(requirement="recbole==0.0.0.0.1", sha256="0" * 64, members={"a": "a"})
    with pytest.raises(DatasetError, match=r"pip could not download recbole==0\.0\.0\.0\.1 from the package index: .*recbole"):
        fetching.from_wheel(wheel, tmp_path)
    assert kept_in(tmp_path) == []
