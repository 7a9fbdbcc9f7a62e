"""The validation report: one page without network (Great Expectations' own Data Docs fetch their style sheets)."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import duckdb
from matplotlib.figure import Figure

from components.report_page import Section, badge, figure_html, page, table_html

_DAILY = "SELECT date_trunc('day', timestamp) AS day, count(*) AS n FROM i GROUP BY day ORDER BY day"
_LENGTHS = "SELECT n, count(*) AS users FROM (SELECT count(*) AS n FROM i GROUP BY user_id) GROUP BY n ORDER BY n"


def validation_page(db: duckdb.DuckDBPyConnection, result: dict[str, Any]) -> str:
    """The page. `db` has the views of components.validate; a log too broken to be plotted goes without plots."""
    failed = [o for o in result["expectations"] if not o["success"]]
    held = len(result["expectations"]) - len(failed)
    stopped = f"{result['critical_failures']} critical expectation(s) failed: the pipeline stops here."
    lead = f"{held} expectations hold, {result['warnings']} warning(s)." if result["success"] else stopped
    tone = "bad" if not result["success"] else "warn" if failed else "good"
    figures = [[name.replace("_", " "), int(value) if float(value).is_integer() else float(value)] for name, value in result["summary"].items()]
    sections = [Section("The log in figures", table_html(["figure", "value"], figures))]
    if failed:
        sections.insert(0, Section("What failed", _outcomes(failed)))
    with suppress(duckdb.Error):  # a missing column is what "What failed" is about
        sections.append(Section("The log over time, and its histories", figure_html(_plots(db), "events a day, and users by history length")))
    sections.append(Section("Every expectation", _outcomes(result["expectations"])))
    return page("Validation", sections, lead=lead, tone=tone)


def _outcomes(outcomes: Sequence[dict[str, Any]]) -> str:
    rows = []
    for outcome in outcomes:
        tone = "good" if outcome["success"] else "bad" if outcome["severity"] == "critical" else "warn"
        seen = "" if outcome["observed"] is None else str(outcome["observed"])
        examples = ", ".join(outcome["examples"])
        label = "holds" if outcome["success"] else outcome["severity"]
        rows.append([badge(label, tone), outcome["name"], outcome["expected"], seen, examples])
    return table_html(["", "expectation", "expected", "seen", "examples"], rows)


def _plots(db: duckdb.DuckDBPyConnection) -> Figure:
    daily = db.execute(_DAILY).fetchnumpy()
    lengths = db.execute(_LENGTHS).fetchnumpy()
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.fill_between(daily["day"], daily["n"], color="#35506e", alpha=0.8, linewidth=0)
    left.set(title="interactions a day", ylim=(0, None))
    left.tick_params(axis="x", rotation=30)
    right.hist(lengths["n"], weights=lengths["users"], bins=30, color="#35506e")
    right.set(title="users by events in the log", xlabel="events", ylabel="users")
    return figure
