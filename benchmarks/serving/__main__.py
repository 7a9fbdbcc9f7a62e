"""Latency at the endpoint under open-loop load: /rank of the packaged service with SAM and IFA, beside what one could have instead.

    python -m benchmarks.serving                    # L = 1,000 (IFA to 1,000,000), 200 candidates, SQLite, 20 a second: five minutes on 2 cores
    python -m benchmarks.serving --full             # all lengths, 50 to 1,000 candidates, SQLite and Redis, rates to saturation: hours
    python -m benchmarks.serving --only sam --length 1000 --rate 20 --rate 40 --seconds 60

  sam, ifa               the packaged Bento, started as `make serve` does, histories in its online store
  fastapi sam, fastapi ifa   the same models and reads behind a bare FastAPI: no log, no propensities, no limits
  tiled din              behind FastAPI too: a DIN that copies the history to every candidate, as users write it
  empty                  BentoML behind the same gate with an answer made in advance: the floor

All servers are asked by the same client on the same machine, one after the other: in sequence, then at fixed rates on an open loop, where the time of
a request counts from when it was due, not from when it could be sent (no coordinated omission). Histories grow to their length by events, as
the service takes them; one of a million events exists as a user state and its newest thousand events.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from benchmarks.serving.bentos import Bento, make_bento, make_requests
from benchmarks.serving.load import ask, at_rate, in_sequence
from benchmarks.serving.report import chart, made, table
from benchmarks.serving.servers import bare, floor, packaged, stages
from longtrail.files import write_json

RANKERS = ("sam", "ifa")
ENDPOINTS = ("sam", "ifa", "fastapi sam", "fastapi ifa", "tiled din", "empty")
FULL_LENGTHS = {"sam": (100, 1_000, 10_000), "ifa": (100, 1_000, 10_000, 100_000, 1_000_000)}
FULL_CANDIDATES, FULL_RATES = (50, 200, 500, 1_000), (10.0, 20.0, 40.0, 60.0, 80.0, 120.0)
QUICK_LENGTHS = {"sam": (1_000,), "ifa": (100, 1_000, 1_000_000)}
TILED_MOST = 1_000  # events: at 10,000 the tiled features of 200 candidates take a gigabyte
WARM = 30  # requests before each measurement

Cell = tuple[int | None, int]  # events of the history, candidates


class Benchmark:
    """Runs endpoint after endpoint and gathers rows."""

    def __init__(self, folder: Path, port: int, *, cells: dict[str, list[Cell]], rates: tuple[float, ...], count: int, seconds: float) -> None:
        self.folder, self.port, self.cells, self.rates, self.count, self.seconds = folder, port, cells, rates, count, seconds
        self.rows: list[dict[str, Any]] = []
        self.stages: dict[str, dict[str, float]] = {}

    def of_bento(self, bento: Bento, ranker: str, store: str, endpoints: tuple[str, ...]) -> None:
        """The endpoints that stand on one Bento."""
        if ranker in endpoints:
            with packaged(bento, self.port):
                self._measure(ranker, bento, store, self.cells[ranker])
                self.stages[f"{ranker} {store}"] = stages(self.port)
                answer = self._answer(bento)
            if "empty" in endpoints and not any(row["endpoint"] == "empty" for row in self.rows):
                with floor(bento, self.port, answer):
                    self._measure("empty", bento, None, [(None, 200)])
        if f"fastapi {ranker}" in endpoints:
            with bare(bento, self.port, "packaged"):
                self._measure(f"fastapi {ranker}", bento, store, [cell for cell in self.cells[ranker] if cell[1] == 200])
        if ranker == "sam" and "tiled din" in endpoints:
            with bare(bento, self.port, "tiled_din"):
                self._measure("tiled din", bento, store, [cell for cell in self.cells["sam"] if cell[1] == 200 and (cell[0] or 0) <= TILED_MOST])

    def _measure(self, endpoint: str, bento: Bento, store: str | None, cells: list[Cell]) -> None:
        for length, candidates in cells:
            most = max(self.count, *(int(rate * self.seconds) for rate in self.rates)) + WARM
            bodies = make_requests(bento, length=length or min(bento.users), candidates=candidates, count=most)
            in_sequence(self.port, bodies[:WARM])
            about = {"endpoint": endpoint, "store": store, "length": length, "candidates": candidates}
            self._row(about, None, in_sequence(self.port, self._for_seconds(bodies[WARM : WARM + self.count])).row())
            for rate in self.rates:
                time.sleep(0.5)
                row = at_rate(self.port, bodies[WARM : WARM + max(10, int(rate * self.seconds))], rate).row()
                self._row(about, rate, row)
                if sum(row["refused"].values()) > row["requests"] or row.get("p50_ms", 0) > 1_000:
                    break  # beyond what it can do: higher rates would only take longer

    def _for_seconds(self, bodies: list[bytes]) -> list[bytes]:
        """As many as fit in some `seconds`, judged by three, at least 20."""
        start = time.perf_counter()
        in_sequence(self.port, bodies[:3])
        return bodies[: max(20, int(3 * self.seconds / (time.perf_counter() - start)))]

    def _row(self, about: dict[str, Any], rate: float | None, figures: dict[str, Any]) -> None:
        self.rows.append({**about, "rate": rate, **figures})
        print(table(self.rows[-1:]).splitlines()[-1], flush=True)

    def _answer(self, bento: Bento) -> bytes:
        (body,) = make_requests(bento, length=min(bento.users), candidates=200, count=1)
        return ask(HTTPConnection("127.0.0.1", self.port), body)[1]


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[str]:
    """The address of a Redis of our own."""
    if shutil.which("redis-server") is None:
        raise SystemExit("redis-server is not installed; expected it for --store redis (apt-get install redis-server)")
    port = free_port()
    folder.mkdir(parents=True)
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            time.sleep(1)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(
    full: Annotated[bool, typer.Option(help="all lengths, numbers of candidates, stores and rates")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"endpoints: {', '.join(ENDPOINTS)}; default: all")] = None,
    length: Annotated[list[int] | None, typer.Option(help="events of a history, in the place of the default ones")] = None,
    candidates: Annotated[list[int] | None, typer.Option(help="candidates of a request")] = None,
    rate: Annotated[list[float] | None, typer.Option(help="requests a second of the open loop")] = None,
    store: Annotated[list[str] | None, typer.Option(help="online stores: sqlite, redis")] = None,
    seconds: Annotated[float, typer.Option(help="of each measurement; 60 with --full")] = 0,
    count: Annotated[int, typer.Option(help="most requests in sequence")] = 1_200,
    items: Annotated[int, typer.Option(help="items of the catalogue")] = 10_000,
    threads: Annotated[int, typer.Option(help="serving.threads: CPU threads of one request")] = 1,
    out: Annotated[Path, typer.Option(help="JSON to write")] = Path("build/benchmarks/serving.json"),
    picture: Annotated[Path, typer.Option(help="chart to write")] = Path("build/benchmarks/serving.svg"),
) -> None:
    """p50, p99 and p99.9 of /rank against the rate of requests."""
    endpoints = tuple(only or ENDPOINTS)
    if unknown := set(endpoints) - set(ENDPOINTS):
        raise SystemExit(f"--only {', '.join(unknown)}; expected some of {', '.join(ENDPOINTS)}")
    lengths = {ranker: tuple(length or (FULL_LENGTHS if full else QUICK_LENGTHS)[ranker]) for ranker in RANKERS}
    counts = tuple(candidates or (FULL_CANDIDATES if full else (200,)))
    cells: dict[str, list[Cell]] = {ranker: [(events, many) for events in lengths[ranker] for many in counts] for ranker in RANKERS}
    before = psutil.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="longtrail-serving-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        benchmark = Benchmark(
            folder,
            free_port(),
            cells=cells,
            rates=tuple(rate or (FULL_RATES if full else (20.0,))),
            count=count,
            seconds=seconds or (60 if full else 12),
        )
        for kind in store or (("sqlite", "redis") if full else ("sqlite",)):
            address = stack.enter_context(redis(folder / "redis")) if kind == "redis" else None
            for ranker in RANKERS:
                if any(ranker in endpoint for endpoint in endpoints) or (ranker == "sam" and {"tiled din", "empty"} & set(endpoints)):
                    bento = make_bento(folder / kind / ranker, ranker, lengths[ranker], items=items, threads=threads, redis_address=address)
                    benchmark.of_bento(bento, ranker, kind, endpoints)
    settings = {"items": items, "threads": threads, "full": full, "clients_cores": os.cpu_count()}
    write_json(out, {"made": made(before), "settings": settings, "rows": benchmark.rows, "stages_mean_ms": benchmark.stages})
    chart(benchmark.rows, picture)
    print(table(benchmark.rows))
    for name, inside in benchmark.stages.items():
        print(f"inside the service, {name}, mean ms: " + ", ".join(f"{stage} {ms:.1f}" for stage, ms in inside.items()))
    print(f"-> {out}, {picture}")


if __name__ == "__main__":
    typer.run(main)
