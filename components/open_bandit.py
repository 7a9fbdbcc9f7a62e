"""Open Bandit: two real policies, each judged from the other's log, beside what it really got. Not a step of the pipeline."""

import logging
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from components.command import run
from longtrail.config import IngestSettings, OpenBanditDataset
from longtrail.files import atomic_directory, write_json

log = logging.getLogger("open_bandit")

Campaign = Literal["all", "men", "women"]
POLICIES: tuple[Literal["random", "bts"], ...] = ("random", "bts")
MIN_EFFECTIVE_ROWS = 100  # below it the intervals are not to be relied on
SHOWN = {"ips": "IPS", "snips": "self-normalised", "dr": "doubly robust", "replay": "replay"}  # report.json holds every estimator
TITLE = "Open Bandit: each policy judged from the other's log"


def open_bandit(
    source: Annotated[str, typer.Option(help="'small' (10,000 rows a log, from the package index), or the dataset's folder or zip")] = "small",
    out: Annotated[Path, typer.Option(help="folder to write: report.json, report.html")] = Path("build/open_bandit"),
    confidence: Annotated[float, typer.Option(help="of the intervals", min=0.5, max=0.999)] = 0.95,
) -> None:
    """Estimate the click-through rate of Thompson sampling (bts) from the uniform policy's log and vice versa, for all three campaigns."""
    campaigns: tuple[Campaign, ...] = ("all", "men", "women")
    results = [result for campaign in campaigns for result in judge(source, campaign, confidence)]
    with atomic_directory(out) as folder:
        write_json(folder / "report.json", {"confidence": confidence, "results": results})
        (folder / "report.html").write_text(html(results, confidence), encoding="utf-8")
    for result in results:
        estimate = result["estimates"]["dr"]
        log.info(
            "%s: %s from the log of %s: %.4f (%.4f to %.4f); it really got %.4f",
            result["campaign"], result["target"], result["log"], estimate["value"], estimate["low"], estimate["high"], result["real"]["value"],
        )  # fmt: skip
    log.info("report: %s", out / "report.html")


def judge(source: str, campaign: Campaign, confidence: float) -> list[dict[str, Any]]:
    """Both directions of one campaign, as JSON. Raises DatasetError where the data is not there or not in its layout."""
    from longtrail.ingest import ingest
    from longtrail.offpolicy.two_logs import cross_estimate

    with tempfile.TemporaryDirectory() as folder:
        for policy in POLICIES:
            ingest(OpenBanditDataset(source=source, policy=policy, campaign=campaign), IngestSettings(), Path(folder) / policy)
        logs, items, positions = read_logs({policy: Path(folder) / policy for policy in POLICIES})
    pairs = [(logs["random"], logs["bts"]), (logs["bts"], logs["random"])]
    return [{"campaign": campaign, **cross_estimate(*pair, items=items, positions=positions, confidence=confidence).json()} for pair in pairs]


def read_logs(tables: dict[str, Path]) -> tuple[dict[str, Any], int, int]:
    """Ingested logs of several policies with one numbering of items, users and positions: (logs by name, items, positions)."""
    import numpy as np
    import pyarrow.parquet as pq

    from longtrail.offpolicy.two_logs import PolicyLog

    read: dict[str, dict[str, Any]] = {}
    for policy, folder in tables.items():
        keys = {}
        for entity in ("item", "user"):
            rows = pq.read_table(folder / f"{entity}s.parquet", columns=[f"{entity}_id", f"{entity}_key"])
            keys[entity] = np.empty(rows.num_rows + 1, dtype=object)
            keys[entity][rows[0].to_numpy()] = rows[1].to_numpy(zero_copy_only=False)
        rows = pq.read_table(folder / "impressions.parquet")
        read[policy] = {
            "item": keys["item"][rows["item_id"].to_numpy()].astype(str),
            "user": keys["user"][rows["user_id"].to_numpy()].astype(str),
            "position": rows["position"].to_numpy().astype(np.int64),
            "click": rows["click"].to_numpy().astype(np.float64),
            "propensity": rows["propensity"].to_numpy(),
        }
    codes = {}
    for name in ("item", "user", "position"):
        values, code = np.unique(np.concatenate([columns[name] for columns in read.values()]), return_inverse=True)
        codes[name] = (len(values), iter(np.split(code, np.cumsum([len(columns[name]) for columns in read.values()])[:-1])))
    logs = {
        policy: PolicyLog(
            name=policy,
            items_N=next(codes["item"][1]),
            users_N=next(codes["user"][1]),
            positions_N=next(codes["position"][1]),
            clicks_N=columns["click"],
            propensities_N=columns["propensity"],
        )
        for policy, columns in read.items()
    }
    return logs, codes["item"][0], codes["position"][0]


