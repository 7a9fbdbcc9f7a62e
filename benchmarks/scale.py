"""Ingest and build_features from 10^5 events up: time, CPU time, peak memory, bytes on disk, and what each more event costs.

    python -m benchmarks.scale --events 100000 --events 1000000 --events 10000000
    python -m benchmarks.scale --events 100000000 --resume                             # an hour or so, and the disk that docs/scale.md names
    python -m benchmarks.scale --events 100000 --engine spark
    python -m benchmarks.scale --report                                                # the table and docs/images/scale.svg of what was measured

The log is that of benchmarks.ingest: a year of events, 200 a user, Zipf items, in Parquet; with `like_from` each event is an interaction and an
impression. Each step runs in a process of its own; memory and CPU time are summed over it and its children (Spark's JVM is one), looked at five
times a second, its disk (all that stands in the folder of that size: log, tables, outputs, what it spills) every two seconds. A line a minute says
how far it is. Results are kept by size, engine, shards and step in build/benchmarks/scale.json, so that a long series can be measured piece by
piece; with --resume what is there already is not made again.
"""

import datetime
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
import yaml

from benchmarks.ingest import COLUMNS, generate
from longtrail.files import read_json, write_json

STEPS = ("ingest", "features")
COMMANDS = {
    "ingest": ["components.ingest", "--params", "{params}", "--tables", "{folder}/tables"],
    "features": ["components.build_features", "--params", "{params}", "--tables", "{folder}/tables", "--validation", "{folder}/validation",
                 "--features", "{folder}/features"],
}  # fmt: skip
OUTPUTS = {"ingest": "tables", "features": "features"}
SHOWN = (
    ("seconds", "seconds"),
    ("cpu_seconds", "CPU seconds"),
    ("peak_mb", "peak memory, MB"),
    ("peak_disk_mb", "peak disk, MB"),
    ("output_mb", "output, MB"),
)
_PROGRESS = 60.0  # s between two lines


def measure(command: list[str], folder: Path) -> dict[str, Any]:
    """Run a module in a new interpreter: wall and CPU seconds, peak MB resident (mapped files count) of it and all its children, and of `folder`."""
    start = told = looked = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", *command])
    root = psutil.Process(child.pid)
    cpu: dict[int, float] = {}
    peak, disk = 0, _disk(folder)
    while child.poll() is None:
        resident = 0
        for process in _family(root):
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    cpu[process.pid] = times.user + times.system
                    resident += process.memory_info().rss
            except psutil.Error:
                continue
        peak = max(peak, resident)
        now = time.perf_counter()
        if now - looked > 2:
            disk, looked = max(disk, _disk(folder)), now
        if now - told > _PROGRESS:
            told = now
            print(
                f"  {now - start:7.0f} s {sum(cpu.values()):7.0f} s of CPU {resident / 1e6:7,.0f} MB, at most {peak / 1e6:7,.0f}; "
                f"disk at most {disk / 1e6:9,.0f} MB",
                flush=True,
            )
        time.sleep(0.2)
    seconds = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({child.returncode}) after {seconds:.0f} s, {sum(cpu.values()):.0f} s of CPU")
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(cpu.values()), 1),
        "peak_mb": round(peak / 1e6),
        "peak_disk_mb": round(disk / 1e6),
    }


def _disk(folder: Path) -> int:
    """Bytes that the files below `folder` take; some may vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).lstat().st_blocks * 512
    return total


def _family(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def prepare(folder: Path, events: int, engine: str, shards: int, memory_limit: str) -> Path:
    """The log of `events` events (made once) and a params.yaml for it; its path."""
    log = folder / "log"
    if not (log / "whole").is_file():
        shutil.rmtree(log, ignore_errors=True)
        log.mkdir(parents=True)
        generate(log, events, csv=False)
        (log / "whole").touch()
    write_json(folder / "validation" / "result.json", {"success": True, "expectations": []})
    values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    values["dataset"] = {"kind": "event_log", "source": str(log / "log.parquet"), "columns": COLUMNS, "like_from": 30.0}
    spark = {"master": "local[2]", "driver_memory": memory_limit.lower().removesuffix("b"), "shuffle_partitions": max(2, events // 500_000)}
    values["ingest"] = {"engine": engine, "memory_limit": memory_limit, "threads": 2, "spark": spark}
    values["features"] |= {"history_shards": shards}
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def run(folder: Path, events: int, step: str, engine: str, shards: int, memory_limit: str) -> dict[str, Any]:
    """One step of one size, measured."""
    folder = folder / f"{events}"
    params = prepare(folder, events, engine, shards, memory_limit)
    row = measure([part.format(params=params, folder=folder) for part in COMMANDS[step]], folder)
    output = sum(file.stat().st_size for file in (folder / OUTPUTS[step]).rglob("*") if file.is_file())
    sizes = {"log_mb": round((folder / "log" / "log.parquet").stat().st_size / 1e6, 1), "output_mb": round(output / 1e6, 1)}
    return {"events": events, "step": step, "engine": engine, "shards": shards, "memory_limit": memory_limit, **row, **sizes, **machine()}


def machine() -> dict[str, Any]:
    """When and where."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.machine()
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "cpu": f"{os.cpu_count()} × {model}",
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "load": round(psutil.getloadavg()[0], 1),
        "nice": os.nice(0),
    }


