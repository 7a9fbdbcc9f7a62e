"""The picture of docs/retrieval.md from the results of benchmarks.retrieval: python -m benchmarks.retrieval_chart."""

from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import typer
from matplotlib.ticker import NullLocator

from longtrail.files import atomic_file, read_json

SHOWN = {
    "torch": ("torch matmul + topk", "#999999", "--"),
    "faiss flat": ("faiss flat", "#bbbbbb", "--"),
    "faiss pq": ("faiss PQ, same codes", "#d95f02", "-"),
    "pqtopk": ("Longtrail pqtopk", "#1b6ca8", "-"),
}


def main(
    results: Annotated[Path, typer.Option(help="written by benchmarks.retrieval")] = Path("build/benchmarks/retrieval.json"),
    out: Annotated[Path, typer.Option(help="picture")] = Path("docs/images/retrieval.svg"),
) -> None:
    """Median time of one user's exact top 10 by catalogue size, 8 splits, 2 threads; trained codes as points."""
    plt.rcParams["svg.hashsalt"] = "longtrail"
    rows = [r for r in read_json(results)["rows"] if (r["splits"], r["threads"], r["users"], r["k"]) == (8, 2, 1, 10)]
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for engine, (label, colour, line) in SHOWN.items():
        points = sorted((r["items"], r["p50_ms"]) for r in rows if r["engine"] == engine and r["codes"] == "random")
        axes.plot(*zip(*points, strict=True), line, color=colour, marker="o", markersize=3, label=label)
    for engine, marker in (("pqtopk", "s"), ("recjpq_prune", "*")):
        points = [(r["items"], r["p50_ms"]) for r in rows if r["engine"] == engine and r["codes"] == "trained"]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color="#0a3d62", markersize=8, label=f"Longtrail {engine}, trained codes", linestyle="none")
    axes.set(xscale="log", yscale="log", xlabel="items", ylabel="median, ms")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    with atomic_file(out) as aside:
        figure.savefig(aside, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
