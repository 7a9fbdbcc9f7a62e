"""A run goes to S3 with `dvc push`, killed in the middle, and comes back on an empty machine with `dvc pull`: the project's own dvc.yaml."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from dvc.repo import Repo

from longtrail.files import hash_files
from tests.storage.s3 import BUCKET, S3

ROOT = Path(__file__).parents[2]
DVC = [sys.executable, "-m", "dvc"]
FILES = ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore")


def call(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def git(folder: Path, *arguments: str) -> str:
    return call(folder, "git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.com", *arguments)


def write_outputs(repo: Repo) -> None:
    """Bytes of its own for each output that dvc.yaml declares: a file, or a folder of files, as `dvc repro` would leave them."""
    random = np.random.default_rng(11)
    for out in repo.index.outs:
        path = Path(out.fs_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":  # DVC reads metrics
            path.write_text(json.dumps({"value": random.random()}))
        elif path.suffix:
            path.write_bytes(random.bytes(2_000))
        else:
            (path / "below").mkdir(parents=True)
            (path / "weights.bin").write_bytes(random.bytes(50_000))
            (path / "below" / "card.json").write_bytes(random.bytes(300))


@pytest.fixture(scope="module")
def run_folder(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository, with a finished run of every stage: outputs, dvc.lock, and the store named as docs/storage.md says."""
    folder = tmp_path_factory.mktemp("run") / "shop"
    folder.mkdir()
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    code = {dep for stage in stages.values() for dep in stage["deps"] if not dep.startswith("build")}
    for name in (*FILES, *code):
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)
    (folder / ".dvc").mkdir()
    shutil.copyfile(ROOT / ".dvc" / "config", folder / ".dvc" / "config")
    git(folder, "init", "-q", "-b", "main")
    with Repo(str(folder)) as repo, contextlib.chdir(folder):
        with repo.config.edit() as settings:
            settings["remote"]["s3"] = {"url": f"s3://{BUCKET}/dvc"}
            settings["core"]["remote"] = "s3"
        write_outputs(repo)
        repo.commit(force=True)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "a run")
    return folder


def test_a_push_that_was_killed_goes_on_and_an_empty_machine_pulls_the_run(s3: S3, run_folder: Path, tmp_path: Path) -> None:
    s3.forget()
    with subprocess.Popen([*DVC, "push", "-q"], cwd=run_folder) as client:

        def kill(_: dict[str, Any]) -> None:
            os.kill(client.pid, signal.SIGKILL)
            client.wait()

        with s3.trap(kill, after=10):
            client.wait(timeout=120)
    assert client.returncode == -signal.SIGKILL
    before = s3.objects("dvc/")
    assert len(before) >= 10

    s3.forget()
    with Repo(str(run_folder)) as repo:
        repo.push()
    after = s3.objects("dvc/")
    assert before.items() <= after.items() and len(after) > len(before)
    assert not {f"/{BUCKET}/{name}" for name in before} & set(s3.uploads), "what was whole is not sent again"

    git(tmp_path, "clone", "-q", str(run_folder), "machine")
    machine = tmp_path / "machine"
    assert not (machine / "build").exists() and "testing" not in (machine / ".dvc" / "config").read_text()
    call(machine, *DVC, "pull", "-q")
    assert hash_files(machine / "build") == hash_files(run_folder / "build")
    assert len(hash_files(machine / "build")) > 50
    with Repo(str(machine)) as repo, contextlib.chdir(machine):
        assert repo.status() == {}
