"""Latency at the endpoint: /rank of the packaged Bento (SAM, whole history from Feast's SQLite store), beside an endpoint that does nothing.

    python -m benchmarks.serving                    # L = 1,000, 200 candidates, 10,000 items: some five minutes on 2 cores
    python -m benchmarks.serving --length 200 --rate 40

A simulated log goes through the pipeline's own steps to a Bento with an untrained SAM (the arithmetic is that of a trained one). The floor is
a BentoML service with the same request and answer, whose answer is made in advance: what HTTP, JSON and validation cost. Both servers are
asked by the same client, on the same machine, one after the other: first in sequence, then at a fixed rate, where the time of a request counts
from when it was due, not from when it could be sent (no coordinated omission).
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated, Any

import numpy as np
import psutil
import typer
import yaml

from longtrail.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = 8  # connections of the open-loop client
FLOOR = """
import bentoml
from longtrail.config import ServingSettings
from serving.gate import Gate
from serving.life import Life
from serving.schemas import Answer, RankRequest

ANSWER = Answer.model_validate_json({answer!r})

@bentoml.service(name="floor", workers=1, threads=4, traffic={{"timeout": 10}}, logging={{"access": {{"enabled": False}}}})
class Floor:
    @bentoml.api(route="/rank")
    def rank(self, request: RankRequest, /) -> Answer:
        return ANSWER

Floor.add_asgi_middleware(Gate, settings=ServingSettings(), life=Life(ready=True))
"""


def make_bento(folder: Path, *, length: int, items: int, users: int, threads: int) -> Path:
    """ingest, build_features and package on a simulated log; select and ab_test are answered for."""
    import torch

    from components.build_features import build_features
    from components.ingest import ingest
    from components.package import package
    from longtrail.config import load_config
    from longtrail.examples import FeatureSet
    from longtrail.models.registry import build_model
    from longtrail.models.store import ModelCard, save_model

    models = {
        "sasrec": {"stage": "retrieval", "kind": "sasrec"},
        "popularity": {"stage": "ranking", "kind": "popularity"},
        "sam": {"stage": "ranking", "kind": "sam", "max_history": length},
    }
    stage = {"max_latency_ms": 100, "max_bytes": 10**10}
    params = {
        "dataset": {"kind": "world", "users": users, "items": items, "events_per_user": 2 * length, "requests_per_user": 3, "candidates": 20},
        "models": models,
        "pipeline": {"models": list(models)},
        "features": {"online_history_length": length},
        "selection": {"incumbent": "popularity", "retrieval": {"metric": "ndcg@10", **stage}, "ranking": {"metric": "gauc", **stage}},
        "serving": {"threads": threads},
    }
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump(params))
    tables, validation, features, champion, report = (folder / name for name in ("tables", "validation", "features", "champion", "ab"))
    ingest(params=file, tables=tables)
    write_json(validation / "result.json", {"success": True})
    build_features(tables=tables, validation=validation, params=file, features=features)
    opened, settings = FeatureSet.open(features), load_config(file).models
    for target, name in (("retriever", "sasrec"), ("ranker", "sam"), ("incumbent", "popularity")):
        torch.manual_seed(0)
        module = build_model(settings[name], opened.sizes)
        card = ModelCard(name=name, settings=settings[name], sizes=opened.sizes, actions=opened.actions, prior_click_rate=opened.prior_click_rate)
        save_model(champion / target, module, card, {})
    write_json(champion / "selection.json", {"retriever": {"name": "sasrec"}, "ranker": {"name": "sam"}, "incumbent": "popularity"})
    write_json(report / "report.json", {"verdict": "win"})
    package(champion=champion, features=features, tables=tables, validation=validation, report=report, params=file, bento=folder / "bento")
    return folder / "bento"


def make_requests(folder: Path, *, length: int, candidates: int, count: int) -> list[bytes]:
    """Bodies of /rank: users whose history is at least `length` long, candidates drawn anew for each."""
    import pyarrow.parquet as pq

    from longtrail.history import HistoryStore

    store = HistoryStore.open(folder / "features" / "history")
    users = pq.read_table(folder / "tables" / "users.parquet", columns=["user_id", "user_key"]).to_pydict()
    long_enough = store.lengths(np.array(users["user_id"])) >= length
    keys = np.array(users["user_key"])[long_enough]
    items = np.array(pq.read_table(folder / "tables" / "items.parquet", columns=["item_key"])["item_key"].to_pylist())
    if not len(keys):
        raise SystemExit(f"no user has {length} events; expected some: raise --users")
    rng = np.random.default_rng(0)
    return [
        json.dumps({"user_id": str(rng.choice(keys)), "candidates": rng.choice(items, candidates, replace=False).tolist()}).encode()
        for _ in range(count)
    ]


@contextmanager
def started(command: list[str], folder: Path, port: int, log: Path, path: str | None = None) -> Iterator[None]:
    environment = {**os.environ, "BENTOML_DO_NOT_TRACK": "True", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path or ""}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + 180
        while not _ready(port):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the service did not become ready:\n{log.read_text()[-4000:]}")
            time.sleep(0.3)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def ask(connection: HTTPConnection, body: bytes) -> bytes:
    connection.request("POST", "/rank", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    if response.status != 200:
        raise SystemExit(f"HTTP {response.status}: {answer[:500]!r}")
    return answer


def in_sequence(port: int, bodies: list[bytes]) -> list[float]:
    """Milliseconds of each request, one after the other."""
    connection, taken = HTTPConnection("127.0.0.1", port, timeout=30), []
    for body in bodies:
        start = time.perf_counter()
        ask(connection, body)
        taken.append(1000 * (time.perf_counter() - start))
    return taken


def at_rate(port: int, bodies: list[bytes], rate: float) -> list[float]:
    """Milliseconds of each request from when it was due, `rate` a second with exponential gaps (Poisson arrivals)."""
    due = np.cumsum(np.random.default_rng(1).exponential(1 / rate, len(bodies)))
    queue: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
    taken: list[float] = []
    start = time.perf_counter() + 0.5
    for moment, body in zip(due, bodies, strict=True):
        queue.put((start + moment, body))

    def client() -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        while True:
            try:
                moment, body = queue.get_nowait()
            except Empty:
                return
            time.sleep(max(0.0, moment - time.perf_counter()))
            ask(connection, body)
            taken.append(1000 * (time.perf_counter() - moment))

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(taken) < len(bodies):
        raise SystemExit(f"{len(bodies) - len(taken)} of {len(bodies)} requests failed")
    return taken


def measure(name: str, port: int, bodies: list[bytes], rate: float) -> list[dict[str, Any]]:
    warm, half = bodies[:50], (len(bodies) - 50) // 2
    in_sequence(port, warm)
    rows = []
    for load, taken in (
        ("in sequence", in_sequence(port, bodies[50 : 50 + half])),
        (f"{rate:g} a second", at_rate(port, bodies[50 + half :], rate)),
    ):
        p50, p90, p99 = np.percentile(taken, [50, 90, 99])
        rows.append({"endpoint": name, "load": load, "requests": len(taken), "p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "max_ms": max(taken)})
    return rows


def stages(port: int) -> dict[str, float]:
    """Mean milliseconds of each stage inside the service, by its own histogram."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/metrics")
    found: dict[str, dict[str, float]] = {}
    for line in connection.getresponse().read().decode().splitlines():
        for kind in ("sum", "count"):
            if line.startswith(f"longtrail_stage_seconds_{kind}"):
                found.setdefault(line.split('stage="')[1].split('"')[0], {})[kind] = float(line.split()[-1])
    return {stage: 1000 * values["sum"] / values["count"] for stage, values in found.items() if values.get("count")}


