"""What the Kubeflow wrappers add to the steps: metadata that the page shows, the gate, the state of the source, models that go on."""

import csv
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from kfp.dsl import HTML, Artifact, ClassificationMetrics, Dataset, Metrics, Model

from components.train import train_model
from longtrail.config import parse_config
from longtrail.errors import ConfigError, DatasetError, ModelError, ValidationError
from longtrail.files import hash_path, read_json, write_json
from pipelines import steps
from pipelines.artifacts import describe_bento, log_classification
from pipelines.continuing import train_or_continue
from pipelines.previous import fetch, publish
from pipelines.source import state

DIN = {"stage": "ranking", "kind": "din", "width": 4, "hidden": [8], "max_history": 10, "max_epochs": 1}
SETTINGS: dict[str, Any] = {
    "models": {"popular": {"stage": "retrieval", "kind": "popularity"}, "popularity": {"stage": "ranking", "kind": "popularity"}, "din": DIN},
    "pipeline": {"models": ["popular", "popularity", "din"]},
    "training": {"threads": 1},
}


def new(kind: Any, folder: Path, name: str) -> Any:
    return kind(uri=str(folder / name), name=name, metadata={})


def test_a_failed_validation_is_shown_and_stops_what_follows(toy_tables_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kubeflow keeps nothing of a task that failed: validate ends well, with its page, and build_features refuses the tables."""
    tables = new(Dataset, toy_tables_folder.parent, toy_tables_folder.name)
    validation, metrics, page = new(Artifact, tmp_path, "validation"), new(Metrics, tmp_path, "metrics"), new(HTML, tmp_path, "page")
    strict = {"validation": {"click_rate": [0.98, 0.99]}}
    steps.validate.python_func(settings=strict, tables=tables, validation=validation, metrics=metrics, page=page)
    assert metrics.metadata["success"] == 0 and metrics.metadata["critical_failures"] >= 1
    assert "click_rate" in Path(page.path).read_text() and "critical expectation(s) failed" in capsys.readouterr().out
    with pytest.raises(ValidationError, match=r"validation failed \(.*click_rate.*features are not built"):
        steps.build_features.python_func(settings={}, tables=tables, validation=validation, features=new(Dataset, tmp_path, "features"))
    assert not (tmp_path / "features").exists()


def test_a_ranker_s_curve_and_matrix_reach_the_page(tmp_path: Path) -> None:
    roc = [
        {"threshold": 1.0, "false_positive_rate": 0.0, "true_positive_rate": 0.0},
        {"threshold": 0.2, "false_positive_rate": 1.0, "true_positive_rate": 1.0},
    ]
    judged = {"roc": roc, "confusion": {"threshold": 0.5, "matrix": [[5, 2], [1, 3]]}}
    write_json(tmp_path / "evaluation.json", {"classification": {"valid": {}, "test": judged}})
    shown: Any = new(ClassificationMetrics, tmp_path, "classification")
    log_classification(shown, tmp_path / "evaluation.json")
    assert shown.metadata["confidenceMetrics"] == [
        {"confidenceThreshold": 1.0, "recall": 0.0, "falsePositiveRate": 0.0}, {"confidenceThreshold": 0.2, "recall": 1.0, "falsePositiveRate": 1.0},
    ]  # fmt: skip
    assert [row["row"] for row in shown.metadata["confusionMatrix"]["rows"]] == [[5, 2], [1, 3]]
    write_json(tmp_path / "evaluation.json", {"classification": {}})
    retriever: Any = new(ClassificationMetrics, tmp_path, "classification")
    log_classification(retriever, tmp_path / "evaluation.json")
    assert retriever.metadata == {}


def test_the_bento_s_labels_are_its_metadata(tmp_path: Path) -> None:
    (tmp_path / "bento.yaml").write_text(yaml.safe_dump({"name": "longtrail", "version": "1", "labels": {"verdict": "win"}, "services": []}))
    bento: Any = new(Model, tmp_path, "bento")
    describe_bento(bento, tmp_path)
    assert bento.metadata == {"name": "longtrail", "version": "1", "verdict": "win"}


def test_the_state_of_the_source_changes_with_its_files_alone(tmp_path: Path) -> None:
    def now() -> str:
        return state(parse_config({"dataset": {"kind": "movielens", "source": str(tmp_path)}}).dataset)

    (tmp_path / "u.data").write_text("1\t1\t5\t1\n")
    first = now()
    assert first == now() and len(first) == 64
    os.utime(tmp_path / "u.data", (0, 0))
    touched = now()
    (tmp_path / "more").write_text("")
    assert len({first, touched, now()}) == 3
    assert state(parse_config({}).dataset) == ""  # ml-100k: it cannot change
    looked = steps.look.python_func(settings={"dataset": {"kind": "movielens", "source": str(tmp_path)}})
    assert looked == now()


def test_the_state_of_an_address(tmp_path: Path) -> None:
    """Any store that fsspec knows; a path in its form here. An address that holds nothing is said to."""
    (tmp_path / "day=1.csv").write_text("a")

    def now(source: str) -> str:
        return state(parse_config({"dataset": {"kind": "movielens", "source": source}}).dataset)

    glob, folder, file = (f"file://{tmp_path}{end}" for end in ("/*.csv", "", "/day=1.csv"))
    before = {now(source) for source in (glob, folder, file)}
    assert len(before) == 1  # one and the same file
    (tmp_path / "day=2.csv").write_text("b")
    assert {now(glob), now(folder)}.isdisjoint(before) and now(file) in before
    with pytest.raises(DatasetError, match="nothing is there"):
        now(f"file://{tmp_path}/*.parquet")


@pytest.fixture(scope="module")
def yesterday(toy_features_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("yesterday") / "din"
    train_model(parse_config(SETTINGS), "din", features=toy_features_folder, out=out, checkpoints=out.parent / "checkpoints")
    return out


def dated(model: Path, to: Path, until: str) -> Path:
    """A copy that stopped learning at another time."""
    to.mkdir()
    for file in model.iterdir():
        if file.is_file():
            (to / file.name).write_bytes(file.read_bytes())
    write_json(to / "lineage.json", read_json(to / "lineage.json") | {"trained_until": until})
    return to


def test_a_model_goes_on_from_the_one_that_was_left(toy_features_folder: Path, yesterday: Path, tmp_path: Path) -> None:
    store, times = str(tmp_path / "store"), pq.read_table(toy_features_folder / "examples" / "train.parquet", columns=["timestamp"])["timestamp"]
    older = dated(yesterday, tmp_path / "older", sorted(times.to_pylist())[len(times) // 2].isoformat())
    assert fetch(store, "din", parse_config(SETTINGS), tmp_path / "none") is None
    (place,) = publish([older], store)
    assert place.startswith(f"{store}/din/")
    model, metrics, page = new(Model, tmp_path, "model"), new(Metrics, tmp_path, "metrics"), new(HTML, tmp_path, "page")
    features = new(Dataset, toy_features_folder.parent, toy_features_folder.name)
    settings = {**SETTINGS, "training": {"threads": 1, "seed": 1}}
    steps.train.python_func(settings=settings, model_name="din", previous=store, features=features, model=model, metrics=metrics, page=page)
    lineage = read_json(Path(model.path) / "lineage.json")
    assert lineage["previous"] == read_json(older / "model.json")["weights"]["sha256"] == model.metadata["previous"]
    assert model.metadata["stage"] == "ranking" and model.metadata["kind"] == "din"
    with (Path(model.path) / "learning_curve.csv").open() as text:
        before, epoch = csv.DictReader(text)
    assert (before["epoch"], before["train_loss"]) == ("0", "")
    better = float(epoch["valid_auc"]) > float(before["valid_auc"])
    assert (model.metadata["weights_sha256"] != lineage["previous"]) == better
    assert metrics.metadata["train_loss"] == pytest.approx(float(epoch["train_loss"])) and "<svg" in Path(page.path).read_text()
    assert publish([Path(model.path)], store) == [place]
    again = fetch(store, "din", parse_config(SETTINGS), tmp_path / "again")
    assert again is not None and hash_path(again / "model.safetensors") == model.metadata["weights_sha256"]


def test_where_nothing_came_the_model_is_taken_over(toy_features_folder: Path, yesterday: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    publish([yesterday], store)
    out = tmp_path / "model"
    train_or_continue(settings=SETTINGS, name="din", store=store, features=toy_features_folder, out=out, scratch=tmp_path / "scratch")
    assert (out / "model.safetensors").read_bytes() == (yesterday / "model.safetensors").read_bytes()
    assert read_json(out / "lineage.json") == read_json(yesterday / "lineage.json")


def test_where_ids_have_moved_the_model_is_not_taken_over(toy_features_folder: Path, yesterday: Path, tmp_path: Path) -> None:
    store, until = str(tmp_path / "store"), read_json(yesterday / "lineage.json")["trained_until"]
    moved = dated(yesterday, tmp_path / "moved", until)
    items = pq.read_table(moved / "vocabulary.parquet")
    pq.write_table(items.take([1, 0, *range(2, len(items))]), moved / "vocabulary.parquet")
    publish([moved], store)
    out = tmp_path / "model"
    train_or_continue(settings=SETTINGS, name="din", store=store, features=toy_features_folder, out=out, scratch=tmp_path / "scratch")
    assert read_json(out / "lineage.json")["previous"] is None
    assert (out / "vocabulary.parquet").read_bytes() == (yesterday / "vocabulary.parquet").read_bytes()


def test_a_changed_setting_begins_anew_and_names_are_checked(toy_features_folder: Path, yesterday: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    publish([yesterday], store)
    wider = parse_config({**SETTINGS, "models": {**SETTINGS["models"], "din": {**DIN, "width": 8}}})
    assert fetch(store, "din", wider, tmp_path / "none") is None
    with pytest.raises(ConfigError, match="names 'bert'; expected some of popular, popularity, din"):
        train_or_continue(settings=SETTINGS, name="bert", store="", features=toy_features_folder, out=tmp_path / "x", scratch=tmp_path)
    with pytest.raises(ModelError, match="not a model folder"):
        publish([tmp_path], store)
