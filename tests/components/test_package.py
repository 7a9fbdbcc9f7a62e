"""Packaging: what stands in a Bento, which ranker, and what stops it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from components import package as step
from longtrail.config import load_config
from longtrail.errors import ModelError
from longtrail.files import hash_path, read_json, write_json
from longtrail.history import HistoryArrays
from serving.arms import make_scorer
from serving.artifacts import Artifacts
from tests.serving.bento import Outputs, labels, outputs


@pytest.fixture(scope="session")
def made() -> Outputs:
    return outputs()


@pytest.fixture
def changed(made: Outputs, tmp_path: Path) -> Outputs:
    """The same outputs in a folder of one's own; bento/ is a marker."""
    shutil.copytree(made.root, tmp_path / "build", ignore=shutil.ignore_patterns("bento"))
    (tmp_path / "build" / "bento").mkdir()
    (tmp_path / "build" / "bento" / "before").touch()
    return Outputs(tmp_path / "build")


def test_labels_carry_the_lineage(made: Outputs) -> None:
    found = labels(made.bento)
    assert found["raw_data"] == read_json(made.tables / "counts.json")["source_sha256"]
    assert found["validation"] == hash_path(made.validation / "result.json")
    assert found["feature_definitions"] == read_json(made.features / "features.json")["hashes"]["feature_definitions"]
    assert len(found["parameters"]) == 64 and len(found["features"]) == 64
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()
    assert found["code"] == "" or (found["code"].removesuffix("-dirty") == commit and len(commit) == 40)
    assert (found["arm"], found["ranker"], found["retriever"], found["verdict"]) == ("sam", "sam", "sasrec", "win")
    assert read_json(made.bento / "src/artifacts/manifest.json")["lineage"]["raw_data"] == found["raw_data"]


def test_a_bento_holds_all_it_needs_and_nothing_else(made: Outputs) -> None:
    source = made.bento / "src"
    assert {path.name for path in source.iterdir()} == {"artifacts", "bentofile.yaml", "features", "longtrail", "serving"}
    assert {path.name for path in (source / "artifacts").iterdir()} == {
        "catalogue.parquet", "feast", "manifest.json", "params.yaml", "parity.parquet", "ranker", "reference.json", "retriever", "users.parquet",
    }  # fmt: skip
    assert not list(source.rglob("*.pyc")) and not list((source / "artifacts" / "feast").rglob("offline"))
    assert hash_path(source / "artifacts" / "ranker" / "model.safetensors") == hash_path(made.champion / "ranker" / "model.safetensors")
    requirements = (made.bento / "env/python/requirements.txt").read_text().split()
    assert "bentoml==1.4.39" in requirements and "torch==2.13.0" in requirements
    assert not [line for line in requirements if line.startswith(("kfp", "great", "dvc", "lightning"))]
    assert not list(made.root.glob(".bento-*")), "the workshop is gone"


def test_the_packaged_code_needs_no_pipeline(made: Outputs) -> None:
    """What the service imports at run time comes from the Bento, and none of it wants what the requirements leave out."""
    code = (
        "import sys, serving.service, serving.engine, serving.parity, features.online, longtrail\n"
        "wrong = {'kfp', 'great_expectations', 'dvc', 'lightning', 'components', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "print(longtrail.__file__, serving.service.__file__); sys.exit(', '.join(wrong) or 0)"
    )
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=made.bento / "src", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str((made.bento / "src").resolve())) for path in done.stdout.split())


@pytest.mark.parametrize(
    ("verdict", "arm"),
    [("win", "sam"), ("lose", "popularity"), ("not enough data", "popularity"), ("do not trust", "popularity"), ("equivalent", "popularity")],
)
def test_only_a_win_changes_the_ranker(made: Outputs, tmp_path: Path, verdict: str, arm: str) -> None:
    write_json(tmp_path / "report.json", {"verdict": verdict})
    choice = step.choose(made.champion, tmp_path)
    assert choice["labels"]["arm"] == arm and choice["labels"]["verdict"] == verdict
    assert read_json(made.champion / choice["folder"] / "model.json")["name"] == arm
    assert arm in choice["sentence"] and (verdict == "win" or repr(verdict) in choice["sentence"])


