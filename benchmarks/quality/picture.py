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
SIZE = (9.0, 3.6)  # inches, of two panels by length
RANKED_WIDTH, LINE = 7.0, 0.24  # a model of a ranked picture takes a LINE of its height
COLOURS = {  # the same on every board
    **{"sam": "#1b6ca8", "sam_sqrt": "#8fbcdc", "ifa": "#d95f02", "din": "#2a9d5c", "mean_pooling": "#999999"},
    **{"twin": "#7b4fa3", "eta": "#c2a0d8", "sim": "#e08fb0", "dien": "#8c6d31", "sdim": "#c9a54e"},
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
    """The board's first two metrics side by side."""
    curves = curves_by_length(board, _current(rows))
    lengths = sorted({int(model.rsplit("_", 1)[1]) for models in curves.values() for model in models})
    figure = Figure(figsize=SIZE, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, metric in zip(panels, board.metrics, strict=False):
        for name in sorted(curves, key=lambda name: -_mean(rows, curves[name][-1], board.metrics[0])):
            x = [int(model.rsplit("_", 1)[1]) for model in curves[name]]
            y, spread = ([f(rows, model, metric) for model in curves[name]] for f in (_mean, _spread))
            axes.errorbar(x, y, yerr=spread, marker="o", markersize=4, capsize=2, color=COLOURS.get(name), label=name.replace("_", " "))
        axes.set(xscale="log", xlabel="events of the history that are read", ylabel=metric.upper())
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        _tidy(axes)
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _ranked(board: Board, rows: Rows) -> Figure:
    metric = board.metrics[0]
    order = sorted(_current(rows), key=lambda model: _mean(rows, model, metric))
    figure = Figure(figsize=(RANKED_WIDTH, 1 + LINE * len(order)), layout="constrained")
    axes = figure.subplots()
    y = list(range(len(order)))
    axes.errorbar(
        [_mean(rows, m, metric) for m in order], y, xerr=[_spread(rows, m, metric) for m in order], fmt="o", capsize=2, color="#1b6ca8", label="here"
    )
    papers = [(board.published[m][metric], i) for i, m in enumerate(order) if metric in board.published.get(m, {})]
    if papers:
        axes.plot(*zip(*papers, strict=True), "D", color="#d95f02", markerfacecolor="none", label="published")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    if board.baseline in order:
        axes.axvline(_mean(rows, board.baseline, metric), color="#999999", linestyle="--", linewidth=1)
    axes.set_yticks(y, [model.replace("_", " ") for model in order])
    axes.set(xlabel=metric.upper())
    _tidy(axes)
    return figure


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _current(rows: Rows) -> list[str]:
    """Models that were trained with the settings that the board has now: no others belong into one picture."""
    return [model for model, row in rows.items() if row["current"]]


def _mean(rows: Rows, model: str, metric: str) -> float:
    return float(rows[model]["metrics"][metric]["mean"])


def _spread(rows: Rows, model: str, metric: str) -> float:
    """Standard deviation over seeds; 0 of a single one."""
    return float(rows[model]["metrics"][metric]["std"] or 0)
