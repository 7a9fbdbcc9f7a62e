"""A whole swap under load: how long until the new model answers, and what lists and events wait for it.

    python -m benchmarks.serving.swap              # SAM serves 10 lists and 2 events a second; IFA, over the same features, takes its place

Clients keep their pace whatever the service does: a request's time counts from when it was due. Both Bentos are made here; `python -m serving.swap`
is called as an operator would.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from benchmarks.serving.__main__ import free_port
from benchmarks.serving.bentos import Bento, make_bento, make_requests
from benchmarks.serving.load import Background, ask
from benchmarks.serving.report import made
from benchmarks.serving.servers import ROOT, packaged
from longtrail.files import write_json

OLD, NEW, LENGTH = "sam", "ifa", 1_000
SETTLE = 10.0  # seconds of load before the swap and after it
SAID = re.compile(r"loaded in ([0-9.]+) s, the state folder changed hands in ([0-9.]+) s")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request: its path, when it was due and answered (seconds, one clock for all), its status (0: none), and the model that answered or
    why none did.
    """

    path: str
    due: float
    answered: float
    status: int
    model: str | None = None
    fallback: str | None = None

    @property
    def milliseconds(self) -> float:
        return 1000 * (self.answered - self.due)


class Client(Background):
    """A thread that sends `bodies` in turn on a connection that it keeps: the first `after` so many seconds, then one every `gap` seconds."""

    def __init__(self, port: int, path: str, bodies: Sequence[bytes], gap: float, after: float = 0.0) -> None:
        super().__init__()
        self.asked: list[Asked] = []
        self._port, self._path, self._bodies, self._gap, self._after = port, path, bodies, gap, after

    def run(self) -> None:
        connection, due, number = HTTPConnection("127.0.0.1", self._port, timeout=60), time.perf_counter() + self._after, 0
        while not self.stop.wait(max(0.0, due - time.perf_counter())):
            status, answer = ask(connection, self._bodies[number % len(self._bodies)], self._path)
            said = json.loads(answer) if status == 200 else {}
            model, why = said.get("model"), said.get("fallback")
            self.asked.append(Asked(path=self._path, due=due, answered=time.perf_counter(), status=status, model=model, fallback=why))
            due, number = due + self._gap, number + 1


def timeline(asked: Sequence[Asked], told: float) -> dict[str, Any]:
    """What clients saw of a swap that was asked for at `told`. Raises SystemExit where the new model never answered."""
    lists = [each for each in asked if each.path == "/rank"]
    by = {model: [each.answered for each in lists if each.model == model] for model in (OLD, NEW)}
    if not by[OLD] or not by[NEW]:
        raise SystemExit(f"{len(by[OLD])} lists by {OLD}, {len(by[NEW])} by {NEW}; expected some of both")
    end = max(by[OLD])
    spans = {"before": (0.0, told), "during": (told, end), "after": (end, np.inf)}
    return {
        "first_answer_s": min(by[NEW]) - told,
        "last_old_answer_s": end - told,
        "lists": {name: _figures([each for each in lists if low <= each.due < high]) for name, (low, high) in spans.items()},
        "events": {
            name: _figures([each for each in asked if each.path == "/events" and low <= each.due < high]) for name, (low, high) in spans.items()
        },
        "fallbacks": dict(Counter(each.fallback for each in lists if each.fallback)),
        "failed": sum(each.status != 200 for each in asked),
    }


def _figures(asked: Sequence[Asked]) -> dict[str, Any]:
    if not asked:
        return {"requests": 0}
    p50, p99, most = np.percentile([each.milliseconds for each in asked], [50, 99, 100]).tolist()
    return {"requests": len(asked), "p50_ms": p50, "p99_ms": p99, "max_ms": most}


def table(result: dict[str, Any]) -> str:
    rows = ["| | requests | p50 ms | p99 ms | max ms |", "|---|---|---|---|---|"]
    for path in ("lists", "events"):
        for name, each in result[path].items():
            figures = [f"{each[key]:.1f}" if key in each else "–" for key in ("p50_ms", "p99_ms", "max_ms")]
            rows.append(f"| {path} {name} | {each['requests']} | {' | '.join(figures)} |")
    return "\n".join(rows)


def _events(bento: Bento, users: Sequence[str], count: int) -> list[bytes]:
    items = json.loads(make_requests(bento, length=LENGTH, candidates=200, count=1)[0])["candidates"]
    action = json.loads((bento.artifacts / "manifest.json").read_text())["actions"][0]
    made_of = [{"user_id": users[i % len(users)], "item_id": items[i % len(items)], "action": action, "event_id": f"swap-{i}"} for i in range(count)]
    return [json.dumps({"events": [event]}).encode() for event in made_of]


def main(
    rate: Annotated[float, typer.Option(help="lists a second")] = 10.0,
    events: Annotated[float, typer.Option(help="events a second")] = 2.0,
    items: Annotated[int, typer.Option(help="items of the catalogue")] = 10_000,
    out: Annotated[Path, typer.Option(help="JSON to write")] = Path("build/benchmarks/swap.json"),
) -> None:
    """How long a swap takes, and what requests wait before, during and after it. Exit code 1 where one failed."""
    before = psutil.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="longtrail-swap-") as name, ExitStack() as stack:
        folder, port = Path(name), free_port()
        old, new = (make_bento(folder / ranker, ranker, (LENGTH,), items=items, threads=1, redis_address=None) for ranker in (OLD, NEW))
        bodies, users = make_requests(old, length=LENGTH, candidates=200, count=400), old.users[LENGTH]
        stack.enter_context(packaged(old, port))
        clients = [stack.enter_context(Client(port, "/rank", bodies[start::4], 4 / rate, start / rate)) for start in range(4)]
        clients.append(stack.enter_context(Client(port, "/events", _events(old, users, 5_000), 1 / events)))
        time.sleep(SETTLE)
        told = time.perf_counter()
        command = [sys.executable, "-m", "serving.swap", "--bento", str(new.folder), "--state", str(old.state)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=300)
        time.sleep(SETTLE)
        for client in clients:
            client.__exit__()
        said = SAID.search(old.state.with_suffix(".log").read_text(errors="replace"))
    assert said, "the supervisor says how long it took"
    result = timeline([each for client in clients for each in client.asked], told)
    result |= {"loaded_s": float(said[1]), "state_folder_s": float(said[2])}
    write_json(out, {"made": made(before), "settings": {"rate": rate, "events": events, "items": items, "length": LENGTH}, **result})
    print(table(result))
    print({name: round(value, 2) for name, value in result.items() if isinstance(value, int | float)}, result["fallbacks"], f"-> {out}")
    if result["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
