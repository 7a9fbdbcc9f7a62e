"""How often the A/B test's intervals hold the truth, how often it decides, and how often it is wrong, over thousands of simulated logs.

    python -m benchmarks.coverage --help

Logs and their truths are made by benchmarks/coverage_logs.py: users alike within themselves, active in different degree; rows of one item; a reward
model fitted on the other half of the users. One line a setting: the shares of logs whose 95 % interval of B − A holds the true difference
(influence function, bootstrap, and the wider of the two, which the verdict uses), the same for A's rate alone, the shares of verdicts, and of logs
that were decided wrongly: a win or loss of the wrong sign, or a claim of equivalence of policies that differ by more than the margin.
Textbook SNIPS with Wald's interval (1.96 standard errors) is measured beside it on the same logs.
"""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tqdm import tqdm

from benchmarks.coverage_logs import Setting, simulate
from longtrail.files import write_json
from longtrail.offpolicy.anytime import time_uniform
from longtrail.offpolicy.experiment import Rules, judge
from longtrail.offpolicy.intervals import influence
from longtrail.offpolicy.verdict import OUTCOMES

QUOTED = (("dr/a/n", "dr/a/d"), ("dr/b/n", "dr/b/d"))
TEXTBOOK = (("snips/a/n", "snips/a/d"), ("snips/b/n", "snips/b/d"))
GRID: dict[str, tuple[Setting, int, int]] = {  # name → setting, rows, users
    "clicks 0.5 %": (Setting(level=-6.05, spread=0.5), 5_000, 500),
    "clicks 5 %": (Setting(level=-3.65, spread=0.5), 5_000, 500),
    "clicks 50 %": (Setting(level=-0.2, spread=0.5), 5_000, 500),
    "clicks 90 %": (Setting(level=2.35, spread=0.5), 5_000, 500),
    "0.5 %, 20,000 rows": (Setting(level=-6.05, spread=0.5), 20_000, 2_000),
    "5 %, users very alike": (Setting(level=-3.65, spread=0.5, user_sd=1.6), 5_000, 250),
    "5 %, 500 rows": (Setting(level=-3.65, spread=0.5), 500, 100),
    "50 %, 500 rows": (Setting(level=-0.2, spread=0.5), 500, 100),
    "0.5 %, 500 rows": (Setting(level=-6.05, spread=0.5), 500, 100),
    "5 %, poor overlap": (Setting(level=-3.65, spread=2.5), 5_000, 500),
    "5 %, poor overlap, 1,000 rows": (Setting(level=-3.65, spread=2.5), 1_000, 100),
    "1 %, very poor, 1,000 rows": (Setting(level=-5.3, spread=4.0), 1_000, 100),
    "equal, 5 %": (Setting(level=-3.65, even=True), 5_000, 500),
    "equal, 0.5 %": (Setting(level=-6.05, even=True), 5_000, 500),
    "equal, 5 %, poor overlap": (Setting(level=-3.65, spread=2.5, even=True), 5_000, 500),
}
PEEKING: dict[str, tuple[Setting, int, int]] = {
    "14 days, equal, 5 %": (Setting(level=-3.65, even=True), 14_000, 700),
    "14 days, equal, 50 %": (Setting(level=-0.2, even=True), 14_000, 700),
}


