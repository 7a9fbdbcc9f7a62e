"""A log in a DVC repository at a revision, or in an object store: what ingest reads, what it writes about it, what it says when it cannot."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo

from components.ingest import ingest
from components.source import Resolved, pinned_commit, resolve
from longtrail.config import Dataset, parse_config
from longtrail.errors import ConfigError, DatasetError
from tests.storage.s3 import BUCKET, S3

COLUMNS = {"user": "who", "item": "what", "timestamp": "when"}
FIRST = "who,what,when\nann,1,1000000000\nbob,2,1000000001\n"
SECOND = FIRST + "cem,3,1000000002\n"
MORE = "who,what,when\ndan,4,1000000003\n"


def git(folder: Path, *arguments: object) -> str:
    done = subprocess.run(["git", *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout.strip()


@pytest.fixture(scope="module")
def repository(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare Git repository: tags v1, v2 and unpushed of logs/a.csv and logs/b.csv (not in v1); DVC keeps the bytes in the bucket."""
    folder = tmp_path_factory.mktemp("pinned") / "work"
    (folder / "logs").mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")
    Repo.init(str(folder)).close()
    (folder / "README.csv").write_text(FIRST)  # in Git itself
    with Repo(str(folder)) as repo:
        with repo.config.edit() as settings:
            settings["remote"]["store"] = {"url": f"s3://{BUCKET}/pinned"}
            settings["core"]["remote"] = "store"
        (folder / "logs" / "a.csv").write_text(FIRST)
        _commit(repo, folder, "v1")
        (folder / "logs" / "a.csv").write_text(SECOND)
        (folder / "logs" / "b.csv").write_text(MORE)
        _commit(repo, folder, "v2")
        (folder / "logs" / "a.csv").write_text("who,what,when\nnobody,9,1000000009\n")
        _commit(repo, folder, "unpushed", push=False)
    bare = folder.parent / "server.git"
    git(folder, "clone", "-q", "--bare", folder, bare)
    return bare


def _commit(repo: Repo, folder: Path, tag: str, *, push: bool = True) -> None:
    repo.add(str(folder / "logs"))
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=nobody", "-c", "user.email=nobody@example.com", "commit", "-q", "-m", tag)
    git(folder, "tag", tag)
    if push:
        repo.push()


def dataset(**settings: Any) -> Dataset:
    return parse_config({"dataset": {"kind": "event_log", "columns": COLUMNS, **settings}}).dataset


def pinned(repository: Path, revision: str, **settings: Any) -> Dataset:
    return dataset(**{"source": "logs/a.csv", "repo": f"file://{repository}", "revision": revision, **settings})


def source(found: Resolved) -> Path:
    return Path(found.dataset.source)  # type: ignore[union-attr]


def md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def test_each_revision_is_what_it_was(repository: Path, tmp_path: Path) -> None:
    commits = {}
    for revision, text in (("v1", FIRST), ("v2", SECOND), ("v1", FIRST)):
        found = resolve(pinned(repository, revision), tmp_path)
        commits[revision] = git(repository, "rev-parse", revision)
        assert source(found).read_text() == text
        assert found.origin == {
            "source": "logs/a.csv",
            "repo": f"file://{repository}",
            "revision": revision,
            "commit": commits[revision],
            "files": {"logs/a.csv": md5(text)},
        }
    assert commits["v1"] != commits["v2"]
    by_commit = resolve(pinned(repository, commits["v1"]), tmp_path)
    assert source(by_commit).read_text() == FIRST
    assert pinned_commit(str(repository), "main~1") == commits["v2"] == pinned_commit(f"file://{repository}", "v2")


def test_globs_git_s_own_files_and_every_path_of_the_settings(repository: Path, tmp_path: Path) -> None:
    found = resolve(pinned(repository, "v2", source="logs/*.csv", events="README.csv"), tmp_path)
    assert found.origin["files"] == {"logs/a.csv": md5(SECOND), "logs/b.csv": md5(MORE), "README.csv": md5(FIRST)}
    assert sorted(path.read_text() for path in source(found).parent.glob("*.csv")) == sorted([SECOND, MORE])
    assert Path(found.dataset.events).read_text() == FIRST  # type: ignore[union-attr, arg-type]