def main(
    length: Annotated[int, typer.Option(help="events of a history, all read by SAM", min=1)] = 1_000,
    candidates: Annotated[int, typer.Option(help="candidates of a request", min=1, max=1_000)] = 200,
    items: Annotated[int, typer.Option(help="items of the catalogue")] = 10_000,
    users: Annotated[int, typer.Option(help="users of the simulated log")] = 200,
    rate: Annotated[float, typer.Option(help="requests a second of the open loop")] = 20.0,
    count: Annotated[int, typer.Option(help="requests to each endpoint, half in sequence, half at the rate")] = 1_250,
    threads: Annotated[int, typer.Option(help="serving.threads: CPU threads of one request")] = 1,
    out: Annotated[Path, typer.Option(help="JSON to write")] = Path("build/benchmarks/serving.json"),
) -> None:
    """p50 and p99 of /rank beside those of an empty endpoint."""
    with tempfile.TemporaryDirectory(prefix="longtrail-serving-") as name:
        folder = Path(name)
        bento = make_bento(folder, length=length, items=items, users=users, threads=threads)
        bodies = make_requests(folder, length=length, candidates=candidates, count=count)
        port = 20_000 + os.getpid() % 20_000
        before, rows = psutil.getloadavg()[0], []
        command = [sys.executable, "-m", "serving.run", "--bento", str(bento), "--port", str(port), "--state", str(folder / "state")]
        with started(command, ROOT, port, folder / "service.log"):
            rows += measure("sam", port, bodies, rate)
            inside = stages(port)
            answer = ask(HTTPConnection("127.0.0.1", port), bodies[0]).decode()
        (folder / "floor").mkdir()
        (folder / "floor" / "floor.py").write_text(FLOOR.format(answer=answer))
        command = [sys.executable, "-m", "bentoml", "serve", "floor:Floor", "--host", "127.0.0.1", "--port", str(port)]
        with started(command, folder / "floor", port, folder / "floor.log", path=str(bento / "src")):
            rows += measure("empty", port, bodies, rate)
        size = {"request_bytes": len(bodies[0]), "answer_bytes": len(answer)}
        arm = read_json(bento / "src" / "artifacts" / "manifest.json")["arm"]
    report(rows, inside)
    settings = {"length": length, "candidates": candidates, "items": items, "users": users, "rate": rate, "threads": threads, "arm": arm, **size}
    write_json(out, {"made": made(before), "settings": settings, "rows": rows, "stages_mean_ms": inside})
    print(f"-> {out}")


def report(rows: list[dict[str, Any]], inside: dict[str, float]) -> None:
    print(f"{'endpoint':10}{'load':>16}{'requests':>10}{'p50 ms':>9}{'p90 ms':>9}{'p99 ms':>9}{'max ms':>9}")
    for row in rows:
        figures = "".join(f"{row[name]:>9.1f}" for name in ("p50_ms", "p90_ms", "p99_ms", "max_ms"))
        print(f"{row['endpoint']:10}{row['load']:>16}{row['requests']:>10}{figures}")
    print("inside the service, mean ms: " + ", ".join(f"{stage} {ms:.1f}" for stage, ms in inside.items()))


def made(load_before: float) -> dict[str, Any]:
    """When, on what and how the figures were taken."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.serving", *sys.argv[1:]]),
        "commit": commit or None,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_before": load_before,
        "load_after": psutil.getloadavg()[0],
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    typer.run(main)
