"""The pages of docs/models: one for every kind, each with its picture, and no link that leads nowhere."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from docs.images.models.draw import PICTURES, main
from longtrail.config.ranking_models import RankerModel
from longtrail.config.retrieval_models import RetrieverModel
from longtrail.models.registry import MODELS

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted([DOCS / "models.md", *(DOCS / "models").glob("*.md"), *(DOCS / "experiments").glob("*.md")])
PARTS = ("## When to choose", "## Equations", "## Cost", "## What is whose")


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(to), f"{page.name}: {target}"


@pytest.mark.parametrize("kind", sorted({kind for _, kind in MODELS}))
def test_every_kind_has_a_page(kind: str) -> None:
    page = DOCS / "models" / f"{kind}.md"
    assert page.exists(), f"docs/models/{kind}.md: no such page; expected one with {', '.join(PARTS)} and a picture of docs/images/models"
    text = page.read_text(encoding="utf-8")
    assert f"(../images/models/{kind}.svg)" in text and f"`kind: {kind}`" in text
    assert all(part in text for part in PARTS), [part for part in PARTS if part not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_shown_are_accepted(page: Path) -> None:
    of_stage: dict[str, TypeAdapter[Any]] = {"ranking": TypeAdapter(RankerModel), "retrieval": TypeAdapter(RetrieverModel)}
    for block in re.findall(r"^```yaml\n(models:.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S):
        for name, settings in yaml.safe_load(block)["models"].items():
            assert of_stage[settings["stage"]].validate_python(settings).kind == settings["kind"], name


def test_pictures_are_those_that_are_drawn(tmp_path: Path) -> None:
    main(tmp_path)
    for name in PICTURES:
        drawn, kept = (folder / f"{name}.svg" for folder in (tmp_path, DOCS / "images" / "models"))
        assert drawn.read_text() == kept.read_text(), f"{name}: python -m docs.images.models.draw"
