"""The engine without HTTP: exploration, fallbacks and events against slow oracles; logs, state and parity at their edges."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from features.online import OnlineFeatures
from longtrail.errors import ConfigError, DatasetError, ModelError
from longtrail.history import HistoryArrays
from serving.answer_log import AnswerLog, LoggedAnswer
from serving.artifacts import ARTIFACTS, Artifacts, Manifest
from serving.engine import Engine
from serving.errors import RequestError
from serving.event_log import EventLog
from serving.event_records import LoggedEvent
from serving.export_log import export_log
from serving.log import AppendLog
from serving.parity import FILE, SCHEMA, check_parity
from serving.schemas import Event, EventsRequest, RankRequest, RecommendRequest
from serving.scoring import newest
from serving.state import State, StateSettings
from tests.serving.bento import Outputs


@pytest.fixture(scope="session")
def artifacts(packaged: Outputs) -> Artifacts:
    return Artifacts.open(packaged.bento / "src" / ARTIFACTS)


@pytest.fixture(scope="session")
def online(packaged: Outputs, tmp_path_factory: pytest.TempPathFactory) -> OnlineFeatures:
    """Shared by tests that only read it."""
    return OnlineFeatures(packaged.bento / "src" / ARTIFACTS / "feast", state=tmp_path_factory.mktemp("online"))


def engine(artifacts: Artifacts, folder: Path, online: OnlineFeatures, **settings: Any) -> Engine:
    changed = replace(artifacts, settings=artifacts.settings.model_copy(update=settings))
    return Engine(changed, State(StateSettings(folder=folder), "f" * 64), online, seed=3)


def test_temperature_zero_shows_the_best_list_with_propensity_one(artifacts: Artifacts, online: OnlineFeatures, tmp_path: Path) -> None:
    still = engine(artifacts, tmp_path, online, explore_temperature=0.0)
    keys = list(artifacts.catalogue.keys[1:30])
    for request in (RankRequest(user_id="u0001", candidates=keys), RankRequest(user_id="u0001", candidates=keys[::-1])):
        answer = still.rank(request)
        scores = [item.score for item in answer.items]
        assert scores == sorted(scores, reverse=True) and {item.propensity for item in answer.items} == {1.0}
    assert still.recommend(RecommendRequest(user_id="u0001", k=4)).items == still.recommend(RecommendRequest(user_id="u0001", k=9)).items[:4]


def test_lists_are_drawn_as_often_as_their_propensities_say(artifacts: Artifacts, online: OnlineFeatures, tmp_path: Path) -> None:
    keys, draws = list(artifacts.catalogue.keys[1:4]), 300
    scores = [item.score for item in engine(artifacts, tmp_path, online).rank(RankRequest(user_id="u0002", candidates=keys)).items]
    spread = float(np.ptp(np.log(scores) - np.log1p(-np.array(scores))))
    drawing = engine(artifacts, tmp_path / "drawing", online, explore_temperature=spread)  # so that every order is drawn now and then
    counts: dict[tuple[str, ...], int] = {}
    stated: dict[tuple[str, ...], float] = {}
    for _ in range(draws):
        items = drawing.rank(RankRequest(user_id="u0002", candidates=keys)).items
        order = tuple(item.item_id for item in items)
        counts[order] = counts.get(order, 0) + 1
        stated[order] = float(np.prod([item.propensity for item in items]))
    assert len(stated) >= 5
    for order, probability in stated.items():
        error = 4 * np.sqrt(probability * (1 - probability) / draws)
        assert abs(counts[order] / draws - probability) <= error + 1e-9, order


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_the_newest_events_are_kept(length: int) -> None:
    rng = np.random.default_rng(length)
    lengths = np.array([0, 1, 2, 5, 5, 3])
    rows = [rng.integers(1, 99, n) for n in lengths]
    padded = np.zeros((6, 5), np.int64)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = values
    cut = newest(HistoryArrays(items_BL=padded, actions_BL=padded + 0, times_BL=padded + 0, lengths_B=lengths), length)
    for row, values in enumerate(rows):
        kept = values[max(0, len(values) - length) :]
        assert cut.lengths_B[row] == len(kept)
        for array in (cut.items_BL, cut.actions_BL, cut.times_BL):
            assert array[row].tolist() == [*kept, *[0] * (array.shape[1] - len(kept))]


def test_what_everything_was_seen_leaves_nothing_to_recommend(artifacts: Artifacts, packaged: Outputs, tmp_path: Path) -> None:
    own = engine(artifacts, tmp_path / "state", OnlineFeatures(artifacts.snapshot, state=tmp_path / "online"), max_events=10_000)
    events = [Event(user_id="u0001", item_id=key, action="view") for key in artifacts.catalogue.keys[1:]]
    own.take_events(EventsRequest(events=events))
    assert own.recommend(RecommendRequest(user_id="u0001", k=5)).items == []


def test_events_outlive_a_restart(artifacts: Artifacts, tmp_path: Path) -> None:
    event = Event(user_id="somebody", item_id=artifacts.catalogue.keys[3], action="click", event_id="one")
    for round_ in range(2):
        own = engine(artifacts, tmp_path, OnlineFeatures(artifacts.snapshot, state=tmp_path / "online"))
        answer = own.take_events(EventsRequest(events=[event]))
        assert (answer.accepted, answer.duplicates, answer.new_users) == ((1, 0, 1), (0, 1, 0))[round_]
        assert own.rank(RankRequest(user_id="somebody", candidates=[artifacts.catalogue.keys[1]])).fallback is None
        if round_ == 0:
            own.intake.close()
            own._state.close()
    another = Event(user_id="another", item_id=artifacts.catalogue.keys[3], action="click")
    own.take_events(EventsRequest(events=[another]))
    ids = list(own._state.new_users().values())
    assert ids == [len(artifacts.users) + 1, len(artifacts.users) + 2]


def test_refusals_name_the_field(artifacts: Artifacts, online: OnlineFeatures, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"candidates\[1\]: unknown item 'x'"):
        engine(artifacts, tmp_path, online).rank(RankRequest(user_id="u0001", candidates=[artifacts.catalogue.keys[1], "x"]))


# ---------------------------------------------------------------- parity


def test_parity_covers_the_shortest_and_the_longest_history(artifacts: Artifacts, packaged: Outputs) -> None:
    rows = pq.read_table(artifacts.folder / FILE, schema=SCHEMA).to_pandas()
    lengths = pq.read_table(packaged.features / "examples" / "test.parquet")["history_length"].to_numpy()
    assert rows.history_length.min() == lengths.min() and rows.history_length.max() == lengths.max()
    assert len(rows) == 16 and rows.logits.map(np.std).max() > 1e-4


@pytest.mark.parametrize("column", ["logits", "retrieved"])
def test_a_score_that_differs_is_found(artifacts: Artifacts, online: OnlineFeatures, tmp_path: Path, column: str) -> None:
    scorer = engine(artifacts, tmp_path / "state", online).scorer
    assert check_parity(scorer, artifacts.folder / FILE) <= 1e-5
    table = pq.read_table(artifacts.folder / FILE, schema=SCHEMA).to_pylist()
    table[5][column][2] += 1e-3
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), tmp_path / FILE)
    with pytest.raises(ModelError, match=rf"request {table[5]['request_id']}.*place 3"):
        check_parity(scorer, tmp_path / FILE)
    pq.write_table(pa.Table.from_pylist([], schema=SCHEMA), tmp_path / FILE)
    with pytest.raises(ModelError, match="no request"):
        check_parity(scorer, tmp_path / FILE)


def test_a_service_whose_model_was_altered_never_becomes_ready(packaged: Outputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from bentoml.exceptions import ServiceUnavailable

    import serving.service as service

    shutil.copytree(packaged.bento / "src" / ARTIFACTS, tmp_path / ARTIFACTS)
    weights = tmp_path / ARTIFACTS / "ranker" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    monkeypatch.setattr(service, "ROOT", tmp_path / ARTIFACTS)
    monkeypatch.setenv("LONGTRAIL_STATE", str(tmp_path / "state"))
    made = service.Longtrail.inner()  # type: ignore[attr-defined]
    assert not made.__is_ready__()
    with pytest.raises(ServiceUnavailable):
        made._do("rank", RankRequest(user_id="u0001", candidates=["i0001"]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"actions": ["click"]}, "actions"),
        ({"ranker": "din"}, "name: found 'sam'; the manifest says 'din'"),
        ({"users": 3}, "users: found 60; the manifest says 3"),
        ({"sizes": {"items": 5, "categories": 5, "actions": 2}}, "items: found 119; the manifest says 5"),
        ({"format": 2}, "format"),
        ({"more": 1}, "more"),
    ],
)
def test_parts_that_do_not_fit_are_named(packaged: Outputs, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    for part in (packaged.bento / "src" / ARTIFACTS).iterdir():
        if part.name != "manifest.json":
            (tmp_path / part.name).symlink_to(part)
    manifest = json.loads((packaged.bento / "src" / ARTIFACTS / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ModelError, match=says):
        Artifacts.open(tmp_path)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"manifest\.json: no such file"):
        Manifest.read(tmp_path / "manifest.json")


# ---------------------------------------------------------------- logs and state


@pytest.mark.parametrize("torn", ["", "x", "half a line", 'e7,"u', "y" * 200_000])
def test_a_torn_line_is_cut_and_spoils_no_other(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "log"
    log = AppendLog(path, header="head\n")
    log.append("one\ntwo\n", durable=True)
    log.close()
    with path.open("a") as file:
        file.write(torn)
    log = AppendLog(path, header="head\n")
    log.append("three\n", durable=False)
    log.close()
    assert path.read_text() == "head\none\ntwo\nthree\n"


def test_a_file_that_is_one_torn_line_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("hea")
    AppendLog(tmp_path / "log", header="head\n").close()
    assert (tmp_path / "log").read_text() == "head\n"


def logged(**values: Any) -> LoggedEvent:
    return LoggedEvent(
        **{"event_id": None, "user": "u", "item": "i", "timestamp": 5, "action": "click", "value": None, "request": None, "written_at": 6} | values
    )


def answer(request: str, **values: Any) -> LoggedAnswer:
    standard: dict[str, Any] = {
        "user": "u1",
        "timestamp": 7,
        "arm": "sam",
        "assigned": "sam",
        "policy": "plackett_luce(0.1)",
        "model": "sam",
        "fallback": None,
        "items": ["a"],
        "scores": [0.5],
        "propensities": [1.0],
        "candidates": ["a"],
    }
    return LoggedAnswer(request_id=request, **standard | values)


def test_the_log_is_exported_row_by_row(tmp_path: Path) -> None:
    """A dozen rows that can be checked by hand."""
    answers, events = AnswerLog(tmp_path / "log"), EventLog(tmp_path / "log")
    answers.append(answer("r1", user='u,"1"', items=["a", "b"], scores=[0.5, 0.4], propensities=[0.1 + 0.2, 1 / 3], candidates=["a", "b", "c"]))
    answers.append(answer("r2", timestamp=8, arm="popularity_fallback", model=None, fallback="unknown user"))
    answers.append(answer("r3", timestamp=9, items=[], scores=[], propensities=[], candidates=[]))
    answers.append(answer("r4", timestamp=10, items=["c"], candidates=["c"]))
    answers.append(answer("r5", timestamp=11, arm="popularity_fallback", model=None, fallback="arm failed", items=["a"], candidates=["a"]))
    events.append(
        [
            logged(item="a", request="r5"),
            logged(item="b", request="r1", event_id="e1"),
            logged(item="b", request="r1"),
            logged(item="z", request="r1"),
            logged(action="view"),
        ]
    )
    answers.close()
    events.close()
    next((tmp_path / "log" / "events").glob("*.csv")).open("a").write("e9,u,torn")
    next((tmp_path / "log" / "answers").glob("*.jsonl")).open("a").write('{"request_id": "r9", "us')
    exported = export_log(tmp_path, tmp_path / "out")
    assert (exported.impressions, exported.clicks, exported.candidates, exported.events) == (3, 1, 4, 3)
    assert (exported.clicks_without_impression, exported.torn_lines) == (1, 2)
    rows = pq.read_table(tmp_path / "out" / "impressions.parquet").to_pylist()
    found = [(r["request"], r["position"], r["user"], r["item"], r["click"], r["propensity"], r["policy"]) for r in rows]
    assert found == [
        ("r1", 1, 'u,"1"', "a", 0, 0.1 + 0.2, "sam"),
        ("r1", 2, 'u,"1"', "b", 1, 1 / 3, "sam"),
        ("r4", 1, "u1", "c", 0, 1.0, "sam"),
    ]
    assert [row["timestamp"].microsecond for row in rows] == [7, 7, 10]
    assert (exported.assigned, exported.fallbacks) == (4, 1)
    assigned = pq.read_table(tmp_path / "out" / "assigned.parquet").to_pylist()
    assert assigned[:3] == [row | {"fallback": None} for row in rows]
    failed = assigned[3]
    assert (failed["request"], failed["click"], failed["policy"], failed["fallback"], failed["propensity"]) == ("r5", 1, "sam", "arm failed", 1.0)
    assert export_log(tmp_path, tmp_path / "out", fallback=True).impressions == 5


def test_exporting_nothing_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"answers: not there"):
        export_log(tmp_path, tmp_path / "out")


def test_the_state_folder(tmp_path: Path) -> None:
    absolute = str(tmp_path)
    assert StateSettings.from_environment({"LONGTRAIL_STATE": absolute}).folder == tmp_path
    assert StateSettings.from_environment({"PWD": absolute}).folder == tmp_path / "var" / "serving"
    assert StateSettings.from_environment({"LONGTRAIL_STATE": "state", "PWD": absolute}).folder == tmp_path / "state"
    with pytest.raises(ConfigError, match="LONGTRAIL_STATE"):
        StateSettings.from_environment({})
