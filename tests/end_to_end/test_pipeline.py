"""The whole pipeline on a slice of real ratings, by `make run` and by Kubeflow's local runner; what came out is looked at, and compared."""

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from kfp import local

from longtrail.config import parse_config
from longtrail.examples import FeatureSet
from longtrail.files import hash_path, read_json
from longtrail.models.store import load_model
from pipelines.kubeflow import build
from tests.end_to_end.conftest import USERS, commit, environment, git, run
from tests.end_to_end.equal import differences, of_build, of_kubeflow

pytestmark = pytest.mark.timeout(900)
MODELS = ("popular_items", "markov", "sasrec", "popularity", "click_rate", "din", "sam", "ifa")


@pytest.fixture(scope="module")
def said(project: Path) -> str:
    """What the first run printed. Its outputs are kept in kept/, whatever later tests do to them."""
    printed = run(project, "pipelines.local")
    for folder in ("tables", "features", "models", "evaluations"):
        shutil.copytree(project / "build" / folder, project.parent / "kept" / folder)
    return printed


@pytest.fixture(scope="module")
def kubeflow(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of Kubeflow's compiled pipeline, run here. Few models: the loop, the gate and the condition are what is looked at."""
    values = settings | {"pipeline": {"models": ["popular_items", "popularity", "din"]}, "ab_test": {"rounds": 40, "max_weight_share": 1.0}}
    folder = tmp_path_factory.mktemp("kubeflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(folder), raise_on_error=True)
        build(parse_config(values))()
    return folder


def only(root: Path, name: str) -> Path:
    (found,) = {path.parent for path in root.rglob(name)}
    return found


def test_kubeflow_runs_to_the_end(kubeflow: Path) -> None:
    assert read_json(only(kubeflow, "result.json") / "result.json")["success"]
    assert len({p for p in kubeflow.rglob("evaluation.json") if "evaluation" in p.parent.name}) == 3
    champion = only(kubeflow, "selection.json")
    assert read_json(champion / "selection.json")["ranker"]["name"] == "din"
    assert (champion / "retriever" / "model.safetensors").is_file()
    assert list(kubeflow.rglob("report.json"))
    (report,) = kubeflow.glob("*/report/page")
    assert "succeeded" in report.read_text()


def test_kubeflow_packages_by_the_verdict(kubeflow: Path) -> None:
    verdict = read_json(only(kubeflow, "report.json") / "report.json")["verdict"]
    packaged = any(p.name == "bento.yaml" for p in kubeflow.rglob("bento.yaml"))
    assert packaged == (verdict == "win")


def test_kubeflow_s_figures_are_those_of_the_evaluation(kubeflow: Path) -> None:
    """The ROC curve that its page draws is of real scores: its area is the AUC."""
    for told in kubeflow.rglob("executor_output.json"):
        artifacts = read_json(told).get("artifacts", {})
        if "classification" in artifacts:
            (shown,) = artifacts["classification"]["artifacts"]
            (figures,) = artifacts["metrics"]["artifacts"]
            points = shown["metadata"].get("confidenceMetrics", [])
            assert bool(points) == ("test.auc" in figures["metadata"])
            if points:
                area = np.trapezoid([p["recall"] for p in points], [p["falsePositiveRate"] for p in points])
                assert abs(area - figures["metadata"]["test.auc"]) < 0.01


def test_both_write_the_same(said: str, project: Path, kubeflow: Path) -> None:
    """Data and features byte for byte; weights and metrics of the models that both trained, within a tolerance."""
    by_dvc, by_kubeflow = of_build(project.parent / "kept"), of_kubeflow(kubeflow)
    both = sorted((by_dvc.keys() & by_kubeflow.keys()) - {"champion", "report", "bento"})  # they chose among other models
    models = ("popular_items", "popularity", "din")
    assert both == sorted(["tables", "features", *(f"{kind} {name}" for kind in ("model", "evaluation") for name in models)])
    assert differences({name: by_dvc[name] for name in both}, {name: by_kubeflow[name] for name in both}) == []


def test_the_tables_hold_every_rating(said: str, project: Path, movielens_slice: Path) -> None:
    ratings = np.loadtxt(movielens_slice / "u.data", dtype=np.int64)
    tables = project / "build" / "tables"
    assert pq.read_metadata(tables / "interactions.parquet").num_rows == len(ratings)
    assert pq.read_metadata(tables / "users.parquet").num_rows == USERS
    clicks = pq.read_table(tables / "impressions.parquet", columns=["click"])["click"].to_numpy()
    assert clicks.sum() == (ratings[:, 2] >= 4).sum()
    assert read_json(tables / "counts.json")["rows_quarantined"] == 0


def test_validation_passed(said: str, project: Path) -> None:
    assert read_json(project / "build" / "validation" / "result.json")["success"]


def test_histories_end_strictly_before_their_impressions(said: str, project: Path) -> None:
    features = FeatureSet.open(project / "build" / "features")
    for split in ("train", "valid", "test"):
        examples = pq.read_table(project / "build" / "features" / "examples" / f"{split}.parquet")
        users, lengths = examples["user_id"].to_numpy(), examples["history_length"].to_numpy()
        times = examples["timestamp"].to_numpy().astype("datetime64[us]").astype(np.int64)
        history = features.history.gather(users, lengths, 1)  # the newest event of each history
        some = history.lengths_B > 0
        assert some.mean() > 0.5 and (history.times_BL[some, 0] < times[some]).all()
        more = lengths < features.history.lengths(users)  # and the event after it is not before the impression
        after = features.history.gather(users[more], lengths[more] + 1, 1)
        assert (after.times_BL[:, 0] >= times[more]).all()


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_trained_and_evaluated(model: str, said: str, project: Path) -> None:
    loaded = load_model(project / "build" / "models" / model)
    assert loaded.card.name == model
    evaluation = read_json(project / "build" / "evaluations" / model / "evaluation.json")
    metric = "auc" if loaded.card.settings.stage == "ranking" else "ndcg@10"
    for split in ("valid", "test"):
        figure = evaluation["splits"][split]["metrics"][metric]
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert 0 < figure["value"] < 1
    assert evaluation["cost"]["model_bytes"] > 0 and evaluation["cost"]["latency_ms"]["p99"] > 0
    assert "<svg" in (project / "build" / "evaluations" / model / "report.html").read_text()


def test_the_rankers_learn_more_than_popularity(said: str, project: Path) -> None:
    def auc(model: str) -> float:
        return read_json(project / "build" / "evaluations" / model / "evaluation.json")["splits"]["test"]["metrics"]["auc"]["value"]

    assert max(auc("din"), auc("sam")) > auc("popularity")


def test_the_champion_is_the_best_on_the_validation_split(said: str, project: Path) -> None:
    selection = read_json(project / "build" / "champion" / "selection.json")
    values = {
        m: read_json(project / "build" / "evaluations" / m / "evaluation.json")["splits"]["valid"]["metrics"]["auc"]["value"]
        for m in ("click_rate", "din", "sam")
    }
    assert selection["incumbent"] == "popularity"
    assert selection["ranker"]["name"] == max(values, key=lambda m: values[m])
    assert selection["ranker"]["losers"][0]["reason"]


def test_the_ab_report_shows_the_estimate_beside_the_truth(said: str, project: Path) -> None:
    report = read_json(project / "build" / "ab" / "report.json")
    assert report["verdict"] in ("win", "lose", "equivalent", "not enough data", "do not trust")
    for arm in ("a", "b"):
        snips = report[arm]["estimates"]["snips"]
        assert 0 < snips["low"] <= snips["value"] <= snips["high"] < 1
        assert abs(snips["value"] - report[arm]["truth"]) < 0.1
    page = (project / "build" / "ab" / "report.html").read_text()
    assert html.escape(report["sentence"], quote=True).replace("&#x27;", "&#39;") in page and "<svg" in page


def test_the_summary_says_where_to_look(said: str) -> None:
    for text in ("sasrec", "din", "sam", "popularity", "report.html", "make serve"):
        assert text in said.rsplit("The pipeline ran in", 1)[1]


def test_the_bento_is_whole(said: str, project: Path) -> None:
    bento = project / "build" / "bento"
    assert (bento / "bento.yaml").is_file()
    files = {p.name for p in bento.rglob("*") if p.is_file()}
    assert {"service.py", "model.safetensors", "registry.db"} <= files
    assert not any(p.suffix in (".pkl", ".pickle") for p in bento.rglob("*"))


def test_a_second_run_does_nothing_and_says_so(said: str, project: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (project / "build").rglob("*") if p.is_file()}
    again = run(project, "pipelines.local")
    assert "nothing was done" in again and "Running stage" not in again
    assert before == {p: p.stat().st_mtime_ns for p in (project / "build").rglob("*") if p.is_file()}


def test_dvc_compares_runs(said: str, project: Path) -> None:
    commit(project, "A run")
    run(project, "dvc", "exp", "run", "-S", "ab_test.rounds=5")
    difference = json.loads(run(project, "dvc", "metrics", "diff", "--json"))
    assert any("build/ab/metrics.json" in path for path in difference)
    assert "rounds" in run(project, "dvc", "params", "diff")
    assert git(project, "status", "--porcelain").strip()  # the experiment is in the workspace, to be kept or dropped
    git(project, "checkout", "--quiet", "--", "params.yaml", "dvc.lock")
    run(project, "dvc", "checkout", "--quiet", "--force")


def test_a_killed_run_goes_on_where_it_stood(said: str, project: Path) -> None:
    """Killed inside the training of a model: the steps before it are not run again, and the result is that of an unbroken run."""
    weights, checkpoints = project / "build" / "models" / "din" / "model.safetensors", project / "build" / "checkpoints"
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("seed: 0", "seed: 1", 1))  # else DVC has the result in its cache
    command = [sys.executable, "-m", "dvc", "repro", "train@din"]
    with subprocess.Popen(command, cwd=project, env=environment(project), stdout=subprocess.DEVNULL, start_new_session=True) as process:
        while process.poll() is None and not any(checkpoints.rglob("*.safetensors")):
            time.sleep(0.02)
        killed = process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
    assert killed, "training ended before it could be killed"
    assert not weights.is_file()
    again = run(project, "dvc", "repro", "train@din")
    assert "Running stage 'train@din'" in again and "Running stage 'ingest'" not in again
    assert "resuming after epoch" in again
    resumed = hash_path(weights)
    assert not any(checkpoints.rglob("*.safetensors"))  # kept no longer than they are needed
    unbroken = run(project, "dvc", "repro", "--force", "--single-item", "train@din")
    assert "resuming" not in unbroken
    assert hash_path(weights) == resumed
