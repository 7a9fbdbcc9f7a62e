"""Off-policy estimation of a log of ten million rows: one streamed pass, beside the dense layout of the package obp; and MovieLens-1M with its truth.

The dense rival is written here in plain numpy as obp 0.4.1 lays it out: the whole action distribution of the policy and the reward model's values of
every action as arrays [rows, actions, 1], from which IPS, SNIPS and DR pick the logged action's entry. Both read the same log.
"""

import json
import resource
import subprocess
import sys
import time
import zipfile
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from tqdm import tqdm

from longtrail.files import write_json
from longtrail.offpolicy.bandit import bandit_requests, draw_bandit
from longtrail.offpolicy.columns import finish, user_columns
from longtrail.offpolicy.intervals import bootstrap, influence
from longtrail.offpolicy.policies import standardise
from longtrail.offpolicy.stream import open_log
from longtrail.offpolicy.sums import UserSums
from longtrail.schema import PROPENSITY_METADATA

Row = dict[str, Any]
ITEMS, USERS_SHARE, REPLICATES = 50, 0.1, 2_000


def world() -> tuple[Any, Any, Any, Any]:
    """Click rates of each item, and the probabilities of the logger (uniform, so that replay has something to do), of A and of B."""
    rng = np.random.default_rng(0)
    rate = 1 / (1 + np.exp(3 - rng.normal(size=ITEMS)))
    scores = 0.6 * rng.normal(size=ITEMS)
    chances = [np.exp(s) / np.exp(s).sum() for s in (0.0 * scores, 0.7 * scores, 0.7 * scores + 0.7 * np.log(rate))]
    return rate, *chances


def write_log(path: Path, rows: int) -> None:
    """One-item requests of a tenth as many users, ordinary string request ids, a reward model that is 10 % too low."""
    rate, logger, a, b = world()
    rng, writer, model = np.random.default_rng(1), None, 0.9 * world()[0]
    for start in tqdm(range(0, rows, 1_000_000), desc="making the log", disable=None):
        n = np.arange(start, min(start + 1_000_000, rows))
        item = np.searchsorted(logger.cumsum()[:-1], rng.random(len(n)))
        table = pa.table({
            "request_id": pa.array(n).cast(pa.string()),
            "user_id": rng.integers(1, max(2, int(rows * USERS_SHARE)), len(n)),
            "item_id": item + 1,
            "timestamp": pa.array(1_700_000_000_000_000 + n * 60_000, pa.timestamp("us", tz="UTC")),
            "position": np.ones(len(n), np.int32),
            "click": (rng.random(len(n)) < rate[item]).astype(np.int8),
            "propensity": logger[item],
            "a": a[item],
            "b": b[item],
            "predicted": model[item],
            "a_expected": np.full(len(n), a @ model),
            "b_expected": np.full(len(n), b @ model),
        }).replace_schema_metadata({PROPENSITY_METADATA: "conditional"})  # fmt: skip
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def ours(path: Path) -> Row:
    """All estimators of A and B with both intervals clustered by user, from one pass over the file."""
    started = time.perf_counter()
    sums = None
    for block in open_log(path, "a", "b"):
        found = UserSums.build(block.slates.users_N, user_columns(block.slates, block.a, block.b))
        sums = found if sums is None else sums.merge(found)
    assert sums is not None
    read = time.perf_counter()
    done = finish(sums)
    intervals = {}
    for name in ["naive", *done.estimators]:
        pairs = [("naive/n", "naive/d")] * 2 if name == "naive" else [(f"{name}/{side}/n", f"{name}/{side}/d") for side in "ab"]
        resampled = bootstrap(done.sums, *pairs, confidence=0.95, replicates=REPLICATES, seed=0)
        linear = influence(done.sums, *pairs, confidence=0.95)
        intervals[name] = {"b": resampled.b.json(), "difference": resampled.difference.json(), "influence": linear.difference.json()}
    ended = time.perf_counter()
    return {
        "pass_seconds": read - started,
        "interval_seconds": ended - read,
        "seconds": ended - started,
        "peak_bytes": peak(),
        "estimators": intervals,
    }


def step(path: Path) -> Row:
    """The step itself, with its diagnostics, segments and verdict: what `components.ab_test --log` does before it writes the page."""
    from components.ab_log import compare_log
    from longtrail.config import ABTestSettings

    started = time.perf_counter()
    result = compare_log(ABTestSettings(), path, "a", "b")
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak(), "verdict": result["verdict"]}