def html(results: list[dict[str, Any]], confidence: float) -> str:
    """One self-contained page."""
    from components.report_page import Section, badge, figure_html, page, paragraph, table_html

    inside = sum(r["gap"]["dr"]["low"] <= 0 <= r["gap"]["dr"]["high"] for r in results)
    rows = [
        [
            badge("usable", "good") if r["effective_rows"] >= MIN_EFFECTIVE_ROWS else badge("too few", "warn"),
            r["campaign"],
            r["target"],
            r["log"],
            *(_cell(r, name) for name in SHOWN),
            f"{r['real']['value']:.2%} ({r['real']['low']:.2%} to {r['real']['high']:.2%})",
            f"{r['effective_rows']:,.0f}",
            f"{r['mean_weight']:.2f}",
        ]
        for r in results
    ]
    headers = ["", "campaign", "policy judged", "from the log of", *SHOWN.values(), "what it really got", "effective rows", "mean weight"]
    alt = "Doubly robust estimates with intervals beside the rates that were really got"
    how = (
        "Each log is made of one-item requests with the position as context. The uniform policy's probabilities are exact; Thompson sampling learned "
        "while it ran, so its average behaviour is estimated from the shares of its own log and that log's error is in the interval. Users are those "
        "with equal features, as the data set has no user ids. Assumed: no effect of the page's other items, and no drift of rates during the week. "
        "Replay needs a uniform log. Where the effective rows are few, a handful of rows decides and the interval itself is not to be relied on."
    )
    few = sum(r["effective_rows"] < MIN_EFFECTIVE_ROWS for r in results)
    lead = f"{inside} of {len(results)} estimates agree with what the policy really got ({confidence:.0%} interval of the gap between the two logs)"
    lead += f"; {few} of them for want of data only, with fewer than {MIN_EFFECTIVE_ROWS} effective rows." if few else "."
    return page(
        TITLE,
        [
            Section("Estimate beside reality", figure_html(_figure(results), alt) + table_html(headers, rows, stack=True)),
            Section("How it was computed", paragraph(how)),
        ],
        lead=lead,
        tone="good" if inside == len(results) else "warn",
    )


def _cell(result: dict[str, Any], name: str) -> str:
    """An estimate with its interval; of replay, which keeps few rows, how many they are in place of an interval."""
    estimate = result["estimates"].get(name)
    if estimate is None or estimate["value"] is None:
        return "–"
    if name == "replay":
        return f"{estimate['value']:.2%} of the {result['replay_rows']:,} rows kept"
    return f"{estimate['value']:.2%} ({estimate['low']:.2%} to {estimate['high']:.2%})"


def _figure(results: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 0.8 + 0.5 * len(results)), layout="constrained")
    axis = figure.add_subplot()
    for row, r in enumerate(results):
        for interval, shift, colour, label in ((r["estimates"]["dr"], -0.14, "#1f6fb2", "estimate"), (r["real"], 0.14, "#b3372e", "really got")):
            axis.plot([100 * interval["low"], 100 * interval["high"]], [row + shift] * 2, color=colour, linewidth=2)
            axis.plot([100 * interval["value"]], [row + shift], "o", color=colour, label=label if row == 0 else None)
    axis.set_yticks(range(len(results)), [f"{r['campaign']}: {r['target']} from {r['log']}" for r in results])
    axis.invert_yaxis()
    axis.set_xlabel("clicks per 100 impressions")
    axis.legend(fontsize=8, frameon=False)
    axis.grid(axis="x", color="#e4e8ed")
    return figure


if __name__ == "__main__":
    run(open_bandit)
