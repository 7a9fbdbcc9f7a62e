"""The packaged service, through HTTP, as `make serve` starts it."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from longtrail.config import load_config, parse_config
from longtrail.examples import FeatureSet, candidate_tensors, context_tensors, history_tensors
from longtrail.files import read_json
from longtrail.history import HistoryArrays
from longtrail.models.store import load_model
from longtrail.schema import ITEM_STATISTICS
from serving.event_records import read_events
from serving.export_log import export_log
from tests.serving.asking import EVENT, RANK, post, taken_all
from tests.serving.bento import SERVING, Outputs, log_lines
from tests.serving.conftest import Running, started

ITEMS = [f"i{number:04d}" for number in range(1, 60)]


@pytest.fixture(scope="module")
def running(packaged: Outputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Of this file alone: it compares histories with the build's, and the log as a whole."""
    with started(packaged, tmp_path_factory.mktemp("server") / "state") as own:
        yield own


def offline_logits(made: Outputs, user_key: str, items: list[str], *, more: list[tuple[str, str, int]] = ()) -> dict[str, float]:
    """Scores by the champion's own folder, from the tables and the history store; `more` are (item, action, µs) done since."""
    features, model = FeatureSet.open(made.features), load_model(made.champion / "ranker")
    users = pq.read_table(made.tables / "users.parquet").to_pandas().set_index("user_key").user_id
    user = np.array([users.get(user_key, 0)])
    known = user_key in users.index
    past = features.history.gather(user, features.history.lengths(user), 10**6) if known else None
    extra = np.array([[features.catalogue.id_of(item), features.actions.index(action) + 1, at] for item, action, at in more]).reshape(-1, 3)
    columns = [
        np.concatenate([getattr(past, name)[0, : past.lengths_B[0]] if past else [], extra[:, place]]).astype(np.int64)
        for place, name in enumerate(("items_BL", "actions_BL", "times_BL"))
    ]
    total = len(columns[0])
    kept = [column[-model.card.settings.max_history :][None, :] for column in columns]
    history = HistoryArrays(items_BL=kept[0], actions_BL=kept[1], times_BL=kept[2], lengths_B=np.array([kept[0].shape[1]]))
    shown = pq.read_table(made.tables / "impressions.parquet").to_pandas()
    own = shown[shown.user_id == user[0]]
    ids = np.array([[features.catalogue.id_of(item) for item in items]])
    prior = features.prior_click_rate
    with torch.inference_mode():
        logits = model.module(
            history_tensors(history, features.catalogue),
            candidate_tensors(
                ids, np.array([len(items)]), {n: getattr(features.catalogue, n)[ids] for n in ITEM_STATISTICS}, features.catalogue, prior
            ),
            context_tensors(
                np.array([total]), {"user_impressions": np.array([len(own)]), "user_clicks": np.array([own.click.sum()])}, np.array([0]), prior
            ),
        )
    return dict(zip(items, logits[0].tolist(), strict=True))


def logit(score: float) -> float:
    return float(np.log(score / (1 - score)))


def check_scores(answer: dict[str, Any], expected: dict[str, float]) -> None:
    found = {item["item_id"]: logit(item["score"]) for item in answer["items"]}
    assert max(abs(found[item] - expected[item]) for item in found) <= 1e-5


def check_propensities(answer: dict[str, Any], logits: dict[str, float], temperature: float) -> None:
    """Place by place, by the definition: softmax over what is not placed yet."""
    left = dict(logits)
    for item in answer["items"]:
        weights = {key: np.exp(value / temperature) for key, value in left.items()}
        assert item["propensity"] == pytest.approx(weights[item["item_id"]] / sum(weights.values()), rel=1e-4)
        del left[item["item_id"]]


@pytest.mark.parametrize("user", ["u0000", "u0017", "u0059"])
def test_served_scores_are_the_offline_scores_and_propensities_follow_from_them(running: Running, user: str) -> None:
    answer = post(running, "/rank", {"user_id": user, "candidates": ITEMS[:40]})
    assert sorted(item["item_id"] for item in answer["items"]) == ITEMS[:40]
    assert [item["position"] for item in answer["items"]] == list(range(1, 41))
    expected = offline_logits(running.made, user, ITEMS[:40])
    assert np.std(list(expected.values())) > 1e-3, "the scores of this test should differ"
    check_scores(answer, expected)
    check_propensities(answer, expected, SERVING["explore_temperature"])
    assert (answer["arm"], answer["model"], answer["retriever"], answer["fallback"]) == ("sam", "sam", None, None)