def slopes(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """For each two neighbouring sizes: (cost of one more event in millionths of the column's unit, exponent of events that fits them)."""
    rows = sorted(rows, key=lambda row: row["events"])
    return [
        ((b[name] - a[name]) / (b["events"] - a["events"]) * 1e6, float(np.log(b[name] / a[name]) / np.log(b["events"] / a["events"])))
        if name in a and name in b
        else (float("nan"), float("nan"))
        for a, b in pairwise(rows)
    ]


def report(rows: list[dict[str, Any]]) -> str:
    """The tables of docs/scale.md."""
    lines = [f"| events | step | engine | shards | {' | '.join(title for _, title in SHOWN)} | load | commit |", "|" + "---|" * (len(SHOWN) + 6)]
    for row in sorted(rows, key=lambda r: (r["engine"], r["step"] != "ingest", r["shards"], r["events"])):
        cells = " | ".join(f"{row[name]:,}" if name in row else "" for name, _ in SHOWN)
        lines.append(f"| {row['events']:,} | {row['step']} | {row['engine']} | {row['shards']} | {cells} | {row['load']} | {row['commit']} |")
    lines += ["", "| step, engine, shards | from → to | " + " | ".join(f"{title}: per million more (exponent)" for _, title in SHOWN) + " |"]
    lines.append("|" + "---|" * (len(SHOWN) + 2))
    for key, group in _groups(rows):
        steps = list(pairwise(sorted(row["events"] for row in group)))
        columns = [slopes(group, name) for name, _ in SHOWN]
        for place, (low, high) in enumerate(steps):
            cells = " | ".join("" if np.isnan(column[place][0]) else f"{column[place][0]:,.3g} ({column[place][1]:.2f})" for column in columns)
            lines.append(f"| {', '.join(map(str, key))} | {low:,} → {high:,} | {cells} |")
    return "\n".join(lines)


def _groups(rows: list[dict[str, Any]]) -> Iterable[tuple[tuple[str, str, int], list[dict[str, Any]]]]:
    keys = sorted({(row["step"], row["engine"], row["shards"]) for row in rows}, key=lambda key: (key[1], key[0] != "ingest", key[2]))
    return [(key, [row for row in rows if (row["step"], row["engine"], row["shards"]) == key]) for key in keys]


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """CPU seconds, memory and output by events, both axes logarithmic."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, [pair for pair in SHOWN if pair[0] in ("cpu_seconds", "peak_mb", "output_mb")], strict=True):
        for key, group in _groups(rows):
            ordered = sorted(group, key=lambda row: row["events"])
            axis.loglog(
                [row["events"] for row in ordered], [row[name] for row in ordered], marker="o", label=f"{key[0]}, {key[1]}, {key[2]} shard(s)"
            )
        axis.set_xlabel("events")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def _results(out: Path) -> list[dict[str, Any]]:
    return read_json(out) if out.is_file() else []


def _others(out: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in _results(out) if any(row[part] != value for part, value in key.items())]


def main(
    events: Annotated[list[int], typer.Option(help="rows of the log; may be given again")] = [],  # noqa: B006
    engine: Annotated[str, typer.Option(help="duckdb or spark: ingest.engine")] = "duckdb",
    step: Annotated[list[str], typer.Option(help="ingest or features; default: both")] = list(STEPS),  # noqa: B006
    shards: Annotated[int, typer.Option(help="features.history_shards")] = 1,
    memory_limit: Annotated[str, typer.Option(help="ingest.memory_limit, and Spark's driver memory")] = "2GB",
    folder: Annotated[Path, typer.Option(help="takes logs and outputs, which stay until it is removed")] = Path("build/benchmarks/scale"),
    out: Annotated[Path, typer.Option(help="results, by size, engine, shards and step")] = Path("build/benchmarks/scale.json"),
    picture: Annotated[Path, typer.Option(help="the plot of --report")] = Path("docs/images/scale.svg"),
    resume: Annotated[bool, typer.Option(help="leave a step out whose output and result are there")] = False,
    show: Annotated[bool, typer.Option("--report", help="print the tables and draw the plot of all results")] = False,
) -> None:
    """Measure, and keep what was measured."""
    for size in events:
        for name in step:
            key = {"events": size, "step": name, "engine": engine, "shards": shards}
            if resume and len(_others(out, key)) < len(_results(out)) and (folder / f"{size}" / OUTPUTS[name]).is_dir():
                print(f"{size:>13,} {name:9} {engine:7} is there", flush=True)
                continue
            row = run(folder.absolute(), size, name, engine, shards, memory_limit)
            write_json(out, [*_others(out, key), row])
            print(f"{size:>13,} {name:9} {engine:7} {row['seconds']:>9,} s {row['cpu_seconds']:>9,} s of CPU {row['peak_mb']:>7,} MB", flush=True)
    if show:
        rows = read_json(out)
        print(report(rows))
        plot(rows, picture)


if __name__ == "__main__":
    typer.run(main)
