"""A real served session is replayed from the Bento and the event log; whatever is changed in between is found and named."""

import base64
import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serving import replay as module
from serving.artifacts import ARTIFACTS, Artifacts
from serving.event_records import decode, encode, segments
from serving.evidence import full_of
from serving.replay import Replayed, by_user, replay_over
from serving.segments import read_answers
from tests.serving.conftest import Running

ITEMS = [f"i{number:04d}" for number in range(1, 41)]
USERS = [f"u{number:04d}" for number in range(40, 46)] + ["replay-new-1", "replay-new-2"]


def play(running: Running, seed: int) -> None:
    """One client: lists and events interleaved, over a few users that others use at the same time; late and early events among them."""
    rng = np.random.default_rng(seed)
    for step in range(12):
        user = USERS[int(rng.integers(len(USERS)))]
        if step % 3 == 0:
            events = [
                {"user_id": user, "item_id": ITEMS[int(item)], "action": ("view", "click")[int(item) % 2]}
                for item in rng.choice(40, 3, replace=False)
            ]
            events[1]["timestamp"] = "2020-01-01T00:00:00Z"
            assert running.client.post("/events", json={"events": events}).status_code == 200
        path, body = ("/recommend", {"user_id": user, "k": 4}) if step % 2 else ("/rank", {"user_id": user, "candidates": ITEMS[: 5 + step]})
        answer = running.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        shown = answer.json()
        click = {"user_id": user, "item_id": shown["items"][0]["item_id"], "action": "click", "request_id": shown["request_id"]}
        assert running.client.post("/events", json={"events": [click]}).status_code == 200


