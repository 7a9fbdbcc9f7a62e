"""A slice of MovieLens-100K small enough to go through the whole pipeline in a test, and a copy of the project to run it in."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from longtrail.datasets.movielens import find_movielens

ROOT = Path(__file__).parents[2]
USERS = 150


def ratings_of(source: Path) -> pd.DataFrame:
    """All ratings of MovieLens-100K: from the official zip, or from the folder that the package index's copy is unpacked to."""
    names = ["user", "item", "rating", "time"]
    if source.is_file():
        with zipfile.ZipFile(source) as archive, archive.open("ml-100k/u.data") as data:
            return pd.read_csv(data, sep="\t", names=names)
    (ratings,) = source.rglob("ml-100k.inter")
    return pd.read_csv(ratings, sep="\t", names=names, header=0)


@pytest.fixture(scope="session")
def movielens_slice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official layout of MovieLens-100K (`u.data`), cut to the users of its newest third: real ratings, real seconds."""
    frame = ratings_of(find_movielens("ml-100k", ROOT / "data"))
    users = frame.groupby("user")["time"].max().sort_values().index[-USERS:]
    folder = tmp_path_factory.mktemp("source") / "ml-100k"
    folder.mkdir()
    frame = frame[frame["user"].isin(users)].astype({"rating": int, "time": int})
    frame.to_csv(folder / "u.data", sep="\t", header=False, index=False)
    return folder


@pytest.fixture(scope="session")
def settings(movielens_slice: Path) -> dict[str, Any]:
    """params.yaml with small models: the steps are the same, only their sizes differ."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["dataset"]["source"] = str(movielens_slice)
    values["models"]["sasrec"] |= {"width": 16, "blocks": 1, "heads": 1, "max_history": 50, "max_epochs": 2}
    values["models"]["din"] |= {"max_history": 50, "max_epochs": 2}
    values["models"]["sam"] |= {"max_history": 50, "max_epochs": 2}
    values["models"]["ifa"] |= {"max_history": 50, "max_epochs": 2}
    for stage in ("retrieval", "ranking"):  # a loaded machine's latency must not decide a test
        values["selection"][stage]["max_latency_ms"] = 10_000
    values["evaluation"] |= {"replicates": 200, "latency_requests": 10, "latency_candidates": 50}
    return values


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Path:
    """A copy of the project as git would clone it, uncommitted work included, with the small settings committed."""
    folder = tmp_path_factory.mktemp("project") / "longtrail"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        source = ROOT / name
        if name and source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    (folder / "params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    git(folder, "init", "--quiet", "--initial-branch=main")
    commit(folder, "The project")
    return folder


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Longtrail", "-c", "user.email=longtrail@example.org"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", message)


def environment(folder: Path) -> dict[str, str]:
    """The tests' own Python first on the PATH, and the copy, not the installed project, on the module path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1"}


def run(folder: Path, *command: str, check: bool = True) -> str:
    """Run a Python module in the copy; its output on failure is the assertion's message."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout[-6000:]
    return done.stdout
