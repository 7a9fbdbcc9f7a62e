"""The training benchmark at its smallest: its workloads are what they say, its cases train, and twins see what ours see."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.training.__main__ import main, rankers, show
from benchmarks.training.cases import CASES, Meter, Task
from benchmarks.training.workload import write_next_item_log, write_ranking_log
from longtrail.examples import FeatureSet
from longtrail.files import read_json
from longtrail.training.averaging import WeightAverage

RANKER = {"stage": "ranking", "kind": "din", "width": 4, "max_history": 12, "hidden": (8,), "attention_hidden": (4,)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("workloads")
    write_next_item_log(place / "next_item", users=60, items=50, longest=30)
    write_ranking_log(place / "clicks", requests=40, candidates=3, items=50, length=12)
    return {"next_item": place / "next_item", "clicks": place / "clicks"}


def task(folder: Path, length: int) -> Task:
    return Task(folder=str(folder), length=length, batch=12, seconds=0.0, threads=1, request=5)


def test_workloads_are_features(folders: dict[str, Path]) -> None:
    sequences, clicks = FeatureSet.open(folders["next_item"]), FeatureSet.open(folders["clicks"])
    assert sequences.train_lengths[1:].min() >= 20
    assert sequences.train_lengths.max() <= 31
    items = sequences.history.flat(np.arange(1, 61), sequences.train_lengths[1:]).items
    assert (items[1:] == items[:-1] % 50 + 1).mean() > 0.25, "three in ten items follow from the one before"
    assert clicks.examples("train").num_rows == 120
    for who in ("user", "item"):
        clicked, shown = (clicks.examples("train")[f"{who}_{what}"].to_numpy() for what in ("clicks", "impressions"))
        assert (clicked <= shown).all() and clicked.max() > 0
    assert set(clicks.train_lengths[1:].tolist()) == {12}


@pytest.mark.parametrize(
    ("who", "folder", "length", "settings"),
    [
        ("ours", "next_item", 30, {"stage": "retrieval", "kind": "gru4rec", "width": 8, "max_history": 30}),
        ("padded SASRec", "next_item", 30, {"width": 8, "blocks": 1, "heads": 1, "dropout": 0.0}),
        ("ours", "clicks", 12, RANKER),
        ("tiled DIN", "clicks", 12, {"width": 4, "attention_hidden": (4,), "hidden": (8,)}),
    ],
)
def test_every_case_trains_and_reports(who: str, folder: str, length: int, settings: dict[str, Any], folders: dict[str, Path]) -> None:
    figures = CASES[who](task(folders[folder], length), settings)
    assert figures["steps"] >= 3
    assert figures["per_cpu_second"] > 0
    assert figures["peak_bytes"] >= figures["base_bytes"] > 0
    assert ("request_cpu_ms" in figures) == (folder == "clicks")
    assert figures.get("request_cpu_ms", 1) > 0
    assert who in show([{"workload": folder, "model": "m", "who": who, "settings": settings, **figures}])


def test_the_meter_counts_after_the_warm_up_until_the_time_is_used_up() -> None:
    meter = Meter(seconds=0.0)
    assert [meter.step(10, 1.0) for _ in range(5)] == [False, False, False, False, True]
    assert (meter.steps, meter.rows) == (5, 30)


def test_every_trained_ranker_is_measured() -> None:
    assert {"din", "sam"} <= set(rankers())
    assert "popularity" not in rankers()


def test_training_is_measured_with_its_running_means(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(WeightAverage, "on_train_batch_end", lambda self, trainer, module, outputs, batch, index: steps.append(index))
    settings = {**RANKER, "weight_average": 0.9}
    figures = CASES["ours"](task(folders["clicks"], 12), settings)
    assert len(steps) == figures["steps"] + 2  # two to warm up
    CASES["ours"](task(folders["clicks"], 12), {**settings, "weight_average": 0.0})
    assert len(steps) == figures["steps"] + 2


def test_rivals_are_given_the_workload_of_their_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "rival.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[2])\n"
        "clicks = (folder / 'examples' / 'train.parquet').exists()\n"
        "assert (folder / 'catalogue.parquet').exists() and clicks == (sys.argv[1] == 'clicks')\n"
        "print(json.dumps({'per_cpu_second': 1234 if clicks else 4321, 'peak_bytes': 1e6, 'request_cpu_ms': 7.5}))\n"
    )
    ours, broken = f"{sys.executable} {script} next", f"{sys.executable} {script} clicks"
    options = {
        "users": 30,
        "items": 30,
        "length": 8,
        "requests": 4,
        "click_length": 8,
        "candidates": [1],
        "only": ["rival"],
        "out": tmp_path / "out.json",
    }
    main(**options, rival=[f"rival a={ours}", f"rival b={broken}"], click_rival=[f"rival c={broken}"])  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert "| next item |  | rival a | 4,321.0 |" in shown and "| click, C = 1 |  | rival c | 1,234.0 |  | 1 MB | 7.5 |" in shown
    assert "rival b | failed: AssertionError" in shown
    assert [row["who"] for row in read_json(tmp_path / "out.json")["rows"]] == ["rival a", "rival b", "rival c"]
