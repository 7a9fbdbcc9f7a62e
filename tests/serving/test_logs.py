"""One JSON line a request, with the id that its client knows, and no line that tells of its content."""

import json
import logging
import time
from typing import Any

import httpx
import pytest

from longtrail.config import LogSettings
from serving.logs import JsonFormatter, _sampled, request_id
from serving.trace import Trace, begin
from tests.serving.conftest import Running

RANK = {"user_id": "u0003", "candidates": ["i0001", "i0002", "i0003"]}
OURS = 32  # hex digits


def lines(running: Running) -> list[dict[str, Any]]:
    """All structured lines so far; the supervisor's own are plain text."""
    text = (running.state.parent / f"{running.state.name}.out").read_text()
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def line_of(running: Running, name: str) -> dict[str, Any]:
    """The line is written when the answer is out: a client may be faster."""
    end = time.monotonic() + 10
    while True:
        found = [line for line in lines(running) if line.get("request_id") == name and line["message"] == "request"]
        if found or time.monotonic() > end:
            (line,) = found
            return line
        time.sleep(0.01)


def test_an_answered_request_leaves_one_line(running: Running) -> None:
    response = running.client.post("/rank", json=RANK, headers={"X-Request-Id": "shop-1:a.B_c"})
    assert response.headers.get_list("x-request-id") == ["shop-1:a.B_c"]
    line = line_of(running, "shop-1:a.B_c")
    assert (line["endpoint"], line["status"], line["level"], line["items"]) == ("rank", 200, "info", 3)
    assert line["arm"] == response.json()["arm"] and line["answer"] == response.json()["request_id"] and "fallback" not in line
    assert {"queue", "features", "rank", "log"} <= line["stages"].keys()
    assert 0 < sum(line["stages"].values()) <= line["ms"] < 10_000


def test_a_fallback_and_events_are_told(running: Running) -> None:
    running.client.post("/recommend", json={"user_id": "a stranger", "k": 2}, headers={"X-Request-Id": "fallback-1"})
    assert line_of(running, "fallback-1")["fallback"] == running.client.post("/recommend", json={"user_id": "a stranger"}).json()["fallback"]
    event = {"user_id": "u0003", "item_id": "i0004", "action": "view"}
    running.client.post("/events", json={"events": [event, event]}, headers={"X-Request-Id": "events-1"})
    assert line_of(running, "events-1")["events"] == 2


def test_a_refusal_leaves_no_traceback_and_no_content(running: Running) -> None:
    before = len(lines(running))
    secret = "my-secret-user"
    headers = {"X-Request-Id": "refused-1", "Authorization": "Bearer hunter2", "Cookie": "session=hunter2"}
    assert running.client.post("/rank", json=RANK | {"user_id": secret, "limit": 1}, headers=headers).status_code == 400
    assert running.client.post("/rank", content=b"{" + secret.encode(), headers=headers | {"X-Request-Id": "refused-2"}).status_code == 400
    assert running.client.post("/rank", json=RANK | {"candidates": [secret]}, headers=headers | {"X-Request-Id": "refused-3"}).status_code == 400
    assert [line_of(running, f"refused-{n}")["status"] for n in (1, 2, 3)] == [400, 400, 400]
    new = json.dumps(lines(running)[before:])
    assert secret not in new and "hunter2" not in new and "traceback" not in new


@pytest.mark.parametrize("given", ["", "x" * 129, "two words", "new\tline", '"}', "é"])
def test_an_id_that_is_not_sane_is_replaced(given: str) -> None:
    made = request_id({"headers": [(b"X-Request-Id", given.encode("utf-8"))]})
    assert len(made) == OURS and int(made, 16) >= 0 and made != request_id({"headers": []})


def test_probes_are_not_logged_and_unknown_paths_share_a_name(running: Running) -> None:
    before = len(lines(running))
    for path in ("/livez", "/readyz", "/metrics"):
        assert running.client.get(path).status_code == 200
    assert len(lines(running)) == before
    running.client.get("/wp-admin", headers={"X-Request-Id": "scan-1"})
    assert (line_of(running, "scan-1")["endpoint"], line_of(running, "scan-1")["status"]) == ("other", 404)
    ours = [line for line in running.client.get("/metrics").text.splitlines() if line.startswith("longtrail_")]
    assert ours and not any("wp-admin" in line for line in ours)


def test_a_fault_is_one_line_with_its_traceback() -> None:
    begin(Trace("r1", "rank"))
    try:
        raise OSError("disk\nfull")
    except OSError:
        import sys

        record = logging.LogRecord("x", logging.ERROR, "f.py", 1, "it %s", ("broke",), sys.exc_info())
    text = JsonFormatter().format(record)
    line = json.loads(text)
    assert "\n" not in text and line["message"] == "it broke" and line["request_id"] == "r1"
    assert line["error"] == "OSError: disk\nfull" and "test_logs.py" in line["traceback"]


def test_sampling_keeps_its_share_and_its_choice() -> None:
    names = [f"request-{n}" for n in range(20_000)]
    kept = [name for name in names if _sampled(name, 0.1)]
    assert abs(len(kept) - 2_000) < 4 * (20_000 * 0.1 * 0.9) ** 0.5
    assert all(_sampled(name, 0.3) for name in kept) and not any(_sampled(name, 0.0) for name in names) and all(_sampled(n, 1.0) for n in names)


def test_settings_are_strict() -> None:
    with pytest.raises(ValueError, match="level"):
        LogSettings(level="loud")  # type: ignore[arg-type]


def test_two_services_on_a_machine_keep_their_own_metrics(running: Running) -> None:
    """BentoML empties its Prometheus folder at a start; ours is the state folder's own."""
    assert (running.state / "bentoml").is_dir()
    port = httpx.URL(str(running.client.base_url)).port
    assert list((running.state / "bentoml" / str(port) / "metrics").glob("*.db"))
