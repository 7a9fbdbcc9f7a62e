"""Throughput and memory of training, for every model and its textbook twin, on one generated workload.

    python -m benchmarks.training --help

Next item: L = 200, D = 64, two blocks, 128 users a step, 3,416 items, histories as long as MovieLens-1M's. Click: L = 1,000, D = 32 + 32, 256
samples a step, in requests of one candidate and of eight. Each case trains in a process of its own, through Longtrail's whole loop (reading,
batches, Lightning, running means of weights); twins through a plain one. A ranker then scores one request of 200 candidates, as the service does.
A rival that lives in another environment joins by `--rival NAME=COMMAND` or `--click-rival NAME=COMMAND`: the command is run with the folder of the
next-item workload, or of the first click workload, as its last argument and prints, as its last line, {"per_cpu_second": users or samples,
"peak_bytes": bytes} and, if it likes, "per_second", "parameters", "loss_at" and "request_cpu_ms". Those in rivals/ say what they need.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, get_args

import typer
from tqdm import tqdm

from benchmarks.history import hardware
from benchmarks.training.cases import Task
from benchmarks.training.workload import write_next_item_log, write_ranking_log
from longtrail.config import RankerModel, RankerSettings
from longtrail.files import write_json

Row = dict[str, Any]
SEQUENCES = {"stage": "retrieval", "width": 64}
RECJPQ = {"items": {"kind": "recjpq", "splits": 8}}
LEARNED = {"attention": {"kind": "full", "positions": "learned"}}  # as the twins and the other libraries have them
NEXT_ITEM: dict[str, Row] = {
    "SASRec": {"kind": "sasrec", **LEARNED},
    "SASRec, rotary positions": {"kind": "sasrec"},
    "SASRec, RecJPQ": {"kind": "sasrec", **LEARNED, **RECJPQ},
    "SASRec, Blossom": {"kind": "sasrec", "attention": {"kind": "blossom"}},
    "gSASRec (gBCE, 256 negatives)": {"kind": "sasrec", "loss": "gbce", **LEARNED},
    "gSASRec, RecJPQ": {"kind": "sasrec", "loss": "gbce", **LEARNED, **RECJPQ},
    "SASRec, BCE (one negative)": {"kind": "sasrec", "loss": "bce", **LEARNED},
    "BERT4Rec": {"kind": "bert4rec", **LEARNED},
    "BERT4Rec, RecJPQ": {"kind": "bert4rec", **LEARNED, **RECJPQ},
    "GRU4Rec": {"kind": "gru4rec"},
    "GRU4Rec, RecJPQ": {"kind": "gru4rec", **RECJPQ},
    "GRU4Rec, LambdaRank": {"kind": "gru4rec", "loss": "lambdarank"},
}
PADDED = {"width": 64, "blocks": 2, "heads": 2, "dropout": 0.2}
TILED = {"attention_hidden": (32,), "hidden": (200, 80)}
CLICK_ITEMS = 100_000


def rankers() -> dict[str, Row]:
    """Every trained kind of ranker that longtrail.config knows, with its defaults."""
    union = get_args(get_args(RankerModel)[0])
    return {kind.model_fields["kind"].default: {"kind": kind.model_fields["kind"].default} for kind in union if issubclass(kind, RankerSettings)}


def measure(who: str, task: Task, settings: Row) -> Row:
    """One case in a process of its own; {"error": last line} where it fails."""
    job = json.dumps({"who": who, "task": asdict(task), "settings": settings})
    code = (
        "import json, sys; from benchmarks.training.cases import CASES, Task; job = json.loads(sys.argv[1]);"
        "print(json.dumps(CASES[job['who']](Task(**job['task']), job['settings'])))"
    )
    return {"settings": settings, **_run([sys.executable, "-c", code, job], task.threads)}


def _run(command: list[str], threads: int) -> Row:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return _last_line(subprocess.run(command, capture_output=True, text=True, check=False, env=environment))


def _last_line(done: subprocess.CompletedProcess[str]) -> Row:
    text = done.stdout if done.returncode == 0 else done.stderr
    line = (text.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return dict(json.loads(line)) if done.returncode == 0 else {"error": line}


def show(rows: list[Row]) -> str:
    """A table in Markdown."""
    lines = [
        "| workload | model | who | per CPU second | per second | peak memory | request, CPU-ms | parameters | loss at step 10, 20, 40, 80, 160 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['workload']} | {row['model']} | {row['who']} "
        if "error" in row:
            lines.append(f"{head}| failed: {row['error']} | | | | | |")
            continue
        losses = ", ".join(f"{loss:.3f}" for loss in row.get("loss_at", {}).values())
        second, size, request = (row.get(name) for name in ("per_second", "parameters", "request_cpu_ms"))
        lines.append(
            f"{head}| {row['per_cpu_second']:,.1f} | {'' if second is None else f'{second:,.1f}'} | {row['peak_bytes'] / 1e6:,.0f} MB "
            f"| {'' if request is None else f'{request:,.1f}'} | {'' if size is None else f'{size:,}'} | {losses} |"
        )
    return "\n".join(lines)


def main(
    seconds: Annotated[float, typer.Option(help="processor seconds of each case, after warm-up; at least three steps")] = 30.0,
    users: Annotated[int, typer.Option(help="users of the next-item workload")] = 6_040,
    items: Annotated[int, typer.Option(help="its items")] = 3_416,
    length: Annotated[int, typer.Option(help="its L")] = 200,
    batch: Annotated[int, typer.Option(help="its users a step")] = 128,
    requests: Annotated[int, typer.Option(help="requests of the click workload")] = 2_048,
    click_length: Annotated[int, typer.Option(help="its L")] = 1_000,
    click_batch: Annotated[int, typer.Option(help="its samples a step")] = 256,
    click_width: Annotated[int, typer.Option(help="its width of item and of category: D = 32 + 32 by default")] = 32,
    candidates: Annotated[list[int], typer.Option(help="its candidates a request")] = [1, 8],  # noqa: B006
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    request: Annotated[int, typer.Option(help="candidates of the request that each ranker scores when trained; 0: none")] = 200,
    only: Annotated[list[str], typer.Option(help="only cases in whose `WORKLOAD: MODEL, WHO` one of these is")] = [],  # noqa: B006
    rival: Annotated[list[str] | None, typer.Option(help="NAME=COMMAND, of the next-item workload; see above")] = None,
    click_rival: Annotated[list[str] | None, typer.Option(help="NAME=COMMAND, of the first click workload")] = None,
    out: Annotated[Path, typer.Option(help="where the figures go")] = Path("build/benchmarks/training.json"),
) -> None:
    """Measure training."""
    with TemporaryDirectory() as place:
        cases: list[tuple[str, str, str, Callable[[], Row]]] = []

        def add(workload: str, model: str, who: str, run: Callable[[], Row]) -> None:
            if not only or any(part.lower() in f"{workload}: {model}, {who}".lower() for part in only):
                cases.append((workload, model, who, run))

        def add_rivals(workload: str, commands: list[str] | None, folder: Path) -> None:
            for name, command in (entry.split("=", 1) for entry in commands or []):
                add(workload, "", name, partial(_run, [*shlex.split(command), str(folder)], threads))

        folder = Path(place) / "next_item"
        write_next_item_log(folder, users=users, items=items, longest=length)
        task = Task(folder=str(folder), length=length, batch=batch, seconds=seconds, threads=threads)
        for model, settings in NEXT_ITEM.items():
            add("next item", model, "ours", partial(measure, "ours", task, {**SEQUENCES, "max_history": length, **settings}))
        add("next item", "SASRec", "padded SASRec", partial(measure, "padded SASRec", task, PADDED))
        add_rivals("next item", rival, folder)
        for C in candidates:
            clicks, workload = Path(place) / f"clicks_{C}", f"click, C = {C}"
            write_ranking_log(clicks, requests=requests, candidates=C, items=CLICK_ITEMS, length=click_length)
            task = Task(folder=str(clicks), length=click_length, batch=click_batch, seconds=seconds, threads=threads, request=request)
            for model, settings in rankers().items():
                own = {"stage": "ranking", "width": click_width, "max_history": click_length, **settings}
                add(workload, model, "ours", partial(measure, "ours", task, own))
            add(workload, "din", "tiled DIN", partial(measure, "tiled DIN", task, {"width": click_width, **TILED}))
            if candidates[0] == C:
                add_rivals(workload, click_rival, clicks)
        rows = []
        for workload, model, who, run in tqdm(cases, disable=None):
            rows.append({"workload": workload, "model": model, "who": who, **run()})
            print(show(rows[-1:]).splitlines()[-1], flush=True)
    write_json(out, {"hardware": {**hardware(), "threads": threads}, "seconds": seconds, "rows": rows})
    print(show(rows))
    print(f"{json.dumps(hardware())}; written to {out}")


if __name__ == "__main__":
    typer.run(main)
