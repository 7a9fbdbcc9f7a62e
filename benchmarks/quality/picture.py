"""From cells to a board's picture: how models gain by longer histories where they were run at several lengths, otherwise one model a line."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.quality.board import Board
from longtrail.files import atomic_file

LENGTHS = 3  # a model has at least so many to be a curve
SIZE = (7.0, 4.0)  # inches; a model of a ranked picture takes LINE of the height
LINE = 0.24
COLOURS = {  # the same on every board
    **{"sam": "#1b6ca8", "ifa": "#d95f02", "din": "#2a9d5c", "mean_pooling": "#999999"},
    **{"twin": "#7b4fa3", "eta": "#c2a0d8", "sim": "#e08fb0", "dien": "#8c6d31"},
}

Rows = dict[str, dict[str, Any]]


def save_picture(board: Board, rows: Rows, file: Path) -> None:
    """An SVG file, the same for the same rows, of the models that were run with the board's settings."""
    with matplotlib.rc_context(
        {"svg.hashsalt": "longtrail", "svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Arial"]}
    ):
        figure = _by_length(board, rows) if curves_by_length(board, list(board.models)) else _ranked(board, rows)
        with atomic_file(file) as aside:
            figure.savefig(aside, format="svg", metadata={"Date": None})


def curves_by_length(board: Board, models: Iterable[str]) -> dict[str, list[str]]:
    """Of `models` those that are called NAME_L by their length, shortest first: name → models, for names with LENGTHS lengths or more."""
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for model in models:
        named = re.fullmatch(r"(.+)_(\d+)", model)
        if named and getattr(board.models[model], "max_history", None) == int(named[2]):
            found[named[1]].append((int(named[2]), model))
    return {name: [model for _, model in sorted(models)] for name, models in found.items() if len(models) >= LENGTHS}


def _by_length(board: Board, rows: Rows) -> Figure:
    figure, axes = _figure(SIZE[1])
    curves = curves_by_length(board, _current(rows))
    lengths = sorted({int(model.rsplit("_", 1)[1]) for models in curves.values() for model in models})
    ends = {name: _mean(board, rows, models[-1]) for name, models in curves.items()}
    for name in sorted(curves, key=lambda name: -ends[name]):
        x = [int(model.rsplit("_", 1)[1]) for model in curves[name]]
        y, spread = ([f(board, rows, model) for model in curves[name]] for f in (_mean, _spread))
        axes.errorbar(x, y, yerr=spread, marker="o", markersize=4, capsize=2, color=COLOURS.get(name), label=name.replace("_", " "))
    axes.set(xscale="log", xlabel="events of the history that are read", ylabel=board.metrics[0].upper())
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _ranked(board: Board, rows: Rows) -> Figure:
    metric = board.metrics[0]
    order = sorted(_current(rows), key=lambda model: _mean(board, rows, model))
    figure, axes = _figure(1 + LINE * len(order))
    y = list(range(len(order)))
    axes.errorbar(
        [_mean(board, rows, m) for m in order], y, xerr=[_spread(board, rows, m) for m in order], fmt="o", capsize=2, color="#1b6ca8", label="here"
    )
    papers = [(board.published[m][metric], i) for i, m in enumerate(order) if metric in board.published.get(m, {})]
    if papers:
        axes.plot(*zip(*papers, strict=True), "D", color="#d95f02", markerfacecolor="none", label="published")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    if board.baseline in order:
        axes.axvline(_mean(board, rows, board.baseline), color="#999999", linestyle="--", linewidth=1)
    axes.set_yticks(y, [model.replace("_", " ") for model in order])
    axes.set(xlabel=metric.upper())
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _current(rows: Rows) -> list[str]:
    """Models that were trained with the settings that the board has now: no others belong into one picture."""
    return [model for model, row in rows.items() if row["current"]]


def _mean(board: Board, rows: Rows, model: str) -> float:
    return float(rows[model]["metrics"][board.metrics[0]]["mean"])


def _spread(board: Board, rows: Rows, model: str) -> float:
    """Standard deviation over seeds; 0 of a single one, which draws no bar."""
    return float(rows[model]["metrics"][board.metrics[0]]["std"] or 0)