def test_recommend_retrieves_what_was_not_seen_and_ranks_it(running: Running) -> None:
    answer = post(running, "/recommend", {"user_id": "u0005", "k": 7})
    shown = [item["item_id"] for item in answer["items"]]
    assert len(set(shown)) == 7 and answer["retriever"] == "sasrec"
    done = pq.read_table(running.made.tables / "interactions.parquet").to_pandas()
    keys = pq.read_table(running.made.tables / "items.parquet").to_pandas().set_index("item_id").item_key
    users = pq.read_table(running.made.tables / "users.parquet").to_pandas().set_index("user_key").user_id
    seen = set(keys[done[done.user_id == users["u0005"]].item_id])
    assert len(seen) > 10 and not seen & set(shown)
    assert answer["items"][0]["title"] == f"Item {shown[0]}"
    (line,) = (line for line in log_lines(running.state) if line["request_id"] == answer["request_id"])
    assert line["items"] == shown and line["arm"] == line["assigned"] == "sam" and line["user"] == "u0005"
    assert line["policy"] == answer["policy"] == "plackett_luce(0.5)"
    assert len(line["candidates"]) == SERVING["retrieve"] and set(shown) <= set(line["candidates"]) and not seen & set(line["candidates"])
    assert line["propensities"] == [item["propensity"] for item in answer["items"]]
    check_propensities(answer, offline_logits(running.made, "u0005", line["candidates"]), SERVING["explore_temperature"])


def test_recommend_among_given_candidates(running: Running) -> None:
    answer = post(running, "/recommend", {"user_id": "u0005", "k": 3, "candidates": ITEMS[:5]})
    assert len(answer["items"]) == 3 and {item["item_id"] for item in answer["items"]} <= set(ITEMS[:5])
    assert answer["retriever"] is None


def test_exploration_draws_different_lists(running: Running) -> None:
    firsts = {post(running, "/rank", {"user_id": "u0001", "candidates": ITEMS[:6]})["items"][0]["item_id"] for _ in range(12)}
    assert len(firsts) > 1


def test_unknown_user_gets_what_is_popular_and_is_told_so(running: Running) -> None:
    answer = post(running, "/recommend", {"user_id": "nobody", "k": 5})
    items = pq.read_table(running.made.features / "catalogue.parquet").to_pandas().sort_values(["item_events", "item_id"], ascending=[False, True])
    assert [item["item_id"] for item in answer["items"]] == items.item_key.tolist()[:5]
    assert answer["fallback"] == "unknown user" and answer["arm"] == "popularity_fallback" and answer["model"] is None
    assert all(item["propensity"] == 1 for item in answer["items"])
    ranked = post(running, "/rank", {"user_id": "nobody", "candidates": ITEMS[:9]})
    popular = [key for key in items.item_key if key in ITEMS[:9]]
    assert [item["item_id"] for item in ranked["items"]] == popular and ranked["fallback"] == "unknown user"


def test_events_reach_the_history_at_once(running: Running) -> None:
    user, before = "u0008", post(running, "/recommend", {"user_id": "u0008", "k": 5})
    taken = before["items"][0]["item_id"]
    at = datetime.now(UTC) - timedelta(seconds=3)
    sent = [
        {"user_id": user, "item_id": taken, "action": "view", "timestamp": at.isoformat()},
        {"user_id": user, "item_id": "i0003", "action": "click", "timestamp": at.isoformat(), "value": 2.5},
    ]
    assert post(running, "/events", {"events": sent}) == taken_all(2)
    micros = pd.Timestamp(at).value // 1000
    expected = offline_logits(running.made, user, ITEMS[:40], more=[(taken, "view", micros), ("i0003", "click", micros)])
    unchanged = offline_logits(running.made, user, ITEMS[:40])
    assert max(abs(expected[item] - unchanged[item]) for item in expected) > 1e-4, "two events should matter in this test"
    check_scores(post(running, "/rank", {"user_id": user, "candidates": ITEMS[:40]}), expected)
    for _ in range(3):
        assert taken not in {item["item_id"] for item in post(running, "/recommend", {"user_id": user, "k": 20})["items"]}


def test_a_new_user_has_a_history_from_the_first_event_on(running: Running) -> None:
    event = {"user_id": 'newcomer, "the" élan', "item_id": "i0007", "action": "click"}
    assert post(running, "/events", {"events": [event]}) == taken_all(1, new_users=1)
    answer = post(running, "/recommend", {"user_id": event["user_id"], "k": 20})
    assert answer["fallback"] is None and answer["user_id"] == event["user_id"]
    assert "i0007" not in {item["item_id"] for item in answer["items"]}


