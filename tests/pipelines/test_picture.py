"""The picture in the documentation is the compiled pipeline's own graph, and what stands around it is there."""

from pathlib import Path

import pytest
import yaml

from longtrail.config import load_config
from longtrail.errors import ConfigError
from pipelines.kubeflow import SECTIONS
from pipelines.picture import AROUND, SHAPES, graph, picture, renewed
from tests.pipelines.test_graph import dvc_edges

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cluster.md"


def test_the_page_shows_the_pipeline_as_it_is() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert renewed(text, load_config(ROOT / "params.yaml")) == text, "renew it: python -m pipelines.picture"


def test_its_edges_are_dvc_s_and_its_conditions_the_pipeline_s() -> None:
    steps, edges = graph(load_config(ROOT / "params.yaml"))
    assert {edge[:2] for edge in edges} == dvc_edges(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
    assert ("train", "select", "model") in edges
    assert {step: subject for step, subject in steps.items() if subject} == {
        "train": "for each of the models",
        "evaluate": "for each of the models",
        "package": "if the champion won",
    }


def test_what_stands_around_the_pipeline_is_there() -> None:
    from serving.gate import ROUTES

    assert {name for edge in AROUND for name in edge[:2]} <= set(SECTIONS) | set(SHAPES)
    (asked,) = [what for producer, _, what in AROUND if producer == "people"]
    assert set(asked.split(", ")) <= set(ROUTES)
    (back,) = [what for producer, _, what in AROUND if producer == "logs"]
    assert (ROOT / Path(*back.split()[-1].split("."))).with_suffix(".py").is_file()


def test_a_page_is_renewed_and_one_without_marks_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace("-->|tables| validate", "-->|old| validate"))
    picture(page, ROOT / "params.yaml")
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    page.write_text("nothing")
    with pytest.raises(ConfigError, match=r"page\.md: no picture"):
        picture(page, ROOT / "params.yaml")
