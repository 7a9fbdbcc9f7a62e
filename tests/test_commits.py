"""Which commit a model says that its code is of."""

import subprocess
from pathlib import Path

import pytest

from longtrail.commits import git_commit, short_commit


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.com"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LONGTRAIL_COMMIT", raising=False)
    (tmp_path / "code").mkdir()
    for name in ("code/model.py", "other.py", "params.yaml", "dvc.lock"):
        (tmp_path / name).write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "code")
    git(tmp_path, "tag", "-a", "v1", "-m", "v1")  # an answer by tag would not be a commit
    return tmp_path


def test_a_clean_tree_is_its_commit(repository: Path) -> None:
    (repository / "build").mkdir()
    (repository / "build" / "model").write_text("not tracked")
    assert git_commit(repository / "code") == git(repository, "rev-parse", "HEAD")


@pytest.mark.parametrize(("file", "marked"), [("code/model.py", True), ("other.py", True), ("params.yaml", False), ("dvc.lock", False)])
def test_changed_code_is_marked_and_what_a_run_writes_is_not(repository: Path, file: str, marked: bool) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    (repository / file).write_text("2")
    assert git_commit(repository / "code") == commit + ("-dirty" if marked else "")
    git(repository, "add", ".")
    assert git_commit(repository / "code") == commit + ("-dirty" if marked else "")


def test_no_repository_and_no_commit_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGTRAIL_COMMIT", raising=False)
    assert git_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) is None


def test_an_image_says_what_it_was_built_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGTRAIL_COMMIT", raising=False)
    here = git_commit()
    monkeypatch.setenv("LONGTRAIL_COMMIT", "unknown")
    assert git_commit() == here
    monkeypatch.setenv("LONGTRAIL_COMMIT", "0123abc")
    assert git_commit() == "0123abc"


def test_a_shortened_commit_keeps_its_mark() -> None:
    assert short_commit("0123456789abcdef" * 2) == "0123456789ab"
    assert short_commit("0123456789abcdef-dirty") == "0123456789ab-dirty"
    assert short_commit("") == ""