def dense(path: Path, rows: int) -> Row:
    """IPS, SNIPS and DR of B in the dense layout, without intervals, from the first `rows` rows."""
    started = time.perf_counter()
    table = pq.read_table(path, columns=["item_id", "click", "propensity"]).slice(0, rows)
    action, reward, pscore = table["item_id"].to_numpy() - 1, table["click"].to_numpy().astype(np.float64), table["propensity"].to_numpy()
    rate, _, _, b = world()
    n, position = np.arange(len(action)), np.zeros(len(action), np.int64)
    action_dist = np.empty((len(n), ITEMS, 1))
    action_dist[:] = b[None, :, None]
    model = np.empty((len(n), ITEMS, 1))
    model[:] = 0.9 * rate[None, :, None]
    w = action_dist[n, action, position] / pscore
    q_hat = np.average(model[n, :, position], weights=action_dist[n, :, position], axis=1)
    values = {"ips": (w * reward).mean(), "snips": (w * reward).mean() / w.mean(), "dr": (q_hat + w * (reward - model[n, action, position])).mean()}
    return {"rows": len(n), "seconds": time.perf_counter() - started, "peak_bytes": peak(), "b": {k: float(v) for k, v in values.items()}}


def peak() -> int:
    """Bytes of memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(what: str, path: Path, rows: int) -> Row:
    """One measurement in a process of its own, so that its peak memory is its own."""
    code = f"import json; from pathlib import Path; from benchmarks import offpolicy; print('RESULT' + json.dumps(offpolicy.{what}))"
    arguments = {"PATH": f"Path({str(path)!r})", "ROWS": str(rows)}
    for name, value in arguments.items():
        code = code.replace(name, value)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.split("RESULT")[1])


# ---------------------------------------------------------------- MovieLens


def movielens(archive: Path, logs: int) -> Row:
    """A bandit problem of MovieLens-1M's last fifth: champion (mean like rate, smoothed) against incumbent (popularity), over resampled logs."""
    with zipfile.ZipFile(archive) as opened:
        name = next(n for n in opened.namelist() if n.endswith("ratings.dat"))
        raw = opened.read(name).replace(b"::", b",")
    ratings = pd.read_csv(BytesIO(raw), names=["user", "item", "rating", "time"])
    cut = ratings["time"].quantile(0.8)
    train, test = ratings[ratings["time"] < cut], ratings[ratings["time"] >= cut]
    like = (train["rating"] >= 4).groupby(train["item"]).agg(["sum", "count"])
    overall = float((train["rating"] >= 4).mean())
    item_N = test["item"].to_numpy()
    count = like["count"].reindex(item_N, fill_value=0).to_numpy().astype(float)
    rate = (like["sum"].reindex(item_N, fill_value=0).to_numpy() + 20 * overall) / (count + 20)
    made = bandit_requests(test["user"].to_numpy(), test["time"].to_numpy(), 20)
    rows, real, first = np.maximum(made.rows_RC, 0), made.rows_RC >= 0, made.rows_RC[:, 0]
    score = {
        "popularity": standardise(np.where(real, np.log1p(count)[rows], 0.0), made.lengths_R),
        "like rate": standardise(np.where(real, rate[rows], 0.0), made.lengths_R),
    }
    labels = np.where(real, (test["rating"].to_numpy() >= 4)[rows], False).astype(float)
    found: dict[str, list[tuple[float, float, bool]]] = {}
    truth: Row = {}
    for seed in tqdm(range(logs), desc="MovieLens logs", disable=None):
        drawn = draw_bandit(
            users_R=test["user"].to_numpy()[first], times_R=test["time"].to_numpy()[first], lengths_R=made.lengths_R, labels_RC=labels,
            features_RCF=np.stack(list(score.values()), axis=2), logger_RC=score["popularity"],
            scores={key: values / 0.5 for key, values in score.items()}, rounds=2, seed=seed,
        )  # fmt: skip
        a, b = drawn.policies.values()
        done = finish(UserSums.build(drawn.slates.users_N, user_columns(drawn.slates, a, b)))
        truth = {**drawn.truth, "difference": drawn.truth["like rate"] - drawn.truth["popularity"]}
        for key in done.estimators:
            gap = influence(done.sums, (f"{key}/a/n", f"{key}/a/d"), (f"{key}/b/n", f"{key}/b/d"), confidence=0.95).difference
            found.setdefault(key, []).append((gap.value, gap.high - gap.low, gap.low <= truth["difference"] <= gap.high))
    summary = {}
    for key, values in found.items():
        estimate = np.array([v for v, _, _ in values])
        summary[key] = {
            "mean": float(estimate.mean()),
            "bias": float(estimate.mean() - truth["difference"]),
            "rmse": float(np.sqrt(((estimate - truth["difference"]) ** 2).mean())),
            "mean_half_width": float(np.mean([w for _, w, _ in values]) / 2),
            "covered": float(np.mean([c for _, _, c in values])),
        }
    return {"logs": logs, "requests": len(made.lengths_R), "rows_a_log": 2 * len(made.lengths_R), "truth": truth, "difference": summary}


