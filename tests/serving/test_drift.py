"""Drift of a service: the window against a slow count, alarms on planted drift and none without; the report of a real session."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longtrail.config import DriftSettings, load_config
from longtrail.drift import GIVEN, RETRIEVED, Reference, psi
from longtrail.history import HistoryArrays
from serving.artifacts import ARTIFACTS, Artifacts
from serving.drift import Served, drift_over
from serving.drift_window import DriftWindow, Listed, Row, RowMaker, measure
from serving.event_records import LoggedEvent
from serving.evidence import Evidence
from serving.lists import UNKNOWN_USER, PopularLists, Shown
from tests.serving.bento import Outputs
from tests.serving.conftest import Running

USERS = 400


@pytest.fixture(scope="module")
def artifacts(packaged: Outputs) -> Artifacts:
    return Artifacts.open(packaged.bento / "src" / ARTIFACTS)


@pytest.fixture(scope="module")
def reference(artifacts: Artifacts) -> Reference:
    return Reference.read(artifacts.folder / "reference.json")


@pytest.fixture(scope="module")
def maker(artifacts: Artifacts, reference: Reference) -> RowMaker:
    return RowMaker(reference, artifacts.catalogue, artifacts.manifest.prior_click_rate, USERS)


def made(total: int, impressions: int, clicks: int, candidates: np.ndarray, *, retrieved: bool = False, score: float = 0.2) -> Shown:
    empty = np.zeros((1, 1), np.int64)
    statistics = {"user_impressions": np.array([impressions]), "user_clicks": np.array([clicks])}
    nothing = HistoryArrays(items_BL=empty, actions_BL=empty, times_BL=empty, lengths_B=np.array([0]))
    evidence = Evidence(time=0, history=nothing, total=total, user=statistics, items={}, logits_C=np.zeros(0))
    items = candidates[:3]
    return Shown(
        items=items,
        scores=np.full(len(items), score),
        propensities=np.ones(len(items)),
        candidates=candidates,
        retrieved=retrieved,
        evidence=evidence,
    )


def drawn(reference: Reference, name: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Values of a feature as often as packaging saw their bins."""
    feature = reference.features[name]
    shares = np.array(feature.newest) / sum(feature.newest)
    inside = np.array([feature.edges[0] - 1e-9, *feature.edges])  # a value of each bin
    return inside[rng.choice(len(shares), n, p=shares)]


def like_packaging(reference: Reference, rng: np.random.Generator, n: int) -> list[Row]:
    """Requests of as many users, each feature drawn from what packaging saw."""
    rows = [Row(at=0.0, user=user, new_user=False) for user in range(1, n + 1)]
    for name in ("history_length", "user_impressions", "user_click_rate"):
        for row, value in zip(rows, drawn(reference, name, rng, n), strict=True):
            row.values[name] = float(value)
    for place, row in enumerate(rows):
        for feature in ("item_events", "item_click_rate"):
            name = f"{feature}.{(GIVEN, RETRIEVED)[place % 2]}"
            shares = np.array(reference.features[name].newest)
            row.items[name] = rng.multinomial(20, shares / shares.sum())
        row.candidates, row.scores = 20, {item: 0.1 for item in range(1, 6)}
        row.clicked = {item for item in row.scores if rng.random() < 0.1}
    return rows


def test_requests_like_those_at_packaging_raise_no_alarm(reference: Reference) -> None:
    """Sixty windows of 300 users: the stated rate is 1 in 1,000 a look over all features, and a threshold above chance."""
    alarms = [measure(like_packaging(reference, np.random.default_rng(seed), 300), reference, DriftSettings(), at=1e9).alarms for seed in range(60)]
    assert sum(map(bool, alarms)) <= 1, alarms


@pytest.mark.parametrize("planted", ["history_length", "user_click_rate", "item_events.retrieved", "new_user_share", "new_item_share", "calibration"])
def test_planted_drift_is_found_and_nothing_else(reference: Reference, planted: str) -> None:
    rng = np.random.default_rng(1)
    rows = like_packaging(reference, rng, 400)
    for row in rows:
        if planted in row.values:
            row.values[planted] = -1.0 if rng.random() < 0.9 else row.values[planted]
        elif planted in row.items:
            row.items[planted][0] += 60
        elif planted == "new_user_share":
            row.new_user = bool(rng.random() < 0.7)
        elif planted == "new_item_share":
            row.new_items = 6
        elif planted == "calibration":
            row.clicked = {item for item in row.scores if rng.random() < 0.04}
    alarms = measure(rows, reference, DriftSettings(), at=1e9).alarms
    assert [alarm.partition(":")[0] for alarm in alarms] == [planted]
    assert measure(rows[:150], reference, DriftSettings(), at=1e9).alarms == [], "too few to raise an alarm"


