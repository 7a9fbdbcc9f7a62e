"""The evaluate step on toy models: what it writes, and how it fails."""

import csv
import json
import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import yaml

from components.evaluate import evaluate
from longtrail.errors import ModelError
from longtrail.examples import FeatureSet
from longtrail.files import read_json
from tests.models_of_toy import save_toy_model, toy_model

PARAMS = {"evaluation": {"k": [5, 10], "replicates": 50, "latency_requests": 5, "latency_candidates": 20, "threads": 1}}
RANKING = {"auc", "gauc", "request_gauc", "log_loss", "calibration_ratio", "ece"}
RETRIEVAL = {f"{m}@{k}" for m in ("ndcg", "recall", "coverage") for k in (5, 10)} | {"mrr"}


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    path = tmp_path_factory.mktemp("params") / "params.yaml"
    path.write_text(yaml.safe_dump(PARAMS), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["sasrec", "popularity"])
def evaluated(request, toy_features_folder, tmp_path_factory, params):
    folder = tmp_path_factory.mktemp("evaluate")
    model = save_toy_model(folder / "models" / request.param, toy_model(FeatureSet.open(toy_features_folder), request.param))
    evaluate(model=model, features=toy_features_folder, params=params, out=folder / "evaluations" / request.param)
    return folder / "evaluations" / request.param


def test_evaluation_document(evaluated):
    found = read_json(evaluated / "evaluation.json")
    ranking = found["stage"] == "ranking"
    assert found["model"] == evaluated.name
    assert set(found["splits"]) == {"valid", "test"}
    for result in found["splits"].values():
        assert set(result["metrics"]) == (RANKING if ranking else RETRIEVAL)
        for estimate in result["metrics"].values():
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
        assert {"slice", "bucket", "rows", "metrics"} == set(result["slices"][0])
    assert set(found["classification"]) == ({"valid", "test"} if ranking else set())
    for judged in found["classification"].values():
        assert judged["roc"][-1]["true_positive_rate"] == 1 and sum(map(sum, judged["confusion"]["matrix"])) > 0
    cost = found["cost"]
    assert 0 < cost["latency_ms"]["p50"] <= cost["latency_ms"]["p99"] and cost["peak_memory_bytes"] > 0 and cost["model_bytes"] > 0


def test_metrics_are_flat_numbers_that_equal_the_evaluation(evaluated):
    flat, found = read_json(evaluated / "metrics.json"), read_json(evaluated / "evaluation.json")
    assert flat["test"] == {name: e["value"] for name, e in found["splits"]["test"]["metrics"].items()}
    assert set(flat) == {"valid", "test", "latency_ms_p50", "latency_ms_p99", "peak_memory_bytes", "model_bytes"}


def test_plots_as_plain_data(evaluated):
    found = read_json(evaluated / "evaluation.json")
    with (evaluated / "slices.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(part["metrics"]) for result in found["splits"].values() for part in result["slices"])
    assert {row["split"] for row in rows} == {"valid", "test"}
    name, place = ("calibration.csv", "predicted") if found["stage"] == "ranking" else ("hit_rate.csv", "k")
    with (evaluated / name).open(encoding="utf-8") as file:
        curve = list(csv.DictReader(file))
    assert [float(row["value"]) for row in curve if row["split"] == "test"] == [point["value"] for point in found["curves"]["test"]]
    assert place in curve[0]


def test_the_page_needs_no_network_and_holds_the_figures(evaluated):
    text = (evaluated / "report.html").read_text(encoding="utf-8")
    assert text.count("<figure") == 3 and "<script" not in text
    assert not re.search(r"(src|href)=\"https?:", text.replace("xmlns", ""))
    found = read_json(evaluated / "evaluation.json")
    metric = "auc" if found["stage"] == "ranking" else "ndcg@5"
    assert f"{found['splits']['test']['metrics'][metric]['value']:.4f}" in text
    trained = text[text.index("What was trained") :]
    assert f"kind {found['kind']}" in trained and found["weights"][:12] in trained
    for name in ("metrics", "slices", "curve"):
        assert (evaluated / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_model_gets_the_same_figures(evaluated, toy_features_folder, params, tmp_path):
    models = evaluated.parent.parent / "models"
    evaluate(model=models / evaluated.name, features=toy_features_folder, params=params, out=tmp_path / "again")
    first, again = read_json(evaluated / "evaluation.json"), read_json(tmp_path / "again" / "evaluation.json")
    assert json.dumps(first["splits"], sort_keys=True) == json.dumps(again["splits"], sort_keys=True)


def test_a_missing_model_is_one_plain_line(toy_features_folder, params, tmp_path):
    command = [
        sys.executable,
        "-m",
        "components.evaluate",
        "--model",
        str(tmp_path / "no"),
        "--features",
        str(toy_features_folder),
        "--params",
        str(params),
    ]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"error: .*no/model.json: no such file", done.stderr) and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_whose_ids_have_moved_is_refused(toy_features_folder, params, tmp_path):
    """An event that came late changes what ids mean: figures of such a model would be those of other items."""
    model = save_toy_model(tmp_path / "sasrec", toy_model(FeatureSet.open(toy_features_folder), "sasrec"))
    items = pq.read_table(toy_features_folder / "catalogue.parquet", columns=["item_key", "category_id", "category"])
    pq.write_table(items.take([1, 0, *range(2, len(items))]), model / "vocabulary.parquet")
    with pytest.raises(ModelError, match=r"vocabulary\.parquet: \d+ ids mean other items or categories in .*; expected the features it was"):
        evaluate(model=model, features=toy_features_folder, params=params, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
