"""The train step as a command: what it writes, what it refuses, and that it survives being killed."""

import csv
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml

from components.lineage import hash_settings
from components.train import learning_curves, train, trained_until
from longtrail.commits import git_commit
from longtrail.config import load_config
from longtrail.errors import ConfigError, HistoryError, ModelError
from longtrail.examples import FeatureSet
from longtrail.files import hash_path, read_json
from longtrail.models.contracts import Sizes
from longtrail.models.store import load_model
from tests.toy import toy_features, toy_tables

ROOT = Path(__file__).parents[2]
SMALL = {"width": 8, "max_history": 20, "max_epochs": 3, "patience": 3, "learning_rate": 3e-3}
MODELS: dict[str, dict[str, object]] = {
    "popular_items": {"stage": "retrieval", "kind": "popularity"},
    "sasrec": {"stage": "retrieval", "kind": "sasrec", "blocks": 1, "batch_size": 16, **SMALL},
    "popularity": {"stage": "ranking", "kind": "popularity", "by": "clicks"},
    "din": {"stage": "ranking", "kind": "din", "hidden": [16], "batch_size": 64, **SMALL},
    "sam": {"stage": "ranking", "kind": "sam", "hidden": [16], "batch_size": 64, "passes": 2, **SMALL},
}
STEP = [sys.executable, "-m", "components.train"]


@pytest.fixture
def params(tmp_path: Path) -> Path:
    return write_params(tmp_path / "params.yaml")


def write_params(path: Path, *, training: dict[str, object] | None = None, **changes: dict[str, object]) -> Path:
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["models"] = {name: settings | changes.get(name, {}) for name, settings in MODELS.items()}
    values["pipeline"] = {"models": list(MODELS)}
    values["training"] = {"accelerator": "cpu", "threads": 1} | (training or {})
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


@pytest.mark.parametrize("model", MODELS)
def test_a_model_folder_is_whole_and_says_where_it_came_from(model: str, params: Path, toy_features_folder: Path, tmp_path: Path) -> None:
    out, checkpoints = tmp_path / "models" / model, tmp_path / "checkpoints"
    train(model, toy_features_folder, params, out, checkpoints)
    loaded, features = load_model(out), FeatureSet.open(toy_features_folder)
    assert loaded.card.name == model
    assert loaded.card.settings == load_config(params).models[model]
    assert loaded.card.sizes == Sizes(**features.meta["sizes"])
    assert (loaded.card.actions, loaded.card.prior_click_rate) == (features.actions, features.prior_click_rate)
    lineage = read_json(out / "lineage.json")
    validation, parameters = lineage.pop("validation"), lineage.pop("parameters")
    assert lineage == {
        "features": hash_path(toy_features_folder / "features.json"),
        "code": git_commit(),
        "params": hash_settings(load_config(params), model),
        "since": None,
        "trained_until": features.meta["split"]["valid_from"],
        "previous": None,
        "data": {"dataset": "movielens", "tables": features.meta["hashes"]["tables"], "split": features.meta["split"]},
        "training": load_config(params).training.model_dump(mode="json"),
        "versions": {"longtrail": importlib.metadata.version("longtrail"), "torch": torch.__version__},
    }
    assert parameters == {"trained": sum(p.numel() for p in loaded.module.parameters()), "frozen": 0}
    rows = rows_of(out / "learning_curve.csv")
    metric = "valid_auc" if MODELS[model]["stage"] == "ranking" else "valid_ndcg@10"
    best = max(rows, key=lambda row: float(row[metric]))
    assert validation == {
        "metric": metric.removeprefix("valid_"),
        "value": float(best[metric]),
        "best_epoch": int(best["epoch"]),
        "epochs": len(rows) if int(best["epoch"]) else 0,
        **({"exclude_seen": True} if MODELS[model]["stage"] == "retrieval" else {}),
    }
    assert [int(row["epoch"]) for row in rows] == ([0] if MODELS[model]["kind"] == "popularity" else [1, 2, 3])
    assert all(0 < float(row[metric]) < 1 for row in rows)
    files = {"model.safetensors", "model.json", "vocabulary.parquet", "lineage.json", "learning_curve.csv"}
    assert {path.name for path in out.iterdir()} - {"dvclive"} == files
    assert [path.name for path in out.parent.iterdir()] == [model]
    assert not checkpoints.exists() or not list(checkpoints.iterdir())


