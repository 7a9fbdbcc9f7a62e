"""What `make run` looks after because DVC cannot see it: files that a log only names by their path."""

from pathlib import Path

import pytest
import yaml

from pipelines import local

FORCED = ("--force", "--single-item", "ingest")
COLUMNS = {"user": "user", "item": "item", "timestamp": "ts"}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A project in the working folder, with a log of two globs; what `dvc repro` was asked for."""
    calls: list[tuple[str, ...]] = []

    def repro(*arguments: str) -> bool:
        calls.append(arguments)
        local.TABLES.mkdir(parents=True, exist_ok=True)
        return False

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "repro", repro)
    monkeypatch.setattr(local, "summarise", lambda build: None)
    dataset = {"kind": "event_log", "source": "shown/*.csv", "events": "events/*.csv", "columns": {**COLUMNS, "click": "click"}}
    Path("params.yaml").write_text(yaml.safe_dump({"dataset": dataset}))
    for name in ("shown/1.csv", "events/1.csv"):
        Path(name).parent.mkdir()
        Path(name).write_text("a")
    return calls


def run(asked: list[tuple[str, ...]]) -> bool:
    """Whether the log was read again."""
    asked.clear()
    local.local()
    assert asked[-1] == ()
    return asked[0] == FORCED


def test_the_log_is_read_again_when_any_of_its_files_changed(asked: list[tuple[str, ...]]) -> None:
    assert [run(asked), run(asked)] == [False, False]
    Path("events/2.csv").write_text("b")
    assert [run(asked), run(asked)] == [True, False]
    Path("shown/1.csv").write_text("ab")
    assert [run(asked), run(asked)] == [True, False]


def test_tables_that_dvc_repro_made_are_of_a_log_that_nobody_looked_at(asked: list[tuple[str, ...]]) -> None:
    local.TABLES.mkdir(parents=True)
    assert [run(asked), run(asked)] == [True, False]


def test_a_pinned_log_is_known_by_its_revision(asked: list[tuple[str, ...]]) -> None:
    dataset = {"kind": "event_log", "repo": "https://git.example.com/logs.git", "revision": "v1", "source": "shown/*.csv", "columns": COLUMNS}
    Path("params.yaml").write_text(yaml.safe_dump({"dataset": dataset}))
    local.TABLES.mkdir(parents=True)
    assert not run(asked)
