"""A live experiment from end to end: packaged with its arms, served over HTTP to clients whose tastes are known, logged, exported, judged."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray

from components.ingest import ingest
from components.live_test import judge_live, live_test, read_log
from features.online import OnlineFeatures
from longtrail.config import ExperimentSettings, WorldDataset
from longtrail.datasets.world import START, World, simulate_clicks, true_rate
from longtrail.errors import ModelError
from longtrail.files import read_json
from serving.answer_log import SHADOW
from serving.artifacts import ARTIFACTS, Artifacts
from serving.assignment import Assignment
from serving.canary import read_record
from serving.engine import ARM_FAILED, Engine
from serving.export_log import export_log
from serving.schemas import EventsRequest, RankRequest
from serving.segments import read_answers
from serving.state import State, StateSettings
from tests.serving.bento import Outputs, make_outputs, server

# The incumbent ranks by popularity; made to be the better arm by what the clients like.
ARMS = {
    "shuffled": {"model": "champion", "share": 0.5, "policy": {"kind": "epsilon_greedy", "epsilon": 1.0}},
    "popular": {"model": "incumbent", "share": 0.5, "policy": {"kind": "plackett_luce", "temperature": 0.2}},
}
EXPERIMENT = {"arms": ARMS, "salt": "proof", "shadow": {"model": "incumbent"}}
CLIENTS, VISITS, PLACES, CANDIDATES = 500, 1, 6, 40
WORLD = WorldDataset(users=CLIENTS, items=CANDIDATES, categories=6, click_logit=-1.5, seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    outputs = make_outputs(tmp_path_factory.mktemp("live") / "build", experiment=EXPERIMENT, max_events=1_000, max_body_bytes=1_000_000)
    outputs.package()
    return outputs


@pytest.fixture(scope="module")
def artifacts(made: Outputs) -> Artifacts:
    return Artifacts.open(made.bento / "src" / ARTIFACTS)


@dataclass(frozen=True)
class Test:
    """The finished test: the log's state folder, and what the truth is."""

    __test__ = False

    state: Path
    difference: float
    answers: list[dict[str, Any]]
    clicks: NDArray[np.int8]
    popular_logits: dict[str, float]


@pytest.fixture(scope="module")
def finished(made: Outputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Test]:
    state = tmp_path_factory.mktemp("live-state") / "state"
    with server(made.bento, state) as (client, _):
        test = _play(client, made, state)
    yield test


def _play(client: httpx.Client, made: Outputs, state: Path) -> Test:
    world, keys = World(WORLD), pq.read_table(made.features / "catalogue.parquet")["item_key"].to_pylist()[:CANDIDATES]
    users = [f"client-{number:04d}" for number in range(1, CLIENTS + 1)]
    _send(client, [{"user_id": user, "item_id": keys[0], "action": "view"} for user in users])

    popular = client.post("/rank", json={"user_id": _user_of("popular", users), "candidates": keys}).json()["items"]
    logits = {item["item_id"]: float(np.log(item["score"] / (1 - item["score"]))) for item in popular}
    best = sorted(keys, key=lambda key: -logits[key])
    times = START + np.arange(CLIENTS * VISITS, dtype=np.int64) * 1_000_000_000
    visitors = np.tile(np.arange(1, CLIENTS + 1), VISITS)
    everything = np.broadcast_to(np.arange(1, CANDIDATES + 1), (len(times), CANDIDATES))
    appeal = world.click_logits(visitors, everything, times).mean(axis=0)
    world_item = dict(zip(best, (1 + np.argsort(-appeal)).tolist(), strict=True))  # what is popular here is what they like

    def visit(number: int) -> dict[str, Any]:
        asked = {"user_id": users[visitors[number] - 1], "k": PLACES, "candidates": keys}
        response = client.post("/recommend", json=asked)
        assert response.status_code == 200, response.text
        return dict(response.json())

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(visit, range(len(times))))
    shown = np.array([[world_item[item["item_id"]] for item in answer["items"]] for answer in answers])
    clicks = simulate_clicks(world, visitors, shown, times, np.random.default_rng(1))
    for batch in np.array_split(np.argwhere(clicks), 4):
        picked = [(answers[row], answers[row]["items"][place]["item_id"]) for row, place in batch]
        _send(client, [{"user_id": a["user_id"], "item_id": item, "action": "click", "request_id": a["request_id"]} for a, item in picked])

    items = np.array([world_item[key] for key in keys])
    candidates = np.broadcast_to(items, (len(times), CANDIDATES))
    lengths, places = np.full(len(times), CANDIDATES), np.full(len(times), PLACES)

    def rate(scores: NDArray[np.float64]) -> float:
        return true_rate(world, visitors, candidates, times, np.broadcast_to(scores, candidates.shape), lengths, places, draws=40)

    truth = rate(np.array([logits[key] for key in keys]) / 0.2) - rate(np.zeros(CANDIDATES))
    return Test(state, truth, answers, clicks, logits)


def _user_of(arm: str, users: list[str]) -> str:
    assignment = Assignment({name: 0.5 for name in ARMS}, "proof")
    return next(user for user in users if assignment.of(user) == arm)