def test_ingest_writes_what_it_read(repository: Path, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    settings = {"kind": "event_log", "columns": COLUMNS, "source": "logs/*.csv", "repo": f"file://{repository}", "revision": "v2"}
    params.write_text(yaml.safe_dump({"dataset": settings}))
    ingest(params, tmp_path / "tables", tmp_path / "cache")
    counts = json.loads((tmp_path / "tables" / "counts.json").read_text())
    assert counts["interactions"] == 4
    assert counts["dataset"] == {
        "kind": "event_log",
        "source": "logs/*.csv",
        "repo": f"file://{repository}",
        "revision": "v2",
        "commit": git(repository, "rev-parse", "v2"),
        "files": {"logs/a.csv": md5(SECOND), "logs/b.csv": md5(MORE)},
    }


@pytest.mark.parametrize(
    ("revision", "path", "says"),
    [
        ("v3", "logs/a.csv", r"^dataset\.revision 'v3': no such commit, tag or branch in file://"),
        ("0" * 40, "logs/a.csv", rf"^dataset\.revision '{'0' * 40}': no such commit"),
        ("v1", "logs/b.csv", r"^dataset\.source logs/b\.csv, at revision v1 \(commit [0-9a-f]{12}\) of file://.*: not there"),
        ("v1", "logs/*.parquet", r"^dataset\.source logs/\*\.parquet, at revision v1 .*: nothing is there"),
        ("unpushed", "logs/a.csv", r"^dataset\.source logs/a\.csv, at revision unpushed .*failed to load directory"),
    ],
)
def test_what_is_wrong_is_named(repository: Path, tmp_path: Path, revision: str, path: str, says: str) -> None:
    with pytest.raises(DatasetError, match=says):
        resolve(pinned(repository, revision, source=path), tmp_path)
    assert not [file for file in tmp_path.rglob("*.csv")]


def test_a_repository_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"^dataset\.repo file://.*nowhere"):
        resolve(pinned(tmp_path / "nowhere", "v1"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"repo": "."}, "repo is set; expected revision beside it"),
        ({"revision": "v1"}, "revision is set; expected repo beside it"),
        ({"repo": "https://me:secret@example.com/logs.git", "revision": "v1"}, "repo holds a password"),
        ({"source": "s3://key:secret@bucket/log.csv"}, "source holds a password"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        dataset(**{"source": "a.csv", **settings})
    assert "secret" not in str(caught.value)


def test_a_log_in_the_store_is_copied_once_until_it_changes(s3: S3, tmp_path: Path) -> None:
    def put(name: str, text: str) -> None:
        s3.client().put_object(Bucket=BUCKET, Key=f"logs/{name}", Body=text.encode())

    put("day-1.csv", FIRST)
    put("day-2.csv", MORE)
    put("other.txt", "no log")
    logs = dataset(source=f"s3://{BUCKET}/logs/day-*.csv")
    found = resolve(logs, tmp_path)
    assert found.origin == {
        "source": f"s3://{BUCKET}/logs/day-*.csv",
        "files": {f"{BUCKET}/logs/day-1.csv": md5(FIRST), f"{BUCKET}/logs/day-2.csv": md5(MORE)},
    }
    written = {path.name: path.stat().st_mtime_ns for path in source(found).parent.glob("day-*.csv")}
    put("day-2.csv", MORE.replace("4", "5"))
    again = resolve(logs, tmp_path)
    assert source(again).parent == source(found).parent
    assert (source(again).parent / "day-2.csv").read_text() == MORE.replace("4", "5")
    assert (source(again).parent / "day-1.csv").stat().st_mtime_ns == written["day-1.csv"]
    s3.client().delete_object(Bucket=BUCKET, Key="logs/day-1.csv")
    assert list(resolve(logs, tmp_path).origin["files"]) == [f"{BUCKET}/logs/day-2.csv"]
    assert [path.name for path in source(again).parent.glob("day-*.csv")] == ["day-2.csv"]


def test_an_address_with_nothing_behind_it(s3: S3, tmp_path: Path) -> None:
    for missing in (f"s3://{BUCKET}/logs/never.csv", f"s3://{BUCKET}/logs/never-*.csv", "s3://no-such-bucket/log.csv"):
        with pytest.raises(DatasetError, match=r"^dataset\.source s3://.*there"):
            resolve(dataset(source=missing), tmp_path)


def test_what_is_here_stays_as_it_is(tmp_path: Path) -> None:
    world = parse_config({"dataset": {"kind": "world"}}).dataset
    for here in (dataset(source=str(tmp_path / "log.csv")), world):
        assert resolve(here, tmp_path / "cache") == Resolved(dataset=here, origin={})
    assert not (tmp_path / "cache").exists()
