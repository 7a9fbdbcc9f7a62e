"""The select step and the closing summary, on folders as train and evaluate leave them."""

import pytest
import yaml

from components.select import select
from components.summary import markdown_results, markdown_table, summarise, text_table
from longtrail.errors import EvaluationError
from longtrail.examples import FeatureSet
from longtrail.files import read_json, write_json
from longtrail.models.store import load_model
from tests.models_of_toy import SETTINGS, save_toy_model, toy_model

FIGURES = {  # stage, metric, value on valid, p99
    "popular_items": ("retrieval", "ndcg@10", 0.02, 1.0),
    "sasrec": ("retrieval", "ndcg@10", 0.07, 2.0),
    "popularity": ("ranking", "gauc", 0.60, 0.1),
    "din": ("ranking", "gauc", 0.70, 4.0),
}


@pytest.fixture
def build(toy_features_folder, tmp_path):
    """build/ after evaluate, with figures written by hand, and a params.yaml."""
    features = FeatureSet.open(toy_features_folder)
    for name, (stage, metric, value, p99) in FIGURES.items():
        folder = save_toy_model(tmp_path / "models" / name, toy_model(features, name))
        (folder / "learning_curve.csv").write_text("epoch\n")
        estimate = {"value": value, "low": value - 0.01, "high": value + 0.01}
        document = {
            "model": name,
            "stage": stage,
            "kind": SETTINGS[name].kind,
            "confidence": 0.95,
            "weights": read_json(folder / "model.json")["weights"]["sha256"],
            "splits": {"valid": {"metrics": {metric: estimate}}, "test": {"metrics": {metric: estimate}}},
            "cost": {"latency_ms": {"p50": p99 / 2, "p99": p99}, "model_bytes": 1000},
        }
        write_json(tmp_path / "evaluations" / name / "evaluation.json", document)
    params = {
        "models": {name: settings.model_dump(mode="json") for name, settings in SETTINGS.items()},
        "pipeline": {"models": list(SETTINGS)},
        "selection": {
            "incumbent": "popularity",
            "retrieval": {"metric": "ndcg@10", "max_latency_ms": 50, "max_bytes": 1e9},
            "ranking": {"metric": "gauc", "max_latency_ms": 30, "max_bytes": 1e9},
        },
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return tmp_path


def run_select(build):
    select(models=build / "models", evaluations=build / "evaluations", params=build / "params.yaml", champion=build / "champion")


def test_champions_are_copied_and_load(build):
    run_select(build)
    selection = read_json(build / "champion" / "selection.json")
    assert (selection["retriever"]["name"], selection["ranker"]["name"], selection["incumbent"]) == ("sasrec", "din", "popularity")
    for role, name in (("retriever", "sasrec"), ("ranker", "din"), ("incumbent", "popularity")):
        assert load_model(build / "champion" / role).card.name == name
        assert sorted(p.name for p in (build / "champion" / role).iterdir()) == ["lineage.json", "model.json", "model.safetensors"]


def test_a_missing_evaluation_is_named(build):
    (build / "evaluations" / "din" / "evaluation.json").unlink()
    with pytest.raises(EvaluationError, match=r"din/evaluation\.json: no such file"):
        run_select(build)
    assert not (build / "champion").exists()


def test_an_evaluation_of_other_weights_is_refused(build, toy_features_folder):
    model = toy_model(FeatureSet.open(toy_features_folder), "din")
    for parameter in model.module.parameters():
        parameter.data += 1
    save_toy_model(build / "models" / "din", model)
    with pytest.raises(EvaluationError, match="judges other weights"):
        run_select(build)


def test_a_folder_of_an_earlier_run_is_not_considered(build):
    write_json(build / "evaluations" / "old" / "evaluation.json", {"model": "old", "stage": "ranking"})
    run_select(build)
    names = [loser["name"] for loser in read_json(build / "champion" / "selection.json")["ranker"]["losers"]]
    assert names == ["popularity"]


def test_summary_of_a_whole_run(build, capsys):
    run_select(build)
    write_json(build / "ab" / "report.json", {"verdict": "win", "sentence": "din beats popularity by 3 %."})
    (build / "ab" / "report.html").write_text("<html>")
    (build / "bento").mkdir()
    write_json(build / "evaluations" / "old" / "evaluation.json", {"model": "old", "stage": "ranking"})
    summarise(build)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert next(i for i, line in enumerate(lines) if "din" in line) < next(
        i for i, line in enumerate(lines) if "popularity " in line and "0.6" in line
    )
    assert any("din" in line and "champion" in line and "0.7000 (0.6900–0.7100)" in line and "4.00" in line for line in lines)
    assert any("popularity" in line and "incumbent" in line for line in lines)
    assert "A/B test: win\n  din beats popularity by 3 %." in text
    assert str(build / "ab" / "report.html") in text and "make serve" in text and "old" not in text.replace(str(build), "")


def test_summary_of_nothing_and_of_broken_pieces(tmp_path, capsys):
    summarise(tmp_path)
    assert "no results yet" in capsys.readouterr().out
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "report.json").write_text("{")
    write_json(tmp_path / "evaluations" / "x" / "evaluation.json", {"model": "x", "stage": "ranking"})
    summarise(tmp_path)
    assert "x" in capsys.readouterr().out


def test_tables():
    assert text_table(["model", "auc"], [["sam", "0.7"], ["a long name", "–"]]) == "model        auc\nsam          0.7\na long name  –"
    assert markdown_table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"


def test_markdown_results(build):
    run_select(build)
    text = markdown_results(build)
    assert "**Ranking** (test split)" in text and "| din | champion | 0.7000 (0.6900–0.7100) | 4.00 |" in text