def test_the_same_training_writes_the_same_bytes(params: Path, toy_features_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train("din", toy_features_folder, params, tmp_path / name, tmp_path / "checkpoints")
    for file in ("model.safetensors", "model.json", "vocabulary.parquet", "lineage.json", "learning_curve.csv"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_lineage_changes_with_what_the_training_reads_and_only_with_that(tmp_path: Path) -> None:
    config = load_config(write_params(tmp_path / "a.yaml"))
    base = hash_settings(config, "din")
    other_model = load_config(write_params(tmp_path / "b.yaml", sam={"width": 4}))
    assert hash_settings(other_model, "din") == base
    assert hash_settings(load_config(write_params(tmp_path / "c.yaml", din={"width": 4})), "din") != base
    assert hash_settings(load_config(write_params(tmp_path / "d.yaml", training={"seed": 1})), "din") != base
    values = yaml.safe_load((tmp_path / "a.yaml").read_text())
    values["selection"]["ranking"]["metric"] = "gauc" if config.selection.ranking.metric == "auc" else "auc"
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(values))
    otherwise_stopped = load_config(tmp_path / "e.yaml")
    assert hash_settings(otherwise_stopped, "din") != base
    assert hash_settings(otherwise_stopped, "sasrec") == hash_settings(config, "sasrec")


def test_unknown_model_names_the_known_ones(params: Path, toy_features_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model bert: .*no such model; expected one of din, popular_items, popularity, sam, sasrec"):
        train("bert", toy_features_folder, params, tmp_path / "out", tmp_path / "checkpoints")
    assert not (tmp_path / "out").exists()


def test_a_part_of_the_log_is_not_learnt_from_nothing(params: Path, toy_features_folder: Path, tmp_path: Path) -> None:
    options = ["--model", "din", "--features", toy_features_folder, "--params", params, "--out", tmp_path / "out", "--since", "2024-01-02"]
    done = subprocess.run([*STEP, *map(str, options)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert "error: --since 2024-01-02T00:00:00+00:00: there is no --previous" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", ["folder", "model.json", "model.safetensors", "lineage.json"])
def test_what_is_no_model_folder_is_not_gone_on_from(missing: str, params: Path, toy_features_folder: Path, tmp_path: Path) -> None:
    previous = tmp_path / "previous"
    if missing != "folder":
        train("popularity", toy_features_folder, params, previous, tmp_path / "checkpoints")
        (previous / missing).unlink()
    said = "no such folder" if missing == "folder" else f"holds no {missing}"
    with pytest.raises(ModelError, match=rf"^--previous {previous}: {said}; expected the folder of a model, as train writes it$"):
        train("popularity", toy_features_folder, params, tmp_path / "out", tmp_path / "checkpoints", previous)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"trained_until": null}', '{"trained_until": "yesterday"}', '{"trained_until": 3}'])
def test_a_lineage_that_does_not_say_until_when_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "lineage.json").write_text(text)
    with pytest.raises(ModelError, match=rf"^{tmp_path}/lineage\.json: (not JSON|trained_until is .*; expected a time)"):
        trained_until(tmp_path)


@pytest.mark.parametrize("model", ["din", "sasrec"])
def test_nothing_new_is_told_in_dates(model: str, params: Path, toy_features_folder: Path, tmp_path: Path) -> None:
    first, until = tmp_path / "first", read_json(toy_features_folder / "features.json")["split"]["valid_from"]
    train(model, toy_features_folder, params, first, tmp_path / "checkpoints")
    with pytest.raises(HistoryError) as told:
        train(model, toy_features_folder, params, tmp_path / "second", tmp_path / "checkpoints", first)
    said = str(told.value)
    assert said.startswith(f"--previous {first}: trained until {until}, and the training period has nothing newer: ")
    assert f"at or after {until}" in said and "µs" not in said
    with pytest.raises(HistoryError, match=r"at or after 2100-01-01T00:00:00\+00:00") as told:
        train(model, toy_features_folder, params, tmp_path / "second", tmp_path / "checkpoints", first, datetime(2100, 1, 1))
    assert "trained until" not in str(told.value)  # it was asked for
    assert not (tmp_path / "second").exists()


def test_lineage_says_from_when_on_and_from_what_it_went_on(params: Path, toy_features_folder: Path, tmp_path: Path) -> None:
    features = FeatureSet.open(toy_features_folder)
    since = sorted(features.examples("train")["timestamp"].to_pylist())[features.examples("train").num_rows // 2]
    for model, expected in (("din", since.isoformat()), ("popularity", None)):  # counts are made of the whole training period
        first, second = tmp_path / f"{model} first", tmp_path / f"{model} second"
        train(model, toy_features_folder, params, first, tmp_path / "checkpoints")
        train(model, toy_features_folder, params, second, tmp_path / "checkpoints", first, since)
        lineage = read_json(second / "lineage.json")
        assert (lineage["since"], lineage["previous"]) == (expected, read_json(first / "model.json")["weights"]["sha256"])


def test_absent_features_are_a_plain_error(params: Path, tmp_path: Path) -> None:
    arguments = ["--model", "din", "--features", tmp_path / "none", "--params", params, "--out", tmp_path / "out"]
    done = subprocess.run([*STEP, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no such file; expected a features folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_log_without_impressions_cannot_train_a_ranker_but_a_retriever(params: Path, tmp_path: Path) -> None:
    tables = toy_tables(tmp_path / "tables", users=20, items=40, impressions=False)
    features = toy_features(tables, tmp_path / "features")
    with pytest.raises(HistoryError, match="no rows; expected impressions, which ranking learns from"):
        train("din", features, params, tmp_path / "din", tmp_path / "checkpoints")
    assert not (tmp_path / "din").exists()
    train("sasrec", features, params, tmp_path / "sasrec", tmp_path / "checkpoints")
    assert load_model(tmp_path / "sasrec").card.stage == "retrieval"


def test_a_failed_training_leaves_the_model_before_it(params: Path, toy_features_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "din"
    train("din", toy_features_folder, params, out, tmp_path / "checkpoints")
    before = hash_path(out)
    diverging = write_params(tmp_path / "bad.yaml", din={"listwise": 3e38})  # times the loss, it is more than float32 holds
    with pytest.raises(Exception, match="the loss is"):
        train("din", toy_features_folder, diverging, out, tmp_path / "checkpoints")
    assert hash_path(out) == before


def test_a_killed_step_resumes_and_ends_as_if_it_had_never_been_killed(toy_features_folder: Path, tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", sam={"max_epochs": 12, "patience": 12})
    checkpoints = tmp_path / "checkpoints"
    command = [*STEP, "--model", "sam", "--features", str(toy_features_folder), "--params", str(params)]
    killed = [*command, "--out", str(tmp_path / "sam"), "--checkpoints", str(checkpoints)]
    process = subprocess.Popen(killed, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(checkpoints.glob("sam-*/state.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed: raise max_epochs"
    assert not (tmp_path / "sam").exists()
    done = subprocess.run(killed, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "sam: resuming after epoch" in done.stderr
    assert "epoch 12/12: loss" in done.stderr
    train("sam", toy_features_folder, params, tmp_path / "whole", tmp_path / "other")
    for file in ("model.safetensors", "learning_curve.csv"):
        assert (tmp_path / "sam" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert list(checkpoints.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def arguments_of(folder: Path, features: Path, training: dict[str, object]) -> list[str]:
    params = write_params(folder / "params.yaml", training=training, din={"max_epochs": 2})
    arguments = ["--model", "din", "--features", features, "--params", params, "--out", folder / "din", "--checkpoints", folder / "ck"]
    return [str(argument) for argument in arguments]


def test_two_processes_train_one_model_and_write_it_once(toy_features_folder: Path, tmp_path: Path) -> None:
    """Lightning starts this very command again for the second process; gloo on the CPU stands in for several GPUs."""
    arguments = arguments_of(tmp_path, toy_features_folder, {"devices": 2})
    done = subprocess.run([*STEP, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("epoch 2/2: loss") == 1
    weights = load_model(tmp_path / "din").module.state_dict()
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    assert len(rows_of(tmp_path / "din" / "learning_curve.csv")) == 2
    assert list((tmp_path / "ck").iterdir()) == []

    # torchrun on two "machines", as Kubeflow's trainer starts it, with the settings of one device: the same curve and the same weights, to the bit.
    again = tmp_path / "torchrun"
    again.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(probe.getsockname()[1])}
    command = [sys.executable, "-m", "torch.distributed.run", *STEP[1:], *arguments_of(again, toy_features_folder, {})]
    machines = [
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, **place, "PET_NODE_RANK": str(rank)})
        for rank in range(2)
    ]
    told = [machine.communicate(timeout=240)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(told)[-4000:]
    assert "2 × 1 × cpu" in told[0] and "epoch 2/2: loss" in told[0] and "epoch 2/2: loss" not in told[1]
    for file in ("learning_curve.csv", "model.safetensors"):
        assert (again / "din" / file).read_bytes() == (tmp_path / "din" / file).read_bytes()
    assert list((again / "ck").iterdir()) == []


def test_dvclive_shows_every_epoch_and_makes_no_dvc_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"epoch": epoch, "train_loss": 1 / epoch, "valid_ndcg@10": epoch / 10} for epoch in (1, 2)]

    def write(place: Path) -> Path:
        place.mkdir(parents=True)
        monkeypatch.chdir(place)
        with learning_curves(place / "dvclive") as report:
            for row in rows:
                report(row)
        return place / "dvclive"

    live = write(tmp_path / "plain")
    metrics = json.loads((live / "metrics.json").read_text())
    assert metrics["train_loss"] == 0.5
    points = (live / "plots/metrics/valid_ndcg_at_10.tsv").read_text().split()
    assert points == ["step", "valid_ndcg_at_10", "1", "0.1", "2", "0.2"]

    subprocess.run(["git", "init", "-q", str(tmp_path / "git")], check=True)
    assert not write(tmp_path / "git" / "inside").exists()
    assert not (tmp_path / "git" / ".dvc").exists()
