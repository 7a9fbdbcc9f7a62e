"""The page and the pictures of an evaluation: metrics with intervals, slices, calibration or hit rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from components.report_page import Section, figure_html, page, table_html

_COLOURS = {"valid": "#9aa7b8", "test": "#35506e"}
_NAMES = {"valid": "validation", "test": "test"}


def write_page(folder: Path, evaluation: dict[str, Any], trained: Sequence[Sequence[str]]) -> None:
    """report.html, and each of its figures as a PNG beside it. `trained`: rows of components.trained_table."""
    from components.evaluate import headline, main_metric

    metric = main_metric(evaluation)
    figures = {"metrics": metrics_figure(evaluation), "slices": slices_figure(evaluation, metric), "curve": curve_figure(evaluation)}
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
    confidence = f"{evaluation['confidence']:.0%}"
    ranking = evaluation["stage"] == "ranking"
    curve = (
        ("Calibration", "Click rate by predicted probability, ten bins of equal numbers of rows. On the dashed line, promise and outcome agree.")
        if ranking
        else ("Hit rate", "Share of targets among the first k of the whole catalogue, less what is left out as seen (retrieval.exclude_seen).")
    )
    sections = [
        Section("Metrics", figure_html(figures["metrics"], "metrics with intervals") + metrics_table(evaluation), _counts(evaluation)),
        Section(
            f"{metric} by slice",
            figure_html(figures["slices"], f"{metric} by slice"),
            f"Bars are {confidence} intervals, resampled by user (test split).",
        ),
        Section(curve[0], figure_html(figures["curve"], curve[0].lower()), curve[1]),
        Section("All slices, test split", slices_table(evaluation)),
        Section("Cost of one request", cost_table(evaluation["cost"]), evaluation["cost"]["measured"]["how"] + "."),
        Section("What was trained", table_html(["", "value"], trained, stack=True), "From model.json and lineage.json of the model's folder."),
    ]
    title = f"{evaluation['model']} ({evaluation['stage']}, {evaluation['kind']})"
    (folder / "report.html").write_text(page(title, sections, lead=headline(evaluation)), encoding="utf-8")


def interval_text(estimate: dict[str, Any]) -> str:
    """0.7123 (0.7001 to 0.7240), or why it is undefined."""
    if estimate["value"] is None:
        return f"– ({estimate.get('reason', 'undefined')})"
    value = f"{estimate['value']:.4f}"
    return value if estimate["low"] is None else f"{value} ({estimate['low']:.4f} to {estimate['high']:.4f})"


def metrics_table(evaluation: dict[str, Any]) -> str:
    splits = evaluation["splits"]
    names = list(splits["test"]["metrics"])
    rows = [[name, *(interval_text(splits[split]["metrics"][name]) for split in splits)] for name in names]
    return table_html(["metric", *(_NAMES[split] for split in splits)], rows)


def slices_table(evaluation: dict[str, Any]) -> str:
    parts = evaluation["splits"]["test"]["slices"]
    names = list(parts[0]["metrics"]) if parts else []
    return table_html(
        ["slice", "bucket", "rows", *names], [[p["slice"], p["bucket"], p["rows"], *(interval_text(p["metrics"][n]) for n in names)] for p in parts]
    )


def cost_table(cost: dict[str, Any]) -> str:
    measured = cost["measured"]
    return table_html(
        ["figure", "value"],
        [
            ["latency, p50", f"{cost['latency_ms']['p50']:.3f} ms"],
            ["latency, p99", f"{cost['latency_ms']['p99']:.3f} ms"],
            ["processor time of all threads, p50", f"{cost['processor_ms']['p50']:.3f} ms"],
            ["processor time of all threads, p99", f"{cost['processor_ms']['p99']:.3f} ms"],
            ["history length of the request", f"{measured['history']:,}"],
            ["candidates", f"{measured['candidates']:,}"],
            ["requests timed", f"{measured['requests']:,}"],
            ["CPU threads", f"{measured['threads']}"],
            ["peak memory of the process", f"{cost['peak_memory_bytes'] / 1e6:,.0f} MB"],
            ["of it before the model was loaded", f"{measured['base_memory_bytes'] / 1e6:,.0f} MB"],
            ["model on disk", f"{cost['model_bytes']:,} bytes"],
        ],
    )


def _counts(evaluation: dict[str, Any]) -> str:
    parts = []
    for split, result in evaluation["splits"].items():
        counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in result.items() if isinstance(value, int))
        parts.append(f"{_NAMES[split]}: {counts}")
    return "; ".join(parts) + f". Intervals: {evaluation['confidence']:.0%}, resampled by user."


# ---------------------------------------------------------------- figures


def metrics_figure(evaluation: dict[str, Any]) -> Figure:
    """A small panel a metric, because their scales differ; validation beside test."""
    names = list(evaluation["splits"]["test"]["metrics"])
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.3 * columns, 1.9 * rows), layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1)
        estimates = [result["metrics"][name] for result in evaluation["splits"].values()]
        _intervals(axes, range(len(estimates)), estimates, [_COLOURS[split] for split in evaluation["splits"]])
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(len(estimates)), [_NAMES[split] for split in evaluation["splits"]], fontsize=8)
        axes.set_xlim(-0.6, len(estimates) - 0.4)
    return figure


def slices_figure(evaluation: dict[str, Any], metric: str) -> Figure:
    """A panel a slice; the dashed line is the whole test split."""
    result = evaluation["splits"]["test"]
    slices = list(dict.fromkeys(part["slice"] for part in result["slices"]))
    figure = Figure(figsize=(9, 1.2 + 2.4 * -(-max(len(slices), 1) // 2)), layout="constrained")
    for place, name in enumerate(slices):
        axes = figure.add_subplot(-(-len(slices) // 2), 2, place + 1)
        parts = [part for part in result["slices"] if part["slice"] == name]
        _intervals(axes, range(len(parts)), [part["metrics"][metric] for part in parts], [_COLOURS["test"]] * len(parts))
        if result["metrics"][metric]["value"] is not None:
            axes.axhline(result["metrics"][metric]["value"], color="#b3372e", linestyle="--", linewidth=1)
        axes.set_title(name, fontsize=10)
        axes.set_xticks(range(len(parts)), [f"{part['bucket']}\nn={part['rows']:,}" for part in parts], fontsize=7)
        axes.set_xlim(-0.6, len(parts) - 0.4)
    return figure


def curve_figure(evaluation: dict[str, Any]) -> Figure:
    """Calibration of a ranker, hit rate by k of a retriever."""
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.add_subplot()
    ranking = evaluation["stage"] == "ranking"
    for split, curve in evaluation["curves"].items():
        xs = [point["predicted" if ranking else "k"] for point in curve]
        ys = [point["value"] for point in curve]
        axes.plot(xs, ys, color=_COLOURS[split], linewidth=1.2, label=_NAMES[split])
        _intervals(axes, xs, curve, [_COLOURS[split]] * len(xs))
    if ranking:
        axes.axline((0, 0), slope=1, color="#b3372e", linestyle="--", linewidth=1)
        axes.set(xlabel="predicted click probability", ylabel="click rate")
    else:
        axes.set(xscale="log", xlabel="k", ylabel="hit rate", ylim=(0, None))
    axes.legend(frameon=False, fontsize=9)
    return figure


def _intervals(axes: Axes, xs: Sequence[float], estimates: Sequence[dict[str, Any]], colours: Sequence[str]) -> None:
    for x, estimate, colour in zip(xs, estimates, colours, strict=True):
        if estimate["value"] is None:
            axes.annotate("–", (x, 0.5), xycoords=("data", "axes fraction"), ha="center", color=colour)
            continue
        if estimate["low"] is not None:
            axes.vlines(x, estimate["low"], estimate["high"], color=colour, linewidth=1.5)
        axes.plot([x], [estimate["value"]], "o", color=colour, markersize=4)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