def coverage(setting: Setting, rows: int, users: int, *, logs: int, replicates: int, seed: int) -> dict[str, Any]:
    """One line of the table."""
    truth_a, truth_b = setting.truth()
    gap = truth_b - truth_a
    rules = Rules(replicates=replicates)
    held: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    effective, rates = [], []
    for [evidence] in tqdm(simulate(setting, logs=logs, rows=rows, users=users, seed=seed), total=logs, leave=False, disable=None):
        result = judge(evidence, rules)
        linear, resampled, text = result.influence["dr"], result.bootstrap["dr"], influence(evidence.sums, *TEXTBOOK, confidence=0.95)
        held["influence"] += linear.difference.low <= gap <= linear.difference.high
        held["bootstrap"] += resampled.difference.low <= gap <= resampled.difference.high
        held["decision"] += result.interval.low <= gap <= result.interval.high
        held["rate of A"] += linear.a.low <= truth_a <= linear.a.high
        held["textbook"] += abs(text.difference.value - gap) <= 1.96 * text.error
        outcome = result.verdict.outcome
        verdicts[outcome] += 1
        held["decided, missed"] += outcome in ("win", "lose", "equivalent") and not result.interval.low <= gap <= result.interval.high
        held["wrong"] += wrong(outcome, gap, result.margin)
        effective.append(evidence.weights["b"].effective)
        rates.append(result.logged.value)
    shares = {name: held[name] / logs for name in ("influence", "bootstrap", "decision", "rate of A", "textbook", "decided, missed", "wrong")}
    return {
        "rows": rows, "users": users, "logs": logs, "click_rate": float(np.mean(rates)), "effective_requests": float(np.mean(effective)),
        "difference": gap, **shares, **{outcome: verdicts[outcome] / logs for outcome in OUTCOMES},
    }  # fmt: skip


def wrong(outcome: str, gap: float, margin: float) -> bool:
    """A decision that the truth contradicts."""
    return (outcome == "win" and gap <= 1e-12) or (outcome == "lose" and gap >= -1e-12) or (outcome == "equivalent" and abs(gap) > margin)


def peeking(setting: Setting, rows: int, users: int, *, logs: int, days: int, seed: int) -> dict[str, Any]:
    """Looking after every day, stopping at the first interval that leaves the truth out: how often that happens, by interval."""
    truth_a, truth_b = setting.truth()
    left: Counter[str] = Counter()
    for looks in tqdm(simulate(setting, logs=logs, rows=rows, users=users, seed=seed, days=days), total=logs, leave=False, disable=None):
        found = {"any-time": False, "one look": False}
        for evidence in looks:
            if len(evidence.sums.users_U) < 2:
                continue
            comparison = influence(evidence.sums, *QUOTED, confidence=0.95)
            whole = time_uniform(comparison, rows=evidence.rows, confidence=0.95)
            found["any-time"] |= bool(whole.low > truth_b - truth_a or whole.high < truth_b - truth_a)
            found["one look"] |= not comparison.difference.low <= truth_b - truth_a <= comparison.difference.high
        left.update(name for name, once in found.items() if once)
    shape = {"rows": rows, "users": users, "logs": logs, "days": days}
    return {**shape, **{f"ever out, {name}": left[name] / logs for name in ("any-time", "one look")}}


def main(
    logs: Annotated[int, typer.Option(help="logs a setting", min=10)] = 2_000,
    replicates: Annotated[int, typer.Option(help="bootstrap replicates a log", min=50)] = 200,
    only: Annotated[str, typer.Option(help="settings whose name contains this")] = "",
    out: Annotated[Path, typer.Option(help="JSON of the table; lines of earlier runs are kept")] = Path("build/benchmarks/coverage.json"),
    seed: int = 1,
) -> None:
    """Print the table, a line a setting, and write it as JSON."""
    lines: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    for name, (setting, rows, users) in GRID.items():
        if only in name:
            start = time.perf_counter()
            lines[name] = coverage(setting, rows, users, logs=logs, replicates=replicates, seed=seed)
            _say(name, lines[name], start)
            write_json(out, lines)
    for name, (setting, rows, users) in PEEKING.items():
        if only in name:
            start = time.perf_counter()
            lines[name] = peeking(setting, rows, users, logs=logs, days=14, seed=seed)
            _say(name, lines[name], start)
            write_json(out, lines)


def _say(name: str, line: dict[str, Any], start: float) -> None:
    figures = ", ".join(f"{key} {value:.4g}" for key, value in line.items())
    print(f"{name}: {figures} ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    typer.run(main)