@pytest.fixture(scope="module")
def session(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder after a session, as a copy of its own."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: play(running, seed), range(4)))
    folder = tmp_path_factory.mktemp("replay") / "state"
    shutil.copytree(running.state / "log", folder / "log")
    return folder


@pytest.fixture(scope="module")
def artifacts(running: Running) -> Artifacts:
    return Artifacts.open(running.made.bento / "src" / ARTIFACTS)


def changed(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    """Replay answers whose evidence was altered by `change`."""

    def altered(state: Path) -> list[dict[str, Any]]:
        answers = read_answers(state)
        for answer in answers:
            if answer["evidence"] is not None:
                change(answer)
        return answers

    monkeypatch.setattr(module, "read_answers", altered)


def first(done: Replayed) -> Any:
    assert done.differences
    return done.differences[0]


def personal(state: Path, *, full: bool) -> list[dict[str, Any]]:
    answers = [answer for answer in read_answers(state) if answer["evidence"]]
    return [answer for answer in answers if ("history" in answer["evidence"]) == full]


def test_a_served_session_is_replayed(session: Path, artifacts: Artifacts) -> None:
    done = replay_over(artifacts, session)
    assert not done.differences, done.differences[0]
    assert done.requests >= 40 and done.events >= 60 and done.largest <= 1e-5
    assert done.requests + sum(done.left_out.values()) == len(read_answers(session))
    assert set(done.left_out) <= {"no personal list", "no evidence logged (serving.evidence.share)"}, "nobody was shown anything (all seen) or known"
    full = personal(session, full=True)
    assert full and personal(session, full=False) and any(answer["evidence"]["total"] > answer["evidence"]["read"] for answer in full)
    assert {True, False} == {answer["evidence"]["retrieved"] for answer in full}
    assert any(answer["user"] == "replay-new-1" for answer in by_user(full))


def test_the_command_says_what_it_did(session: Path, running: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module.main(session, bento=running.made.bento, limit=5, report=tmp_path / "report.json")
    assert capsys.readouterr().out.startswith("5 lists replayed with ")
    assert json.loads((tmp_path / "report.json").read_text())["differences"] == []
    with pytest.raises(SystemExit, match="1"):
        module.main(tmp_path, bento=running.made.bento)
    assert capsys.readouterr().err.startswith("error: ")


def test_events_in_another_order_are_named(session: Path, artifacts: Artifacts, tmp_path: Path) -> None:
    """Two events of a user change places in the log, checksums and all."""
    state = tmp_path / "state"
    shutil.copytree(session, state)
    (file,) = segments(state / "log" / "events")
    header, *lines = file.read_bytes().splitlines(keepends=True)
    events = decode([line.rstrip(b"\n") for line in lines])
    victim = next(
        answer
        for answer in personal(state, full=True)
        if answer["user"] in USERS[:6] and not answer["evidence"]["retrieved"] and _own(events, answer)
    )
    a, b = _own(events, victim)[-2:]
    events[a], events[b] = (replace(events[a], item=events[b].item), replace(events[b], item=events[a].item))
    file.write_bytes(header + encode(events))
    done = replay_over(artifacts, state)
    named = [each for each in done.differences if each.request_id == victim["request_id"]]
    assert (
        named
        and named[0].feature.startswith("history_items[")
        and repr(events[a].item) in named[0].replayed
        and repr(events[b].item) in named[0].served
    )
    assert {each.user for each in done.differences} == {victim["user"]}


def _own(events: Sequence[Any], answer: dict[str, Any]) -> list[int]:
    """Places in the log of the user's events that the list knew, where the newest two differ in their item; else none."""
    read = set(full_of(answer["evidence"])["history_times"].tolist())  # an event that was on disk may not have been in the history yet
    places = [place for place, event in enumerate(events) if event.user == answer["user"] and event.written_at in read]
    return places if len(places) >= 2 and events[places[-1]].item != events[places[-2]].item else []


def test_a_lost_event_is_named(session: Path, artifacts: Artifacts, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(session, state)
    (file,) = segments(state / "log" / "events")
    lines = file.read_bytes().splitlines(keepends=True)
    lost = decode([lines[-1].rstrip(b"\n")])[0]
    file.write_bytes(b"".join(line for line in lines if f",{lost.user},".encode() not in line))
    done = replay_over(artifacts, state)
    assert first(done).user == lost.user and first(done).feature == "history_length"
    assert int(first(done).served) > int(first(done).replayed)


def test_a_statistic_that_is_another_is_named(session: Path, artifacts: Artifacts) -> None:
    item = artifacts.catalogue.id_of(ITEMS[2])
    clicks = artifacts.catalogue.item_clicks.copy()
    clicks[item] += 3
    done = replay_over(replace(artifacts, catalogue=replace(artifacts.catalogue, item_clicks=clicks)), session)
    named = [each for each in done.differences if each.feature == f"item_clicks of candidate {ITEMS[2]!r}"]
    assert named and named[0].replayed == str(clicks[item]) and named[0].served == str(clicks[item] - 3)


@pytest.mark.parametrize("feature", ["history_items", "history_times", "user_clicks"])
def test_a_feature_served_otherwise_is_named(session: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, feature: str) -> None:
    """The service read something else than the log says: the newest event's item or time, or the user's clicks."""
    victim = next(answer for answer in personal(session, full=True) if answer["evidence"]["read"] > 3)

    def change(answer: dict[str, Any]) -> None:
        if answer["request_id"] != victim["request_id"]:
            return
        evidence = answer["evidence"]
        if feature == "user_clicks":
            evidence["user"][1] += 1
            return
        values = full_of(evidence)
        assert values is not None
        rows = np.array([values[name] for name in module.HISTORY])
        rows[module.HISTORY.index(feature), -1] += 1
        evidence["history"] = base64.b64encode(zlib.compress(rows.astype("<i8").tobytes())).decode()
        evidence["digests"][feature] = module.digest(rows[module.HISTORY.index(feature)])

    changed(monkeypatch, change)
    done = replay_over(artifacts, session)
    assert [each.request_id for each in done.differences] == [victim["request_id"]]
    assert first(done).feature.startswith(feature)
    assert int(first(done).served.split()[0]) == int(first(done).replayed.split()[0]) + 1


def test_weights_that_are_others_are_named_by_a_score(session: Path, artifacts: Artifacts) -> None:
    parameter = next(iter(artifacts.ranker.module.parameters()))
    with torch.no_grad():
        before = parameter.clone()
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    try:
        done = replay_over(artifacts, session, limit=10)
    finally:
        with torch.no_grad():
            parameter.copy_(before)
    assert first(done).feature.startswith("score (logit) of candidate") and abs(float(first(done).served) - float(first(done).replayed)) > 1e-5


def test_lists_of_another_bento_are_left_out(session: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    victims = [answer["request_id"] for answer in personal(session, full=False)]

    def change(answer: dict[str, Any]) -> None:
        if answer["request_id"] in victims:
            answer["evidence"]["build"] = "0" * 12

    changed(monkeypatch, change)
    assert replay_over(artifacts, session).left_out["made by another Bento"] == len(victims)
