"""What the service refuses, through HTTP: requests by field, events row by row. Any service will do: it is shared."""

import json
from typing import Any

import pytest

from tests.serving.asking import EVENT, RANK, lines_of_events, post
from tests.serving.conftest import Running

REFUSED = [
    # path, body, field named, what is said
    ("/rank", {"candidates": ["i0001"]}, "user_id", "missing"),
    ("/rank", {"user_id": "u0001"}, "candidates", "missing"),
    ("/rank", RANK | {"user_id": 7}, "user_id", "valid string"),
    ("/rank", RANK | {"user_id": ""}, "user_id", "at least 1 character"),
    ("/rank", RANK | {"user_id": "x" * 513}, "user_id", "at most 512 characters"),
    ("/rank", RANK | {"user_id": "a\nb"}, "user_id", "pattern"),
    ("/rank", RANK | {"user_id": None}, "user_id", "valid string"),
    ("/rank", RANK | {"limit": 5}, "limit", "unknown field"),
    ("/rank", RANK | {"candidates": []}, "candidates", "at least 1 item"),
    ("/rank", RANK | {"candidates": "i0001"}, "candidates", "valid array"),
    ("/rank", RANK | {"candidates": ["i0001", "nothing"]}, "candidates[1]", "unknown item 'nothing'"),
    ("/rank", RANK | {"candidates": ["i0001", "i0002", "i0001"]}, "candidates[2]", "second time"),
    ("/rank", RANK | {"candidates": ["i0001", 2]}, "candidates[1]", "valid string"),
    ("/rank", RANK | {"candidates": [f"i{n}" for n in range(61)]}, "candidates", "at most 60"),
    ("/rank", [RANK], "body", "object"),
    ("/rank", b"{", "body", "Invalid JSON"),
    ("/rank", b"", "user_id", "missing"),
    ("/rank", b'{"user_id": "\xff", "candidates": ["i0001"]}', "body", "Invalid JSON"),
    ("/rank", b'{"user_id": "\\ud800", "candidates": ["i0001"]}', "body", "Invalid JSON"),
    ("/recommend", {"user_id": "u0001", "k": 0}, "k", "greater than or equal to 1"),
    ("/recommend", {"user_id": "u0001", "k": 21}, "k", "at most 20"),
    ("/recommend", {"user_id": "u0001", "k": "many"}, "k", "valid integer"),
    ("/recommend", {"user_id": "u0001", "candidates": ["nothing"]}, "candidates[0]", "unknown item"),
    ("/events", {"events": []}, "events", "at least 1 item"),
    ("/events", {"events": [EVENT] * 6}, "events", "at most 5"),
    ("/events", {"events": EVENT}, "events", "valid array"),
    ("/events", {"event": [EVENT]}, "events", "missing"),
    ("/events", [EVENT], "body", "object"),
    ("/events", b'{"events": [', "body", "Invalid JSON"),
]


@pytest.mark.parametrize(("path", "body", "field", "says"), REFUSED)
def test_bad_requests_are_refused_by_field(running: Running, path: str, body: Any, field: str, says: str) -> None:
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    response = running.client.post(path, **content)
    assert response.status_code == 400, response.text
    answer = response.json()
    assert [d["message"] for d in answer["detail"] if d["field"] == field and says in d["message"]], answer
    assert field in answer["error"]
    assert "Traceback" not in response.text and "site-packages" not in response.text


def test_other_refusals(running: Running) -> None:
    large = running.client.post("/rank", json=RANK | {"user_id": "x" * 30_000})
    assert large.status_code == 413 and "20000 bytes" in large.json()["error"]
    chunked = running.client.post("/rank", content=(b" " * 5_000 for _ in range(6)))
    assert chunked.status_code == 413
    for media_type in ("multipart/form-data; boundary=x", "application/vnd.bentoml+pickle", "text/plain"):
        response = running.client.post("/rank", content=b"xx", headers={"Content-Type": media_type})
        assert response.status_code == 415 and "application/json" in response.json()["error"]
    assert running.client.get("/rank").status_code == 405
    assert running.client.post("/nothing", json={}).status_code == 404
    assert running.client.post("/rank", json=RANK).status_code == 200, "the service lives on"


REJECTED = [
    # row, field named, what is said
    (EVENT | {"item_id": "nothing"}, "item_id", "unknown item 'nothing'"),
    (EVENT | {"action": "stare"}, "action", "one of click, view"),
    (EVENT | {"timestamp": "yesterday"}, "timestamp", "valid datetime"),
    (EVENT | {"timestamp": "2026-01-01T00:00:00"}, "timestamp", "timezone"),
    (EVENT | {"timestamp": "2200-01-01T00:00:00Z"}, "timestamp", "in the future"),
    (EVENT | {"timestamp": "1989-12-31T23:59:59Z"}, "timestamp", "before 1990"),
    (EVENT | {"value": "much"}, "value", "valid number"),
    (EVENT | {"value": float("inf")}, "value", "finite"),
    (EVENT | {"userid": "u0001"}, "userid", "unknown field"),
    (EVENT | {"user_id": "a\nb"}, "user_id", "pattern"),
    (EVENT | {"event_id": ""}, "event_id", "at least 1 character"),
    ({"item_id": "i0001", "action": "click"}, "user_id", "missing"),
    ("click", "event", "object"),
    (None, "event", "object"),
]


@pytest.mark.parametrize(("row", "field", "says"), REJECTED)
def test_a_bad_row_is_rejected_with_a_reason_and_costs_the_others_nothing(running: Running, row: Any, field: str, says: str) -> None:
    body = json.dumps({"events": [EVENT, row, EVENT]}).replace("Infinity", "1e999")
    before = lines_of_events(running)
    response = running.client.post("/events", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200, response.text
    answer = response.json()
    (rejection,) = answer.pop("rejections")
    assert answer == {"accepted": 2, "duplicates": 0, "rejected": 1, "pending": 0, "new_users": 0}
    assert rejection["place"] == 1 and rejection["field"] == field and says in rejection["message"]
    assert lines_of_events(running) == before + 2


def test_a_batch_of_bad_rows_changes_nothing(running: Running) -> None:
    before = lines_of_events(running)
    answer = post(running, "/events", {"events": [EVENT | {"x" * 1_000: 1}] * 5})
    assert (answer["accepted"], answer["rejected"]) == (0, 5) and [r["place"] for r in answer["rejections"]] == [0, 1, 2, 3, 4]
    assert all(len(rejection["field"]) <= 300 for rejection in answer["rejections"]) and lines_of_events(running) == before
