"""What was measured: a table, a picture, and how it came about."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from longtrail.files import atomic_file

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"sam": "#1b6ca8", "ifa": "#1b9e77", "fastapi sam": "#d95f02", "fastapi ifa": "#e6ab02", "tiled din": "#7570b3", "empty": "#999999"}
Rows = Sequence[dict[str, Any]]


def table(rows: Rows) -> str:
    """Markdown."""
    lines = [
        "| endpoint | store | L | candidates | load | requests | p50 ms | p99 ms | p99.9 ms | fallbacks | refused |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        load = "in sequence" if row["rate"] is None else f"{row['rate']:g} a second"
        figures = " | ".join("–" if row.get(name) is None else f"{row[name]:.1f}" for name in ("p50_ms", "p99_ms", "p999_ms"))
        length = "–" if row["length"] is None else f"{row['length']:,}"
        refused = sum(row["refused"].values())
        about = [row["endpoint"], row["store"] or "–", length, row["candidates"], load, row["requests"], figures, row["fallbacks"], refused]
        lines.append(f"| {' | '.join(map(str, about))} |")
    return "\n".join(lines)


def chart(rows: Rows, path: Path) -> None:
    """p99 against the rate of requests, at the length and number of candidates that most rows have; and p50 in sequence against the length."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "longtrail"
    store = "sqlite" if any(row["store"] == "sqlite" for row in rows) else rows[0]["store"]
    rows = [row for row in rows if row["store"] in (store, None) and row["requests"]]
    figure, (by_rate, by_length) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    for endpoint in dict.fromkeys(row["endpoint"] for row in rows):
        own = [row for row in rows if row["endpoint"] == endpoint and row["candidates"] == 200]
        style = {"color": COLOURS.get(endpoint, "#333333"), "marker": "o", "markersize": 3, "label": endpoint}
        rates = sorted((row["rate"], row["p99_ms"]) for row in own if row["rate"] and row["length"] in (1_000, None))
        lengths = sorted((row["length"], row["p50_ms"]) for row in own if row["rate"] is None and row["length"])
        if rates:
            by_rate.plot(*zip(*rates, strict=True), **style)
        if lengths:
            by_length.plot(*zip(*lengths, strict=True), **style)
    by_rate.set(xlabel="requests a second", ylabel="p99, ms", yscale="log", title="L = 1,000, 200 candidates")
    by_rate.axhline(30, color="#cccccc", linewidth=0.8)
    by_length.set(xlabel="events of the history", ylabel="p50, ms", xscale="log", yscale="log", title="one request at a time")
    for axes in (by_rate, by_length):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as aside:
        figure.savefig(aside, format="svg", metadata={"Date": None})
    plt.close(figure)


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
