"""What a service logged, through the expectations that the training data had to meet; and the page that shows its drift.

The service's offline tool `python -m serving.drift` gives plain tables and figures: nothing here knows the service.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import escape
from matplotlib.figure import Figure

from components.expectations import Expectation, distribution_expectations, schema_expectations
from components.report_page import Section, badge, figure_html, page, paragraph, table_html
from components.validate import evaluate_expectations
from longtrail.config import ValidationSettings
from longtrail.schema import EXAMPLES, IMPRESSIONS, INTERACTIONS

TABLES = (INTERACTIONS, IMPRESSIONS, EXAMPLES)
FIGURES = ("click_rate", "top_item_share", "repeated_interactions", "median_history_length")  # of the log's distributions, those a service's log has
_COLOURS = {"training": "#b7c3d0", "packaging": "#35506e", "served": "#d97a2b"}


def check_served(tables: Mapping[str, pa.Table], summary: Mapping[str, float], settings: ValidationSettings, docs: Path) -> list[dict[str, Any]]:
    """Outcomes of Great Expectations, as components.validate has them, for tables by name (of TABLES) and figures of FIGURES; Data Docs in `docs`."""
    chosen: list[Expectation] = [each for table in TABLES if table.name in tables for each in schema_expectations(table)]
    figures = {name: summary[name] for name in FIGURES if name in summary}
    chosen += [each for each in distribution_expectations(settings, has_impressions=True) if each.column in figures]
    with tempfile.TemporaryDirectory(prefix="longtrail-served-") as folder:
        for name, table in tables.items():
            pq.write_table(table, Path(folder) / f"{name}.parquet")
        return evaluate_expectations(chosen, Path(folder), figures, docs)


def drift_page(result: dict[str, Any]) -> str:
    """`result` is serving.drift's JSON."""
    failed = [each for each in result["expectations"] if not each["success"]]
    critical = [each for each in failed if each["severity"] == "critical"]
    if result["alarms"] or critical:
        lead, tone = f"{len(result['alarms'])} drift alarm(s), {len(critical)} critical expectation(s) failed.", "bad"
    elif result["requests"] < result["settings"]["min_requests"]:
        lead, tone = f"Only {result['requests']} lists: too few to raise an alarm (drift.min_requests).", "warn"
    else:
        lead, tone = f"No drift in {result['requests']:,} lists.", "good"
    sections = []
    if result["alarms"]:
        sections.append(Section("What has drifted", "<ul>" + "".join(f"<li>{escape(alarm)}</li>" for alarm in result["alarms"]) + "</ul>"))
    sections += [
        Section("Features", _features(result) + figure_html(_histograms(result["features"]), "shares of each feature's bins"), _FEATURES_NOTE),
        Section(
            "Users, items and clicks", _measures(result) + figure_html(_reliability(result["reliability"]), "clicks against predictions"), _CLICKS
        ),
        Section("Expectations of the training data, on what was served", _expectations(result["expectations"])),
        Section("How it was computed", paragraph(_HOW)),
    ]
    return page("Drift of the service", sections, lead=lead, tone=tone)


_FEATURES_NOTE = (
    "The index against packaging raises the alarm: it compares with the newest requests of the log, read as the service reads them. That against "
    "training is for information: counts grow along the log, so it is rarely small. Candidates that the retriever chose and those that callers gave "
    "are compared each with their own past."
)
_CLICKS = "A list counts for the clicks once it had drift.click_minutes to be clicked."
_HOW = (
    "The population stability index is the sum over bins of (q - p) ln(q / p), half an observation added to each bin. Its limit is drift.threshold "
    "plus what chance exceeds with probability drift.false_alarms: a quantile of chi-squared with (bins - 1) degrees of freedom, times (1/n + 1/m), "
    "where n and m count users effectively (Kish): a user's requests are alike and are not so many observations. Clicks deviate where they differ "
    "from the sum of the predicted probabilities by more than drift.calibration of it and by more than four standard deviations."
)


def _features(result: dict[str, Any]) -> str:
    rows = []
    for name, each in result["features"].items():
        drifted = each["psi"] > each["limit"]
        word = badge("drifted", "bad") if drifted else badge("stable", "good")
        rows.append([word, name, float(each["psi"]), float(each["limit"]), float(each["psi_training"]), round(each["observations"])])
    return table_html(["", "feature", "index against packaging", "limit", "against training", "effective observations"], rows)


def _measures(result: dict[str, Any]) -> str:
    return table_html(["measure", "value"], [[name.replace("_", " "), float(value)] for name, value in result["measures"].items()])


def _expectations(outcomes: list[dict[str, Any]]) -> str:
    rows = []
    for outcome in sorted(outcomes, key=lambda each: each["success"]):
        tone = "good" if outcome["success"] else "bad" if outcome["severity"] == "critical" else "warn"
        label = "holds" if outcome["success"] else outcome["severity"]
        rows.append([badge(label, tone), outcome["name"], outcome["expected"], "" if outcome["observed"] is None else str(outcome["observed"])])
    return table_html(["", "expectation", "expected", "seen"], rows)


def _histograms(features: Mapping[str, Any]) -> Figure:
    columns = 3
    lines = max(-(-len(features) // columns), 1)
    figure = Figure(figsize=(9, 2.2 * lines), layout="constrained")
    axes = np.ravel(figure.subplots(lines, columns, squeeze=False))
    for ax, (name, each) in zip(axes, features.items(), strict=False):
        width = 0.8 / len(_COLOURS)
        for place, (kind, colour) in enumerate(_COLOURS.items()):
            shares = np.asarray(each["histograms"][kind], float)
            ax.bar(np.arange(len(shares)) + (place - 1) * width, shares / max(shares.sum(), 1), width, color=colour, label=kind)
        edges = ["", *[f"{edge:.3g}" for edge in each["edges"]]]
        ax.set_xticks(np.arange(len(edges)) - 0.5, edges, fontsize=6, rotation=45)
        ax.set_title(name, fontsize=9)
        ax.tick_params(axis="y", labelsize=7)
    for ax in axes[len(features) :]:
        ax.set_visible(False)
    if features:
        axes[0].legend(fontsize=7)
    return figure


def _reliability(bins: list[dict[str, float]]) -> Figure:
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    ax = figure.subplots()
    predicted, clicked = ([each[name] for each in bins] for name in ("predicted", "clicked"))
    errors = [2 * (max(each["clicked"] * (1 - each["clicked"]), 1e-9) / max(each["shown"], 1)) ** 0.5 for each in bins]
    top = max([*predicted, *clicked, 0.01]) * 1.1
    ax.plot([0, top], [0, top], color="#b7c3d0", linewidth=1)
    ax.errorbar(predicted, clicked, yerr=errors, fmt="o", color=_COLOURS["packaging"], markersize=4, capsize=2)
    ax.set(xlabel="predicted P(click)", ylabel="share clicked", title="items shown, by tenth of the prediction", xlim=(0, top), ylim=(0, top))
    return figure