def test_the_incumbent_is_packaged_after_a_loss(changed: Outputs, caplog: pytest.LogCaptureFixture) -> None:
    write_json(changed.ab / "report.json", {"verdict": "lose"})
    with caplog.at_level("INFO"):
        changed.package()
    assert labels(changed.bento)["arm"] == "popularity" and not (changed.bento / "before").exists()
    assert read_json(changed.bento / "src/artifacts/ranker/model.json")["name"] == "popularity"
    assert "packaged the incumbent popularity: the A/B verdict on the champion sam is 'lose'" in caplog.text


def test_what_was_seen_is_recommended_again_where_the_settings_say_so(made: Outputs, changed: Outputs) -> None:
    """Offline lists (parity.parquet, which packaging holds the service to) and the service's."""
    params = changed.root / "params.yaml"
    params.write_text(yaml.safe_dump({**yaml.safe_load(params.read_text()), "retrieval": {"exclude_seen": False}}))
    changed.package()
    before, after = (pq.read_table(o.bento / "src/artifacts/parity.parquet").to_pylist() for o in (made, changed))
    lists = [(one["retrieved"], other["retrieved"]) for one, other in zip(before, after, strict=True) if one["history_length"]]
    assert all(min(len(one), 20) <= len(other) and other[0] >= one[0] for one, other in lists) and any(one != other for one, other in lists)
    row = max(after, key=lambda found: found["history_length"])
    history = {name: np.array([row[f"history_{name}"]]) for name in ("items", "actions", "times")}
    read = HistoryArrays(**{f"{name}_BL": values for name, values in history.items()}, lengths_B=np.array([history["items"].size]))
    for bento, excluded in ((made.bento, True), (changed.bento, False)):
        artifacts = Artifacts.open(bento / "src" / "artifacts")
        everything, _ = make_scorer(artifacts, artifacts.ranker).retrieve(read, artifacts.catalogue.items, np.unique(row["history_items"]))
        assert set(row["history_items"]).isdisjoint(everything.tolist()) == excluded
        assert len(everything) == artifacts.catalogue.items - (len(set(row["history_items"])) if excluded else 0)


def test_scores_that_differ_stop_it(changed: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    write = step.write_parity

    def altered(path: Path, *arguments: Path, **models: Path) -> None:
        write(path, *arguments, **models)
        rows = pq.read_table(path).to_pylist()
        rows[3]["logits"][1] += 2e-5
        pq.write_table(pa.Table.from_pylist(rows), path)

    monkeypatch.setattr(step, "write_parity", altered)
    monkeypatch.setattr(step, "build", lambda stage, **options: stage.rename(stage.parent / "src").parent)
    with pytest.raises(ModelError, match=r"packaged scores differ from the offline ones: .*logits: place 2: .*offline it was"):
        changed.package()
    assert (changed.bento / "before").exists() and not list(changed.root.glob(".bento-*"))


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("champion/selection.json", "selection.json: no such file"),
        ("ab/report.json", "report.json: no such file"),
        ("champion/ranker", "ranker: no such folder"),
        ("tables/counts.json", "counts.json: no such file"),
        ("validation/result.json", "result.json"),
        ("features/feast", "feast"),
    ],
)
def test_what_is_missing_is_named(changed: Outputs, missing: str, says: str) -> None:
    path = changed.root / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ModelError, match=says):
        changed.package()
    assert (changed.bento / "before").exists()


def test_a_damaged_model_stops_it(changed: Outputs) -> None:
    weights = changed.champion / "ranker" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match=r"model\.safetensors: SHA-256"):
        changed.package()


def test_the_same_inputs_give_the_same_version(made: Outputs) -> None:
    config = load_config(made.root / "params.yaml")
    lineage = step.lineage_of(config, features=made.features, tables=made.tables, validation=made.validation)
    again = step.lineage_of(config, features=made.features, tables=made.tables, validation=made.validation)
    assert lineage == again and json.dumps(lineage)
    assert len(yaml.safe_load((made.bento / "bento.yaml").read_text())["version"]) == 16
