"""The report as people see it: nothing cut off on a phone or a desk, nothing fetched, every verdict's page whole.

LONGTRAIL_SCREENSHOTS=docs/images python -m pytest tests/components/test_ab_page.py     # renews the pictures of the docs
"""

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from components.ab_log import compare_log
from components.ab_report import html
from components.live_report import html as live_html
from components.live_test import judge_live, read_log
from longtrail.config import ABTestSettings
from tests.components import chromium
from tests.components.ab_logs import write
from tests.components.test_ab_log import live_log

BROWSER = pytest.mark.skipif(chromium.BROWSER is None, reason="no chromium on this machine: the page's layout is not looked at")
VERDICTS = {
    "win": {"gap": 0.8},
    "lose": {"gap": -0.8},
    "not-enough-data": {"gap": 0.03, "noise": 0.8, "rows": 1_500},
    "do-not-trust": {"sharper": 0.2, "rows": 8_000},
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each verdict, and one of a live test."""
    root = tmp_path_factory.mktemp("pages")
    made = {}
    for name, settings in VERDICTS.items():
        log = write(root / f"{name}.parquet", **settings)  # type: ignore[arg-type]
        result = compare_log(ABTestSettings(replicates=1_000), log, "old", "new", segments=["device"])
        assert result["verdict"] == name.replace("-", " "), result["sentence"]
        made[name] = root / f"{name}.html"
        made[name].write_text(html({**result, "how": "A simulated log."}), encoding="utf-8")
    result = judge_live(read_log(live_log(root / "live.parquet", 0.1), "old", "new", None), a="old", b="new", share=0.5, margin=0.01, confidence=0.95)
    made["live"] = root / "live.html"
    made["live"].write_text(live_html(result), encoding="utf-8")
    return made


class _Tags(HTMLParser):
    """Checks that what is opened is closed, in order."""

    VOID = ("meta", "br", "img", "link", "use", "path")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open[-1] == tag, (tag, self.open[-4:])
            self.open.pop()

    def handle_startendtag(self, tag: str, attrs: object) -> None: ...


def test_pages_are_whole_and_fetch_nothing(pages: dict[str, Path]) -> None:
    for name, page in pages.items():
        text = page.read_text(encoding="utf-8")
        tags = _Tags()
        tags.feed(text)
        assert not tags.open, (name, tags.open)
        fetched = re.findall(r'(?:src|href)="(?!#)[^"]*"|url\((?!#)[^)]*\)|@import|<script', text)
        assert not [reference for reference in fetched if not reference.startswith('xlink:href="#')], (name, fetched[:3])
        assert "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.S).lower().replace("finance", ""), name


def test_the_words_lead_nobody_astray(pages: dict[str, Path]) -> None:
    text = {name: re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8")) for name, page in pages.items()}
    assert "may replace" in text["win"] and "Keep old" in text["lose"] and "Keep old for now" in text["not-enough-data"]
    assert "Read no winner from this page" in text["do-not-trust"] and "may replace" not in text["do-not-trust"]
    assert "· failed" in text["do-not-trust"] and "· failed" not in text["win"]


@BROWSER
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_cut_off_or_fetched(pages: dict[str, Path], tmp_path: Path, width: int) -> None:
    for name in ("win", "do-not-trust", "live"):
        found = chromium.measure(pages[name], width, tmp_path)
        assert found["wide"] <= width and not found["cut"] and not found["fetched"], (name, found)
        assert found["tall"] > 1_500


@BROWSER
def test_pictures_for_the_docs(pages: dict[str, Path], tmp_path: Path) -> None:
    """Taken of every run, kept where LONGTRAIL_SCREENSHOTS says."""
    keep = os.environ.get("LONGTRAIL_SCREENSHOTS")
    folder = Path(keep).resolve() if keep else tmp_path
    for name, width, height in (("win", 1280, 1150), ("win", 390, 2000), ("do-not-trust", 390, 2000), ("live", 390, 2000)):
        out = folder / f"ab_{name.replace('-', '_')}_{'phone' if width < 600 else 'desk'}.png"
        chromium.screenshot(pages[name], out, width, height, tmp_path)
        assert out.read_bytes()[:4] == b"\x89PNG" and out.stat().st_size > 20_000