def main(
    rows: Annotated[int, typer.Option(help="rows of the log; 0 leaves it out")] = 10_000_000,
    budget: Annotated[int, typer.Option(help="bytes the dense layout may take; it gets as many of the first rows as fit")] = 4_000_000_000,
    archive: Annotated[Path | None, typer.Option(help="MovieLens-1M's own zip; left out where there is none")] = None,
    logs: Annotated[int, typer.Option(help="resampled MovieLens logs")] = 200,
    out: Annotated[Path, typer.Option(help="where the figures go")] = Path("build/benchmarks/offpolicy.json"),
) -> None:
    """Measure the streamed estimators beside the dense layout, and estimates on MovieLens-1M beside the truth."""
    from benchmarks.history import hardware  # here, so that the measured processes do not import torch

    rate, _, a, b = world()
    result: Row = {"hardware": hardware(), "rows": rows, "replicates": REPLICATES, "truth": {"a": float(a @ rate), "b": float(b @ rate)}}
    if rows:
        result |= streamed(rows, budget)
    if archive is not None:
        result["movielens"] = movielens(archive, logs)
    write_json(out, result)
    print(show(result))


def streamed(rows: int, budget: int) -> Row:
    """Each measured in a process of its own, on the same file."""
    fits = min(rows, budget // (3 * ITEMS * 8))  # two dense arrays and what averaging copies
    with TemporaryDirectory() as folder:
        path = Path(folder) / "log.parquet"
        write_log(path, rows)
        found = {"ours": "ours(PATH)", "step": "step(PATH)", "dense": "dense(PATH, ROWS)"}
        return {"file_bytes": path.stat().st_size, **{name: alone(what, path, fits) for name, what in found.items()}}


def show(result: Row) -> str:
    """The figures as Markdown."""
    lines = _streamed_table(result) if "ours" in result else []
    if "movielens" in result:
        movie = result["movielens"]
        lines += [f"MovieLens-1M, {movie['logs']} logs; true difference {movie['truth']['difference']:+.4f}", ""]
        lines += ["| estimator | mean | bias | RMSE | half width | covered |", "|---|---|---|---|---|---|"]
        for name, row in movie["difference"].items():
            lines.append(
                f"| {name} | {row['mean']:+.4f} | {row['bias']:+.4f} | {row['rmse']:.4f} | {row['mean_half_width']:.4f} | {row['covered']:.3f} |"
            )
    return "\n".join(lines)


def _streamed_table(result: Row) -> list[str]:
    mine, rival, whole = result["ours"], result["dense"], result["step"]
    return [
        "| | rows | estimators | intervals | seconds | rows/s | peak memory |",
        "|---|---|---|---|---|---|---|",
        f"| streamed, A and B | {result['rows']:,} | {len(mine['estimators'])} | bootstrap ({result['replicates']:,}) and influence, by user "
        f"| {mine['seconds']:.1f} | {result['rows'] / mine['seconds']:,.0f} | {mine['peak_bytes'] / 1e9:.2f} GB |",
        f"| the step with diagnostics and segments | {result['rows']:,} | | | {whole['seconds']:.1f} | {result['rows'] / whole['seconds']:,.0f} "
        f"| {whole['peak_bytes'] / 1e9:.2f} GB |",
        f"| dense [rows, {ITEMS}, 1], B | {rival['rows']:,} | 3 | none | {rival['seconds']:.1f} | {rival['rows'] / rival['seconds']:,.0f} "
        f"| {rival['peak_bytes'] / 1e9:.2f} GB |",
        "",
    ]


if __name__ == "__main__":
    typer.run(main)
