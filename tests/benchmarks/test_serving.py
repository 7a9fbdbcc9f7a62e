"""The endpoint's benchmark: a service that stalls is seen to stall by every request that was due meanwhile; its table and chart."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.serving.load import Taken, at_rate, in_sequence
from benchmarks.serving.report import chart, table
from benchmarks.serving.swap import Asked, timeline
from benchmarks.serving.swap import table as swap_table


class Stalling(BaseHTTPRequestHandler):
    """One request at a time; the 21st takes half a second, the 40th is refused, and one in ten is a fallback."""

    protocol_version = "HTTP/1.0"
    count = 0

    def do_POST(self) -> None:
        Stalling.count += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(0.5 if Stalling.count == 21 else 0)
        body = b'{"fallback":"store slow"}' if Stalling.count % 10 == 0 else b'{"fallback":null}'
        self.send_response(503 if Stalling.count == 40 else 200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    Stalling.count = 0
    with HTTPServer(("127.0.0.1", 0), Stalling) as server:
        server.socket.listen(128)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_requests_that_wait_for_a_stall_count_it(port: int) -> None:
    taken = at_rate(port, [b"{}"] * 100, 100)
    slow = np.sort(taken.milliseconds)[::-1]
    assert taken.refused == {503: 1} and taken.fallbacks == 9 and len(slow) == 99
    assert slow[0] > 450 and slow[10] > 300, "some fifty were due while it stalled, each waited for what was left"
    assert taken.row()["p999_ms"] is None, "of too few requests"


def test_in_sequence_a_refusal_ends_the_measurement(port: int) -> None:
    with pytest.raises(SystemExit, match="HTTP 503"):
        in_sequence(port, [b"{}"] * 50)


def test_table_and_chart(tmp_path: Path) -> None:
    figures = Taken(milliseconds=[float(n) for n in range(1, 1_001)], fallbacks=2, refused={503: 3}).row()
    assert (figures["p50_ms"], round(figures["p999_ms"])) == (500.5, 999)
    rows = [{"endpoint": "sam", "store": "sqlite", "length": 1_000, "candidates": 200, "rate": rate, **figures} for rate in (None, 20.0, 40.0)]
    rows.append(
        {
            "endpoint": "empty",
            "store": None,
            "length": None,
            "candidates": 200,
            "rate": 20.0,
            **Taken(milliseconds=[], fallbacks=0, refused={0: 9}).row(),
        }
    )
    lines = table(rows).splitlines()
    assert lines[2] == "| sam | sqlite | 1,000 | 200 | in sequence | 1000 | 500.5 | 990.0 | 999.0 | 2 | 3 |"
    assert lines[-1] == "| empty | – | – | 200 | 20 a second | 0 | – | – | – | 0 | 9 |"
    chart(rows, tmp_path / "chart.svg")
    assert (tmp_path / "chart.svg").read_text().startswith("<?xml")


def test_a_swap_is_read_from_what_clients_saw() -> None:
    """One list a second from 0; the swap is told at 2.5, the old model's last answer comes at 5.1, the new one's first, late, at 6.9."""
    lists = [Asked(path="/rank", due=due, answered=due + 0.1, status=200, model="sam") for due in (0.0, 1.0, 2.0, 3.0, 5.0)]
    lists.append(Asked(path="/rank", due=4.0, answered=4.2, status=200, fallback="store slow"))
    lists += [Asked(path="/rank", due=6.0, answered=6.9, status=200, model="ifa"), Asked(path="/rank", due=7.0, answered=7.1, status=503)]
    events = [Asked(path="/events", due=5.0, answered=6.5, status=200), Asked(path="/events", due=0.5, answered=0.6, status=200)]
    found = timeline([*lists, *events], 2.5)
    assert (found["first_answer_s"], found["last_old_answer_s"], found["failed"]) == pytest.approx((4.4, 2.6, 1))
    assert found["fallbacks"] == {"store slow": 1} and found["lists"]["during"]["requests"] == 3
    assert found["lists"]["during"]["max_ms"] == pytest.approx(200) and found["lists"]["after"]["max_ms"] == pytest.approx(900)
    assert found["events"]["during"]["max_ms"] == pytest.approx(1_500) and found["events"]["after"] == {"requests": 0}
    assert "| events during | 1 | 1500.0 | 1500.0 | 1500.0 |" in swap_table(found) and "| events after | 0 | – | – | – |" in swap_table(found)
    with pytest.raises(SystemExit, match="expected some of both"):
        timeline(lists[:3], 2.5)
