"""A long run under constant load: does latency stay, does anything grow, is anything lost?

    python -m benchmarks.serving.soak                        # an hour at 20 lists and 5 events a second: choose 80 % of what your machine can do
    python -m benchmarks.serving.soak --minutes 10 --ranker ifa

Lists on an open loop (benchmarks.serving.load), and beside them single events with ids, each for a user of the lists. Minute by minute: latency,
and the memory, open files and threads of the process that serves. In the end the event log must hold every acknowledged event exactly once, and no
other.
"""

import json
import tempfile
import time
from collections import Counter
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from benchmarks.serving.__main__ import free_port
from benchmarks.serving.bentos import Bento, make_bento, make_requests
from benchmarks.serving.load import Background, ask, at_rate
from benchmarks.serving.report import made
from benchmarks.serving.servers import packaged
from longtrail.files import write_json

WINDOW = 60.0  # seconds of a row of the table
HEAD = """| minute | lists | p50 ms | p99 ms | max ms | fallbacks | refused | events | memory MB | open files | threads |
|---|---|---|---|---|---|---|---|---|---|---|"""


class Clicks(Background):
    """A client that reports events at a steady rate in a thread of its own and remembers what was acknowledged."""

    def __init__(self, port: int, bento: Bento, users: list[str], rate: float) -> None:
        super().__init__()
        self.acknowledged: list[str] = []
        self.refused: Counter[int] = Counter()
        self._port, self._users, self._rate = port, users, rate
        first = json.loads(make_requests(bento, length=min(bento.users), candidates=1_000, count=1)[0])
        self._items, self._action = first["candidates"], json.loads((bento.artifacts / "manifest.json").read_text())["actions"][0]

    def run(self) -> None:
        connection, rng, due, number = HTTPConnection("127.0.0.1", self._port, timeout=30), np.random.default_rng(2), time.perf_counter(), 0
        while not self.stop.wait(max(0.0, due - time.perf_counter())):
            due, number = due + rng.exponential(1 / self._rate), number + 1
            name = f"soak-{number}"
            event = {"user_id": rng.choice(self._users), "item_id": rng.choice(self._items), "action": self._action, "event_id": name}
            status, answer = ask(connection, json.dumps({"events": [event]}).encode(), "/events")
            if status == 200 and json.loads(answer)["accepted"] == 1:
                self.acknowledged.append(name)
            else:
                self.refused[status] += 1


def worker_of(bento: Bento) -> psutil.Process:
    """The process that serves."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "serving.worker" in line and str(bento.folder) in line:
            return process
    raise SystemExit(f"no serving.worker of {bento.folder} runs; expected one")


def logged_ids(state: Path) -> list[str]:
    """The event ids that stand in the log of the service, in order."""
    from serving.event_records import read_events

    return [event.event_id for part in read_events(state / "log" / "events", 0) for event in part if event.event_id]


def line(row: dict[str, Any]) -> str:
    """A minute as a row of the table."""
    latency = [f"{row[key]:.1f}" if key in row else "–" for key in ("p50_ms", "p99_ms", "max_ms")]
    counts = [row["fallbacks"], sum(row["refused"].values()), row["events"], f"{row['memory_bytes'] / 1e6:.0f}", row["open_files"], row["threads"]]
    return "| " + " | ".join(map(str, [row["minute"], row["requests"], *latency, *counts])) + " |"


def main(
    ranker: Annotated[str, typer.Option(help="sam or ifa")] = "sam",
    minutes: Annotated[int, typer.Option(min=1)] = 60,
    rate: Annotated[float, typer.Option(help="lists a second")] = 20.0,
    events: Annotated[float, typer.Option(help="events a second")] = 5.0,
    length: Annotated[int, typer.Option(help="events of a history at the start")] = 1_000,
    out: Annotated[Path, typer.Option(help="JSON to write")] = Path("build/benchmarks/soak.json"),
) -> None:
    """One row a minute, and what was lost. Exit code 1 if anything was."""
    rows: list[dict[str, Any]] = []
    before = psutil.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="longtrail-soak-") as name:
        bento = make_bento(Path(name) / "bento", ranker, (length,), items=10_000, threads=1, redis_address=None)
        port, users = free_port(), bento.users[length]
        bodies = make_requests(bento, length=length, candidates=200, count=max(1, int(rate * WINDOW)))
        with packaged(bento, port), Clicks(port, bento, users, events) as clicks:
            process = worker_of(bento)
            print(HEAD, flush=True)
            for minute in range(1, minutes + 1):
                row = at_rate(port, bodies, rate).row()
                with process.oneshot():
                    row |= {"memory_bytes": process.memory_info().rss, "open_files": process.num_fds(), "threads": process.num_threads()}
                rows.append({"minute": minute, **row, "events": len(clicks.acknowledged)})
                print(line(rows[-1]), flush=True)
        found = Counter(logged_ids(bento.state))
    lost = [event for event in clicks.acknowledged if found[event] == 0]
    twice = [event for event, times in found.items() if times > 1]
    result = {"acknowledged": len(clicks.acknowledged), "lost": len(lost), "twice": len(twice), "refused": dict(clicks.refused)}
    settings = {"ranker": ranker, "minutes": minutes, "rate": rate, "events": events, "length": length, "candidates": 200}
    write_json(out, {"made": made(before), "settings": settings, "rows": rows, "events": result})
    print(f"events: {result} -> {out}")
    if lost or twice:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