def _send(client: httpx.Client, events: list[dict[str, Any]]) -> None:
    response = client.post("/events", json={"events": events})
    assert response.status_code == 200 and response.json()["accepted"] == len(events), response.text


def test_the_live_test_recovers_the_planted_difference(finished: Test, made: Outputs, tmp_path: Path) -> None:
    exported = export_log(finished.state, tmp_path / "log")
    assert exported.impressions == CLIENTS * VISITS * PLACES + CANDIDATES and exported.clicks == finished.clicks.sum() and exported.torn_lines == 0
    dataset = yaml.safe_load((tmp_path / "log" / "dataset.yaml").read_text())["dataset"]
    params = yaml.safe_load((made.root / "params.yaml").read_text()) | {"dataset": dataset}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    ingest(params=tmp_path / "params.yaml", tables=tmp_path / "tables")
    live_test(log_file=tmp_path / "log" / "assigned.parquet", a="shuffled", b="popular", start=None, share=0.5, margin=0.01, confidence=0.95,
              report=tmp_path / "report")  # fmt: skip
    report = read_json(tmp_path / "report" / "report.json")
    assert finished.difference > 0.02, "a difference worth finding is planted"
    assert report["verdict"] == "win" and "popular" in report["sentence"], report["sentence"]
    assert report["any_time"]["low"] <= finished.difference <= report["any_time"]["high"], (finished.difference, report["any_time"])
    assert report["any_time"]["low"] > 0
    assert report["users"] == CLIENTS and not report["failed_checks"]


def test_users_stay_in_the_arm_of_their_hash(finished: Test) -> None:
    assignment = Assignment({name: 0.5 for name in ARMS}, "proof")
    policies = {"shuffled": ("epsilon_greedy(1)", "sam"), "popular": ("plackett_luce(0.2)", "popularity")}
    for answer in finished.answers:
        assert answer["arm"] == assignment.of(answer["user_id"])
        assert (answer["policy"], answer["model"]) == policies[answer["arm"]]
    logged = {line["request_id"]: line for line in read_answers(finished.state)}
    for answer in finished.answers:
        line = logged[answer["request_id"]]
        assert (line["arm"], line["assigned"], line["policy"]) == (answer["arm"], answer["arm"], answer["policy"])
        assert line["propensities"] == [item["propensity"] for item in answer["items"]]


def test_the_shadow_scored_what_was_asked_and_was_never_shown(finished: Test) -> None:
    logged = {line["request_id"]: line for line in read_answers(finished.state)}
    lines = read_answers(finished.state, SHADOW)
    assert len(lines) >= 10 and {line["model"] for line in lines} == {"popularity"} and {line["arm"] for line in lines} == {"shadow"}
    assert not any(line["arm"] == "shadow" for line in logged.values())
    for line in lines:
        answer = logged[line["request_id"]]
        assert line["assigned"] == answer["arm"] and line["user"] == answer["user"]
        by_item = {item: finished.popular_logits[item] for item in answer["candidates"]}
        expected = [1 / (1 + np.exp(-by_item[item])) for item in answer["items"]]
        assert line["evidence"]["shown_scores"] == pytest.approx(expected, abs=1e-6)
        best = sorted(by_item.values(), reverse=True)[: len(answer["items"])]
        assert line["scores"] == pytest.approx([1 / (1 + np.exp(-logit)) for logit in best], abs=1e-6)


def test_every_arms_model_is_packaged_with_its_parity(artifacts: Artifacts) -> None:
    assert artifacts.manifest.arms == ("popularity",) and set(artifacts.rankers) == {"sam", "popularity"}
    files = artifacts.parity_files()
    scores = [pd.read_parquet(files[name]).logits for name in ("sam", "popularity")]
    assert len(scores[0]) == len(scores[1]) == 16 and not np.allclose(scores[0][0], scores[1][0])


