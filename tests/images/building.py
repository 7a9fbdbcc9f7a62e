"""The images of the tests: what they are built from, how, and what is expected of each."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from longtrail.config import parse_config
from tests.images.engine import FIGURES, Engine
from tests.images.wheels import from_outside

ROOT = Path(__file__).parents[2]
asked_for = pytest.mark.skipif(not os.environ.get("LONGTRAIL_TEST_IMAGES"), reason="builds images for minutes: make test-images")
# Megabytes. CPU-only wheels of torch; those for CUDA come on top.
BUDGET = {"data": 1_500, "spark": 2_400, "train": 3_000, "bento": 2_500}
READ_ONLY = ("--rm", "--read-only", "--tmpfs", "/tmp:exec", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "host")
COMMIT = "0123abc"
# A small world in which DIN clearly beats popularity, so that the pipeline packages it.
SETTINGS: dict[str, Any] = {
    "dataset": {
        "kind": "world",
        "users": 240,
        "items": 60,
        "events_per_user": 40,
        "requests_per_user": 30,
        "logger_temperature": 4.0,
        "click_logit": -0.5,
    },
    "features": {"online_store": "sqlite", "online_history_length": 100},
    "models": {
        "popular_items": {"stage": "retrieval", "kind": "popularity"},
        "popularity": {"stage": "ranking", "kind": "popularity"},
        "din": {"stage": "ranking", "kind": "din", "width": 8, "hidden": [16], "max_history": 20, "max_epochs": 5, "learning_rate": 0.02},
    },
    "pipeline": {"models": ["popular_items", "popularity", "din"]},
    "training": {"accelerator": "cpu", "threads": 1},
    "selection": {
        "retrieval": {"metric": "ndcg@10", "max_latency_ms": 10_000, "max_bytes": 1_000_000_000},
        "ranking": {"metric": "auc", "max_latency_ms": 10_000, "max_bytes": 1_000_000_000},
    },
    "evaluation": {"replicates": 20, "latency_requests": 5, "latency_candidates": 20},
    "ab_test": {"temperature": 2.0, "max_weight_share": 1.0},
}


def copy(folder: Path) -> Path:
    """A copy of the repository's tracked files to build or to run in, with the settings above."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    complete = parse_config(SETTINGS).model_dump(mode="json", exclude_none=True)  # dvc.yaml names sections that have defaults here
    (folder / "params.yaml").write_text(yaml.safe_dump(complete, sort_keys=False))
    return folder


def build(docker: Engine, place: Path, base: str, pip: dict[str, str], target: str) -> str:
    """Builds a target and returns its name."""
    started = time.monotonic()
    variables = [word for name, value in pip.items() for word in ("--build-arg", f"{name}={value}")]
    arguments = ["--network", "host", "--target", target, "--build-arg", f"BASE={base}", "--build-arg", f"GIT_COMMIT={COMMIT}"]
    done = docker.run("build", "-t", f"longtrail-{target}:test", *arguments, *variables, str(place), check=False)
    said = f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    if done.returncode and from_outside(f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"):
        pytest.skip(f"the build of {target} was cut off from outside: {done.stderr[-600:]}")
    assert done.returncode == 0, said
    FIGURES.append(f"{target}: {describe(docker, f'longtrail-{target}:test')['Size'] / 1e6:,.0f} MB, built in {time.monotonic() - started:.0f} s")
    return f"longtrail-{target}:test"


def describe(docker: Engine, image: str) -> dict[str, Any]:
    return json.loads(docker.run("image", "inspect", image).stdout)[0]


def check_what_it_says(docker: Engine, image: str, target: str) -> None:
    about = describe(docker, image)
    assert about["Size"] / 1e6 <= BUDGET[target]
    assert about["Config"]["Labels"]["org.opencontainers.image.revision"] == COMMIT
    assert about["Config"]["User"] == "10001:10001"
    history = docker.run("history", "--no-trunc", image).stdout
    assert "PIP_INDEX_URL" not in history and "PIP_FIND_LINKS" not in history  # an index may have a password
