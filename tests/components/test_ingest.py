"""The step as a command: what it writes, what it says, and its exit code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.ingest import ingest
from longtrail.config import load_config
from longtrail.errors import ConfigError

ROOT = Path(__file__).parents[2]
LOG = "who,what,when\nann,1,1000000000\nbob,2,1000000001\n"


def write_params(folder: Path, **dataset: Any) -> Path:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    columns = {"user": "who", "item": "what", "timestamp": "when"}
    values["dataset"] = {"kind": "event_log", "source": str(folder / "log.csv"), "columns": columns, **dataset}
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "components.ingest", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_command_writes_the_tables(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(LOG)
    done = command("--params", write_params(tmp_path), "--tables", tmp_path / "tables")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "tables" / "counts.json").read_text())["interactions"] == 2
    assert "2 interactions, 0 impressions, 2 users, 2 items" in done.stderr
    assert "Warning" not in done.stderr


def test_an_error_of_the_input_is_one_message_without_a_traceback(tmp_path: Path) -> None:
    done = command("--params", write_params(tmp_path), "--tables", tmp_path / "tables")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'log.csv'}: no such file")


def test_an_unknown_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.delimeter: unknown key; did you mean delimiter"):
        ingest(write_params(tmp_path, delimeter=";"), tmp_path / "tables")


def test_the_repository_s_own_settings_name_movielens() -> None:
    assert load_config(ROOT / "params.yaml").dataset.kind == "movielens"