def test_a_model_that_no_one_selected_stops_packaging(made: Outputs, tmp_path: Path) -> None:
    params = yaml.safe_load((made.root / "params.yaml").read_text())
    params["models"]["click_rate"] = {"stage": "ranking", "kind": "popularity", "by": "click_rate"}
    params["pipeline"]["models"].append("click_rate")
    params["serving"]["experiment"]["arms"]["popular"]["model"] = "click_rate"
    other = tmp_path / "build"
    other.mkdir()
    for part in made.root.iterdir():
        if part.name not in ("params.yaml", "bento"):
            (other / part.name).symlink_to(part)
    (other / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(ModelError, match=r"arms/click_rate: no such folder; expected the ranker 'click_rate' that serving\.experiment names"):
        Outputs(other).package()


def test_a_canary_whose_model_fails_is_rolled_back_and_nobody_goes_without_a_list(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = ExperimentSettings.model_validate(
        {
            "arms": {"steady": {"model": "incumbent", "share": 1.0}, "fresh": {"model": "champion"}},
            "canary": {"arm": "fresh", "steps": [0.5], "check_seconds": 600},
        }
    )
    changed = replace(artifacts, settings=artifacts.settings.model_copy(update={"experiment": experiment}))
    state = State(StateSettings(folder=tmp_path / "state"), "f" * 64)
    engine = Engine(changed, state, OnlineFeatures(artifacts.snapshot, state=tmp_path / "online"), seed=1)
    fresh = next(arm for arm in engine.arms if arm.name == "fresh")
    monkeypatch.setattr(fresh.scorer, "logits", lambda *arguments, **more: 1 / 0)
    keys, users = list(artifacts.catalogue.keys[1:6]), list(artifacts.users)
    canary = engine.experiment.canary
    assert canary is not None and canary.record.share == 0.5
    answers = [engine.rank(RankRequest(user_id=user, candidates=keys)) for user in users]
    failed = {answer.user_id for answer in answers if answer.fallback == ARM_FAILED}
    assert 15 < len(failed) < 45 and all(len(answer.items) == 5 for answer in answers)
    while canary.active:
        for user in failed:
            engine.rank(RankRequest(user_id=user, candidates=keys))
        canary.look()
        assert canary.record.requests < 200
    assert engine.experiment.arms.shares == {"steady": 1.0}
    again = [engine.rank(RankRequest(user_id=user, candidates=keys)) for user in users]
    assert {answer.arm for answer in again} == {"steady"} and all(answer.fallback is None for answer in again)
    assigned = {line["user"]: line["assigned"] for line in reversed(read_answers(tmp_path / "state"))}
    assert {user for user, arm in assigned.items() if arm == "fresh"} == failed
    engine.close()
    record = read_record(tmp_path / "state")
    assert record is not None and record.phase == "rolled_back" and record.moves[-1].reason.startswith("errors: ")


def test_an_arm_that_fails_for_a_fifth_of_its_requests_answers_for_them(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Personal lists get 60 % clicks whoever makes them, fallbacks 5 %: the arms differ by 0.2 · (5 - 60) = -11 points, all of it by failing."""
    experiment = ExperimentSettings.model_validate(
        {"arms": {"steady": {"model": "incumbent", "share": 0.5}, "fresh": {"model": "champion", "share": 0.5}}}
    )
    changed = replace(artifacts, settings=artifacts.settings.model_copy(update={"experiment": experiment}))
    state = State(StateSettings(folder=tmp_path / "state"), "f" * 64)
    engine = Engine(changed, state, OnlineFeatures(artifacts.snapshot, state=tmp_path / "online"), seed=1)
    scorer = next(arm for arm in engine.arms if arm.name == "fresh").scorer
    logits, calls = scorer.logits, iter(range(10**6))
    monkeypatch.setattr(scorer, "logits", lambda *arguments, **more: 1 / 0 if next(calls) % 5 == 0 else logits(*arguments, **more))
    keys, rng = list(artifacts.catalogue.keys[1:6]), np.random.default_rng(4)
    clicks, failed = [], 0
    for user in list(artifacts.users) * 10:
        answer = engine.rank(RankRequest(user_id=user, candidates=keys))
        failed += answer.fallback == ARM_FAILED
        for item in answer.items:
            if rng.random() < (0.05 if answer.fallback else 0.6):
                clicks.append({"user_id": user, "item_id": item.item_id, "action": "click", "request_id": answer.request_id})
    for batch in np.array_split(np.array(clicks), 4):
        assert engine.take_events(EventsRequest(events=batch.tolist())).accepted == len(batch)
    engine.take_events(EventsRequest(events=[{"user_id": "stranger", "item_id": keys[0], "action": "view"}]))
    engine.rank(RankRequest(user_id="nobody", candidates=keys))
    engine.close()

    exported = export_log(tmp_path / "state", tmp_path / "log")
    assert failed > 30 and exported.fallbacks == 5 * failed and exported.assigned == exported.impressions + exported.fallbacks
    assert exported.clicks_without_impression == 0
    live_test(log_file=tmp_path / "log" / "assigned.parquet", a="steady", b="fresh", start=None, share=0.5, margin=0.01, confidence=0.95,
              report=tmp_path / "report")  # fmt: skip
    report = read_json(tmp_path / "report" / "report.json")
    assert report["verdict"] == "lose" and report["plain"]["low"] <= -0.11 <= report["plain"]["high"], report["sentence"]
    assert report["a"]["fallback_share"] == 0 and report["b"]["fallback_share"] == pytest.approx(0.2, abs=0.01)
    assert report["b"]["own_rate"] == pytest.approx(0.6, abs=0.05) and "of what steady's users saw, " in report["sentence"]
    assert {check["name"]: check["state"] for check in report["checks"]}["fallbacks"] == "warn"
    assert "of it were fallbacks" in (tmp_path / "report" / "report.html").read_text()
    draws = judge_live(read_log(tmp_path / "log" / "impressions.parquet", "steady", "fresh", None), a="steady", b="fresh", share=0.5, margin=0.01,
                       confidence=0.95)  # fmt: skip
    assert draws["any_time"]["low"] < 0 < draws["any_time"]["high"], "the draws alone do not see it"
    assert {check["name"]: check["state"] for check in draws["checks"]}["fallbacks"] == "unknown"