def test_an_event_id_counts_once(running: Running) -> None:
    event = {"user_id": "u0030", "item_id": "i0007", "action": "click", "event_id": "e-1"}
    assert post(running, "/events", {"events": [event, event]}) == taken_all(1, duplicates=1)
    assert post(running, "/events", {"events": [event, {**event, "event_id": "e-2"}]}) == taken_all(1, duplicates=1)


def test_a_full_disk_is_said_and_costs_nothing(running: Running) -> None:
    """The system's own limit on the size of files, set on the worker as it runs."""
    processes = [psutil.Process(running.process), *psutil.Process(running.process).children(recursive=True)]
    (worker,) = (process for process in processes if "--worker-id" in process.cmdline())
    batch = {"events": [EVENT | {"event_id": f"full-{number}"} for number in range(5)]}
    (*_, segment) = sorted((running.state / "log" / "events").glob("*.csv"))
    before, limit = segment.read_bytes(), worker.rlimit(psutil.RLIMIT_FSIZE)
    worker.rlimit(psutil.RLIMIT_FSIZE, (len(before) + 100, limit[1]))
    try:
        refused = [running.client.post("/events", json=batch) for _ in range(3)]
    finally:
        worker.rlimit(psutil.RLIMIT_FSIZE, limit)
    for response in refused:
        assert response.status_code == 507 and int(response.headers["Retry-After"]) > 0, response.text
        assert response.json()["detail"][0]["field"] == "events" and "Traceback" not in response.text
    assert segment.read_bytes() == before
    assert post(running, "/events", batch) == taken_all(5)
    assert post(running, "/events", batch) == taken_all(0, duplicates=5)


def test_probes_metrics_and_docs(running: Running) -> None:
    assert running.client.get("/livez").status_code == 200 and running.client.get("/readyz").status_code == 200
    post(running, "/rank", RANK)
    metrics = running.client.get("/metrics").text
    assert re.search(r'longtrail_answers_total\{arm="sam",endpoint="rank",fallback=""\} [1-9]', metrics)
    assert re.search(r'longtrail_stage_seconds_count\{stage="rank"\} [1-9]', metrics)
    page = running.client.get("/").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources and all("//" not in source and running.client.get("/" + source).status_code == 200 for source in sources)
    spec = running.client.get("/docs.json").json()
    assert {"/recommend", "/rank", "/events"} <= spec["paths"].keys()
    schemas = spec["components"]["schemas"]
    for name in ("RecommendRequestIODescriptor", "RankRequestIODescriptor", "Event", "AnswerIODescriptor", "ShownItem"):
        for field, value in schemas[name]["properties"].items():
            assert value.get("description"), f"{name}.{field} has no description"


def test_many_clients_at_once(running: Running) -> None:
    def visit(number: int) -> None:
        user = f"u{number % 60:04d}"
        shown = post(running, "/recommend", {"user_id": user, "k": 4})["items"]
        assert len(shown) == 4
        event = {"user_id": user, "item_id": shown[0]["item_id"], "action": "click", "event_id": f"many-{number}"}
        assert post(running, "/events", {"events": [event]})["accepted"] == 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(40)))
    ids = [line["request_id"] for line in log_lines(running.state)]
    assert len(ids) == len(set(ids))
    logged = [event.event_id for chunk in read_events(running.state / "log" / "events") for event in chunk if event.event_id]
    assert sorted(name for name in logged if name.startswith("many-")) == sorted(f"many-{number}" for number in range(40))


def visit_lists(running: Running) -> dict[str, list[str]]:
    """Twenty lists, each user clicking their second item; request id to items shown."""
    lists = {}
    for number in range(20):
        user = f"u{number:04d}"
        answer = post(running, "/recommend", {"user_id": user, "k": 4})
        lists[answer["request_id"]] = [item["item_id"] for item in answer["items"]]
        click = {"user_id": user, "item_id": lists[answer["request_id"]][1], "action": "click", "request_id": answer["request_id"]}
        post(running, "/events", {"events": [click, {"user_id": user, "item_id": "i0050", "action": "view"}]})
    return lists


