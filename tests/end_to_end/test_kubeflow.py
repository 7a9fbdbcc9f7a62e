"""The compiled pipeline's very functions, run to the end by Kubeflow's local runner on the same slice."""

import os
from pathlib import Path
from typing import Any

import pytest
from kfp import local

from longtrail.config import parse_config
from longtrail.files import read_json
from pipelines.kubeflow import build

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def root(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's artifacts. Few models: the loop, the gate and the condition are what is looked at here."""
    values = settings | {"pipeline": {"models": ["popular_items", "popularity", "din"]}, "ab_test": {"rounds": 40, "max_weight_share": 1.0}}
    folder = tmp_path_factory.mktemp("kubeflow")
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(folder), raise_on_error=True)
        build(parse_config(values))()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return folder


def only(root: Path, name: str) -> Path:
    (found,) = {path.parent for path in root.rglob(name)}
    return found


def test_it_runs_to_the_end(root: Path) -> None:
    assert read_json(only(root, "result.json") / "result.json")["success"]
    assert len({p for p in root.rglob("evaluation.json") if "evaluation" in p.parent.name}) == 3
    champion = only(root, "selection.json")
    assert read_json(champion / "selection.json")["ranker"]["name"] == "din"
    assert (champion / "retriever" / "model.safetensors").is_file()
    assert list(root.rglob("report.json"))


def test_packaging_follows_the_verdict(root: Path) -> None:
    verdict = read_json(only(root, "report.json") / "report.json")["verdict"]
    packaged = any(p.name == "bento.yaml" for p in root.rglob("bento.yaml"))
    assert packaged == (verdict == "win")