def test_a_row_is_what_a_slow_count_says(artifacts: Artifacts, maker: RowMaker, reference: Reference) -> None:
    catalogue, rng = artifacts.catalogue, np.random.default_rng(2)
    prior = artifacts.manifest.prior_click_rate
    for retrieved in (False, True):
        candidates = rng.permutation(np.arange(1, catalogue.items + 1))[:25]
        row = maker.row(3, Listed.of(7.0, made(12, 9, 2, candidates, retrieved=retrieved)))
        assert row.values == {"history_length": 12.0, "user_impressions": 9.0, "user_click_rate": pytest.approx((2 + 10 * prior) / 19)}
        source = RETRIEVED if retrieved else GIVEN
        assert set(row.items) == {f"item_events.{source}", f"item_click_rate.{source}"}
        edges, counts = reference.features[f"item_events.{source}"].edges, np.zeros(reference.features[f"item_events.{source}"].size, int)
        for item in candidates:
            counts[sum(edge <= catalogue.item_events[item] for edge in edges)] += 1
        assert row.items[f"item_events.{source}"].tolist() == counts.tolist()
        assert row.candidates == 25 and row.new_items == sum(catalogue.train_events[item] == 0 for item in candidates)
    unknown = maker.row(None, Listed.of(0.0, PopularLists(catalogue, prior).fallback(UNKNOWN_USER, None, 4)))
    assert unknown.new_user and not unknown.values and not unknown.scores
    assert (
        maker.row(USERS + 1, Listed.of(0.0, made(1, 0, 0, candidates))).new_user
        and not maker.row(USERS, Listed.of(0.0, made(1, 0, 0, candidates))).new_user
    )


def test_the_window_slides_and_joins_clicks(artifacts: Artifacts, maker: RowMaker, reference: Reference) -> None:
    now = [0.0]
    settings = DriftSettings(window_minutes=10, window_requests=50, click_minutes=1)
    catalogue = artifacts.catalogue
    window = DriftWindow(maker, settings, users=lambda key: int(key), items=catalogue.id_of, clock=lambda: now[0])
    candidates = np.arange(1, 11)
    for number in range(40):
        window.listed(f"r{number}", str(number), made(number, 5, 1, candidates))
    event = LoggedEvent(event_id=None, user="1", item=catalogue.keys[2], timestamp=0, action="click", value=None, request="r7", written_at=1)
    strays = [replace(event, request=None), replace(event, request="nobody's"), replace(event, item=catalogue.keys[30]), replace(event, item="none")]
    window.logged([event, event, *strays])
    first = window.look()
    assert first.measures["window_requests"] == 40 and first.calibration.shown == 0, "no list had its minute yet"
    lengths = np.bincount(reference.features["history_length"].bins(np.arange(40)), minlength=reference.features["history_length"].size)
    assert first.features["history_length"].psi == psi(reference.features["history_length"].newest, lengths)
    assert first.features["history_length"].observations == 40
    now[0] = 61.0
    second = window.look()
    assert (second.calibration.shown, second.calibration.clicked) == (120, 1) and second.calibration.predicted == pytest.approx(24)
    for number in range(40, 70):
        window.listed(f"r{number}", str(number), made(number, 5, 1, candidates))
    assert window.look().measures["window_requests"] == 50
    now[0] = 60 * 10 + 30
    assert window.look().measures["window_requests"] == 30
    now[0] = 1e5
    assert window.look().measures["window_requests"] == 0 and window.look().features == {} and window.look().alarms == []


# ---------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def served(running: Running, artifacts: Artifacts) -> Served:
    """A session of some users, new ones among them, with clicks."""
    for number in range(24):
        user = f"u{31 + number:04d}" if number % 4 else f"drift-new-{number}"
        answer = running.client.post("/recommend", json={"user_id": user, "k": 3}).json()
        click = {"user_id": user, "item_id": answer["items"][0]["item_id"], "action": "click", "request_id": answer["request_id"]}
        assert running.client.post("/events", json={"events": [click]}).status_code == 200
        assert running.client.post("/rank", json={"user_id": user, "candidates": ["i0001", "i0002", "i0003"]}).status_code == 200
    return Served(artifacts, running.state)


def test_the_report_of_a_session(served: Served, artifacts: Artifacts, tmp_path: Path) -> None:
    result = drift_over(artifacts, load_config(artifacts.folder / "params.yaml"), served, tmp_path / "drift")
    written = json.loads((tmp_path / "drift" / "drift.json").read_text())
    assert written["requests"] == result["requests"] >= 48 and set(written["features"]) == set(
        Reference.read(artifacts.folder / "reference.json").features
    )
    assert written["measures"]["clicks"] >= 18 and 0 < written["measures"]["new_user_share"] < 1
    named = {each["name"]: each for each in written["expectations"]}
    assert {each["table"] for each in named.values()} >= {"interactions", "impressions", "examples", "summary"}
    assert all(each["success"] for each in named.values() if each["severity"] == "critical" and each["table"] != "summary"), [
        each for each in named.values() if not each["success"]
    ]
    page = (tmp_path / "drift" / "drift.html").read_text()
    assert page.count("<svg") == 2 and "history_length" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "drift" / "data_docs" / "index.html").is_file()


def test_a_served_value_that_the_schema_forbids_is_found(served: Served, artifacts: Artifacts, tmp_path: Path) -> None:
    broken: Any = object.__new__(Served)
    broken.__dict__.update(served.__dict__)
    broken.answers = [{**answer, "propensities": [2.0] * len(answer["items"])} for answer in served.answers]
    result = drift_over(artifacts, load_config(artifacts.folder / "params.yaml"), broken, tmp_path / "drift")
    failed = [
        each["name"] for each in result["expectations"] if not each["success"] and each["severity"] == "critical" and each["table"] != "summary"
    ]
    assert failed == ["impressions.propensity.bounds"]
    assert "critical" in (tmp_path / "drift" / "drift.html").read_text()
