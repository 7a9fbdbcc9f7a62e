"""docs/settings.md is the page that the settings classes make, and it leaves nothing out."""

import re
from pathlib import Path

import pytest

from longtrail.config import Config, Model, SAMSettings
from longtrail.config.reference import page
from longtrail.config.shapes import shape_of

ROOT = Path(__file__).parents[2]


def section(title: str) -> str:
    """What stands under a heading, up to the next."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", page(), flags=re.M | re.S)
    assert found, title
    return found[1]


def rows(title: str) -> dict[str, list[str]]:
    """Setting to the cells after it."""
    lines = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in section(title).splitlines() if line.startswith("| `")]
    return {name.strip("`"): cells for name, *cells in lines}


def test_the_page_is_the_one_that_is_made() -> None:
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page(), "python -m longtrail.config.reference > docs/settings.md"


def test_every_section_and_every_kind_of_model_has_a_heading() -> None:
    headings = re.findall(r"^## (\w+)", page(), flags=re.M)
    assert set(headings) == set(Config.model_fields)
    for told, _ in shape_of(Model).leaves():
        section(f"stage: {told['stage']}, kind: {told['kind']}")


def test_every_setting_of_a_model_stands_in_its_table_or_in_one_that_it_names() -> None:
    for told, leaf in shape_of(Model).leaves():
        title = f"stage: {told['stage']}, kind: {told['kind']}"
        named = re.findall(r"\[((?:ranking|retrieval): shared by [^\]]+)\]", section(title))
        there = set(rows(title)).union(*map(rows, named))
        assert there == set(leaf.fields) - {"stage", "kind"}, title


def test_every_setting_has_a_meaning() -> None:
    lines = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in page().splitlines() if line.startswith("| `")]
    assert len(lines) > 200
    assert not [cells for cells in lines if len(cells) != 4 or not all(cell.strip() for cell in cells)]


@pytest.mark.parametrize(
    ("title", "name", "cells"),
    [
        ("stage: ranking, kind: sam", "passes", ["whole number > 0", f"`{SAMSettings().passes}`"]),
        ("stage: ranking, kind: dien", "max_history", ["whole number > 0, ≤ 1,000,000", "`50`"]),  # its own default, not the one that rankers share
        ("training", "seed", ["whole number ≥ 0, < 4,294,967,296", "`0`"]),
        ("training", "accelerator", ["`auto`, `cpu`, `gpu`", "`auto`"]),
        ("training", "checkpoint_steps", ["whole number > 0 or `null`", "`null`"]),
        ("dataset, kind: event_log", "source", ["text", "none: it must be given"]),
        ("validation", "click_rate", ["list of number ≥ 0, ≤ 1 and number ≥ 0, ≤ 1", "`[0.001, 0.99]`"]),
        ("cluster", "cpu", [r"text like `^(\d*\.)?\d+m?$`", "`'2'`"]),
    ],
)
def test_a_row_says_what_is_allowed_and_the_default(title: str, name: str, cells: list[str]) -> None:
    assert rows(title)[name][:2] == cells


def test_links_lead_to_headings_of_the_page() -> None:
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", page(), flags=re.M)}
    links = re.findall(r"\]\(#([^)]+)\)", page())
    assert len(links) > 20 and set(links) <= anchors