def ingest(made: Outputs, folder: Path, dataset: dict[str, Any]) -> Path:
    from components.ingest import ingest as step

    params = yaml.safe_load((made.root / "params.yaml").read_text()) | {"dataset": dataset}
    folder.mkdir(exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    parse_config(params)
    step(params=folder / "params.yaml", tables=folder / "tables")
    return folder / "tables"


def test_the_log_is_the_next_input(running: Running, tmp_path: Path) -> None:
    lists = visit_lists(running)
    exported = export_log(running.state, tmp_path / "log")
    assert exported.torn_lines == 0 and exported.clicks >= 20 and exported.events >= 20
    dataset = yaml.safe_load((tmp_path / "log" / "dataset.yaml").read_text())["dataset"]
    tables = ingest(running.made, tmp_path / "again", dataset)
    counts = read_json(tables / "counts.json")
    assert counts["impressions"] == exported.impressions and counts["propensity"] == "conditional" and counts["rows_quarantined"] == 0
    shown = pq.read_table(tables / "impressions.parquet").to_pandas()
    keys = pq.read_table(tables / "items.parquet").to_pandas().set_index("item_id").item_key
    logged = {line["request_id"]: line for line in log_lines(running.state)}
    for request, items in lists.items():
        rows = shown[shown.request_id == request].sort_values("position")
        assert keys[rows.item_id].tolist() == items and rows.position.tolist() == [1, 2, 3, 4]
        assert rows.click.tolist() == [0, 1, 0, 0] and set(rows.policy) == {"sam"}
        assert rows.propensity.tolist() == logged[request]["propensities"]
        assert (rows.timestamp.astype("int64") // (1 if rows.timestamp.dt.unit == "us" else 1000)).tolist() == [logged[request]["timestamp"]] * 4
    assert not shown.policy.eq("popularity_fallback").any()
    offered = pq.read_table(tables / "candidates.parquet").to_pandas()
    request = next(iter(lists))
    assert set(keys[offered[offered.request_id == request].item_id]) == set(logged[request]["candidates"])
    done = pq.read_table(tables / "interactions.parquet").to_pandas()
    assert (done.action == "click").sum() >= 20 and (done.action == "view").sum() >= 20


def test_the_event_log_is_read_by_ingest_as_it_is(running: Running, tmp_path: Path) -> None:
    visit_lists(running)
    columns = {name: name for name in ("user", "item", "timestamp", "action", "value", "written_at")}
    dataset = {"kind": "event_log", "source": str(running.state / "log" / "events" / "*.csv"), "columns": columns, "timestamp_unit": "us"}
    tables = ingest(running.made, tmp_path, dataset)
    rows = [event for chunk in read_events(running.state / "log" / "events") for event in chunk]
    done = pq.read_table(tables / "interactions.parquet")
    assert done.num_rows == len(rows) and sorted(done["action"].to_pylist()) == sorted(event.action for event in rows)
    assert sorted(done["available_at"].cast("int64").to_pylist()) == [event.written_at for event in rows], "an event is available when it was logged"


def test_the_log_is_the_next_ab_test(running: Running, tmp_path: Path) -> None:
    """The log of this service says what another ranker would have earned: features, models and verdict from the fed-back log alone."""
    step = pytest.importorskip("components.ab_test", reason="components.ab_test is not here")
    from components.build_features import build_features
    from longtrail.files import write_json
    from tests.serving.bento import Outputs, save_champion

    for _ in range(3):
        visit_lists(running)
    export_log(running.state, tmp_path / "log")
    dataset = yaml.safe_load((tmp_path / "log" / "dataset.yaml").read_text())["dataset"]
    ingest(running.made, tmp_path / "again", dataset)
    again = Outputs(tmp_path / "again")
    again.validation.mkdir()
    write_json(again.validation / "result.json", {"success": True})
    params = again.root / "params.yaml"
    build_features(tables=again.tables, validation=again.validation, params=params, features=again.features)
    save_champion(again, load_config(params).models)
    step.ab_test(tables=again.tables, features=again.features, champion=again.champion, params=params, report=again.ab)
    report = read_json(again.ab / "report.json")
    assert (
        report["source"] == "log" and report["verdict"] in ("win", "lose", "equivalent", "not enough data", "do not trust") and report["requests"] > 0
    )


def test_the_running_service_did_not_touch_its_bento(running: Running) -> None:
    changed = [path for path in running.made.bento.rglob("*") if path.stat().st_mtime > running.started]
    assert not changed
    assert not [*running.state.rglob("*.pyc")]  # nor were the libraries compiled anew: theirs are found where they were installed


def test_the_workers_threads_wait_without_spinning(running: Running) -> None:
    processes = [psutil.Process(running.process), *psutil.Process(running.process).children(recursive=True)]
    policies = [process.environ().get("OMP_WAIT_POLICY") for process in processes if "--worker-id" in process.cmdline()]
    assert policies == ["PASSIVE"]
