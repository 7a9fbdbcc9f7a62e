"""A small Bento, packaged as the pipeline does it, from the toy log and untrained models (any scores will do to compare), once a worker."""

import functools
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml

from components.build_features import build_features
from components.package import package
from longtrail.config import load_config
from longtrail.examples import FeatureSet
from longtrail.files import write_json
from longtrail.models.registry import build_model
from longtrail.models.store import ModelCard, save_model
from serving.segments import read_answers
from tests.toy import toy_tables

ROOT = Path(__file__).parents[2]
SERVING = {
    "retrieve": 30,
    "max_candidates": 60,
    "max_k": 20,
    "max_events": 5,
    "max_body_bytes": 20_000,
    "explore_temperature": 0.5,
    "threads": 1,
    "evidence": {"full": 0.5},
}
MODELS = {
    "popular_items": {"stage": "retrieval", "kind": "popularity"},
    "sasrec": {"stage": "retrieval", "kind": "sasrec", "width": 8, "blocks": 1, "heads": 1, "max_history": 12},
    "popularity": {"stage": "ranking", "kind": "popularity", "by": "clicks"},
    "sam": {"stage": "ranking", "kind": "sam", "width": 4, "hidden": [8], "max_history": 16},
}


@dataclass(frozen=True)
class Outputs:
    """The folders of a pipeline that came as far as ab_test."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    def package(self, bento: Path | None = None) -> Path:
        bento = bento or self.root / "bento"
        package(
            champion=self.champion,
            features=self.features,
            tables=self.tables,
            validation=self.validation,
            report=self.ab,
            params=self.root / "params.yaml",
            bento=bento,
        )
        return bento


def make_outputs(root: Path, *, features: dict[str, Any] | None = None, **serving: Any) -> Outputs:
    """Everything `package` reads, with verdict "win". `serving` overrides SERVING; `features` is that section of the settings."""
    made = Outputs(root)
    root.mkdir(parents=True, exist_ok=True)
    params = {"dataset": {"kind": "world"}, "models": MODELS, "pipeline": {"models": list(MODELS)}, "serving": SERVING | serving}
    params["features"] = features or {}
    params["selection"] = {
        "incumbent": "popularity",
        "retrieval": {"metric": "ndcg@10", "max_latency_ms": 50, "max_bytes": 10**9},
        "ranking": {"metric": "gauc", "max_latency_ms": 30, "max_bytes": 10**9},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    toy_tables(made.tables)
    made.validation.mkdir()
    write_json(made.validation / "result.json", {"success": True, "critical_failures": 0, "warnings": 0, "expectations": []})
    build_features(tables=made.tables, validation=made.validation, params=root / "params.yaml", features=made.features)
    save_champion(made, load_config(root / "params.yaml").models)
    made.ab.mkdir()
    write_json(made.ab / "report.json", {"verdict": "win", "sentence": "sam beats popularity"})
    return made


def save_champion(made: Outputs, settings: dict[str, Any]) -> None:
    features = FeatureSet.open(made.features)
    for folder, name in (("retriever", "sasrec"), ("ranker", "sam"), ("incumbent", "popularity")):
        torch.manual_seed(7)
        module = build_model(settings[name], features.sizes)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        if hasattr(module, "fit"):
            counts = features.catalogue
            module.fit(
                events=counts.train_events,
                impressions=counts.train_impressions,
                clicks=counts.train_clicks,
                prior_click_rate=features.prior_click_rate,
            )
        card = ModelCard(
            name=name, settings=settings[name], sizes=features.sizes, actions=features.actions, prior_click_rate=features.prior_click_rate
        )
        save_model(made.champion / folder, module, card, {"features": "", "code": None, "params": ""})
    selection = {stage: {"name": name, "metric": "gauc", "value": 0.7, "losers": []} for stage, name in (("retriever", "sasrec"), ("ranker", "sam"))}
    write_json(made.champion / "selection.json", {**selection, "incumbent": "popularity"})


@functools.cache
def outputs() -> Outputs:
    """Made once; the folder goes with the process. Read only."""
    folder = tempfile.TemporaryDirectory(prefix="longtrail-bento-")
    made = make_outputs(Path(folder.name) / "build")
    made.package()
    _KEPT.append(folder)
    return made


@functools.cache
def compiled() -> Path:
    """What numba compiled, kept from one service to the next: with a state folder of its own, each would compile it anew, for seconds."""
    folder = tempfile.TemporaryDirectory(prefix="longtrail-compiled-")
    _KEPT.append(folder)
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def labels(bento: Path) -> dict[str, str]:
    return yaml.safe_load((bento / "bento.yaml").read_text())["labels"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(bento: Path, state: Path, *, wait: float = 120) -> Iterator[tuple[httpx.Client, int]]:
    """The packaged service, started as `make serve` does, and its process id; ready when this yields. Killed, with all it started, at the end."""
    port, output = free_port(), state.parent / f"{state.name}.out"
    state.mkdir(parents=True, exist_ok=True)
    if not (state / "numba").exists():
        (state / "numba").symlink_to(compiled())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "serving.run", "--bento", str(bento), "--port", str(port), "--state", str(state)]
    with output.open("wb") as text:
        process = subprocess.Popen(command, cwd=ROOT, stdout=text, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            _await_ready(client, process, output, wait)
            yield client, process.pid
    finally:
        with suppress(ProcessLookupError):  # a test may have ended it
            os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait(20)


def _await_ready(client: httpx.Client, process: subprocess.Popen[bytes], output: Path, wait: float) -> None:
    end = time.monotonic() + wait
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            if client.get("/readyz", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"the service did not become ready:\n{output.read_text()[-6000:]}")


def log_lines(state: Path) -> list[dict[str, Any]]:
    """Every logged answer (serving.answer_log.LoggedAnswer), in order of time."""
    return read_answers(state)
