"""One training on one process and on two (gloo): the same curve and weights, every request once an epoch, also where processes change in between."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longtrail.files import read_json
from tests.training_runs import MODELS, run

ROOT = Path(__file__).parents[1]
STOPS = {"boundary": (1, 0), "middle": (1, 4)}  # after (epochs, steps)
Found = dict[str, Any]


@pytest.fixture(scope="module")
def alone(toy_features_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """Uninterrupted, in this process."""
    return {model: run(toy_features_folder, model, tmp_path_factory.mktemp("alone")) for model in ("ifa", "sasrec")}


@pytest.fixture(scope="module")
def stopped(toy_features_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Found]]:
    """Interrupted in this process: the folder of its resume file, and what it saw."""
    places = {name: tmp_path_factory.mktemp(name) for name in STOPS}
    return {name: (place, run(toy_features_folder, "ifa", place, stop=STOPS[name])) for name, place in places.items()}


@pytest.fixture(scope="module")
def pair(
    toy_features_folder: Path, stopped: dict[str, tuple[Path, Found]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[Found]]]:
    """All that two processes do for the tests below, in one start of them: the folder of their resume files, and what each saw of each job."""
    place = tmp_path_factory.mktemp("pair")
    jobs: list[Found] = [
        {"name": "ifa", "model": "ifa", "accumulate": 1, "stop": None},
        {"name": "sasrec", "model": "sasrec", "accumulate": 2, "stop": None},
        *({"name": f"until {name}", "model": "ifa", "accumulate": 1, "stop": stop} for name, stop in STOPS.items()),
        *({"name": f"from {name}", "model": "ifa", "accumulate": 1, "stop": None} for name in STOPS),
    ]
    for job in jobs:
        job["checkpoints"] = str(place / job["name"])
    for name in STOPS:
        shutil.copytree(stopped[name][0], place / f"from {name}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shape = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.training_runs", str(toy_features_folder), json.dumps(jobs), str(place)]
    environments = [{**os.environ, **shape, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in (0, 1)]
    processes = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank, environment in enumerate(environments)
    ]
    try:
        told = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(told)[-4000:]
    return place, {job["name"]: [read_json(place / f"{job['name']}.{rank}.json") for rank in (0, 1)] for job in jobs}


def assert_same_training(found: Found, expected: Found) -> None:
    """But for rounding: curves, and weights where there are some."""
    assert len(found["curve"]) == len(expected["curve"]) == MODELS["ifa"].max_epochs
    for one, other in zip(found["curve"], expected["curve"], strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=2e-3)  # metrics are of ranks: a rounding may swap two
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


def requests_of(*found: Found) -> list[tuple[int, int]]:
    return sorted((epoch, request) for each in found for epoch, request in each["seen"])


@pytest.mark.parametrize("model", ["ifa", "sasrec"])
def test_two_processes_take_the_steps_of_one(model: str, alone: dict[str, Found], pair: tuple[Path, dict[str, list[Found]]]) -> None:
    """A ranker with batch statistics and a listwise loss, and an encoder whose share of a step is cut in two again."""
    both = pair[1][model]
    assert [found["first"] for found in both] == [True, False]
    for found in both:
        assert_same_training(found, alone[model])
    assert both[0]["weights"] == both[1]["weights"]
    if model == "ifa":
        assert requests_of(*both) == requests_of(alone[model])
        assert abs(len(both[0]["seen"]) - len(both[1]["seen"])) < 0.2 * len(both[0]["seen"])


def test_one_process_sees_every_request_once_an_epoch(alone: dict[str, Found]) -> None:
    seen = requests_of(alone["ifa"])
    assert len(seen) == len(set(seen)) == 2 * len({request for _, request in seen}) > 500


@pytest.mark.parametrize("name", STOPS)
def test_from_one_process_to_two(
    name: str, alone: dict[str, Found], stopped: dict[str, tuple[Path, Found]], pair: tuple[Path, dict[str, list[Found]]]
) -> None:
    both = pair[1][f"from {name}"]
    assert [found["resumed_from"] for found in both] == [1, 1]
    assert requests_of(stopped[name][1], *both) == requests_of(alone["ifa"])
    assert_same_training(both[0], alone["ifa"])


@pytest.mark.parametrize("name", STOPS)
def test_from_two_processes_to_one(
    name: str, toy_features_folder: Path, tmp_path: Path, alone: dict[str, Found], pair: tuple[Path, dict[str, list[Found]]]
) -> None:
    checkpoints = shutil.copytree(pair[0] / f"until {name}", tmp_path / "checkpoints")
    resumed = run(toy_features_folder, "ifa", checkpoints)
    assert resumed["resumed_from"] == 1
    assert requests_of(*pair[1][f"until {name}"], resumed) == requests_of(alone["ifa"])
    assert_same_training(resumed, alone["ifa"])
