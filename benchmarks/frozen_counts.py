"""What it costs that a service's counts stay as they were when its features were built.

    python -m benchmarks.frozen_counts            # a simulated log, three minutes on a core

In training, counts of a request (impressions and clicks of the user; events, impressions and clicks of each item) are those available strictly before
it. The endpoint has them as of the build, and histories alone go on. Here a ranker is trained on the first part of a log and judged on the rest
twice: with the counts of each request's own time, and with those of the moment the rest began. Histories are those of each request's time in both.
"""

import logging
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
import yaml
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from benchmarks.serving.report import made
from longtrail.files import write_json

Floats = NDArray[np.float64]
PARTS = 3  # of the judged period, in order of time: how the cost grows
RANKER = "sam"


def prepare(folder: Path, *, users: int, items: int) -> None:
    """ingest, build_features and train, 30 % of the log left to judge."""
    from components.build_features import build_features
    from components.ingest import ingest
    from components.train import train

    models = {RANKER: {"stage": "ranking", "kind": RANKER, "width": 16, "max_history": 50}}
    models |= {
        "popular_items": {"stage": "retrieval", "kind": "popularity"},
        "popularity": {"stage": "ranking", "kind": "popularity"},
    }  # each stage has one
    params = {
        "dataset": {"kind": "world", "users": users, "items": items, "events_per_user": 60, "requests_per_user": 30, "seed": 1},
        "split": {"valid_share": 0.1, "test_share": 0.3},
        "models": models,
        "pipeline": {"models": list(models)},
        "selection": {
            "incumbent": "popularity",
            "retrieval": {"metric": "ndcg@10", "max_latency_ms": 100, "max_bytes": 10**9},
            "ranking": {"metric": "gauc", "max_latency_ms": 100, "max_bytes": 10**9},
        },
        "training": {"threads": 1},
    }
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump(params))
    ingest(params=file, tables=folder / "tables")
    write_json(folder / "validation" / "result.json", {"success": True})
    build_features(tables=folder / "tables", validation=folder / "validation", params=file, features=folder / "features")
    train(
        model=RANKER, features=folder / "features", params=file, out=folder / "model", checkpoints=folder / "checkpoints", previous=None, since=None
    )


def judge(folder: Path) -> dict[str, Any]:
    """Figures of the requests after the build, in PARTS, with counts of their time and with those of the build."""
    from components.ab_requests import RequestFeatures, logged_requests, request_features, score
    from features.definitions import RANKING
    from features.point_in_time import PointInTime
    from longtrail.examples import FeatureSet
    from longtrail.schema import ITEM_STATISTICS, USER_STATISTICS

    opened = FeatureSet.open(folder / "features")
    asked, shown = logged_requests(folder / "tables", opened, whole_catalogue=False)
    now = request_features(folder / "features" / "feast", asked)
    request_N, column_N = np.nonzero(asked.real)
    built = np.full(len(request_N), asked.times_R.min())
    keys = {"user_id": asked.users_R[request_N], "item_id": asked.items_RC[request_N, column_N]}
    values = PointInTime(folder / "features" / "feast").features(RANKING, built, **keys)
    item = {name: np.zeros(asked.items_RC.shape, np.int64) for name in ITEM_STATISTICS}
    for name, grid in item.items():
        grid[request_N, column_N] = values[name]
    first_R = np.searchsorted(request_N, np.arange(len(asked.users_R)))
    user = {name: values[name][first_R] for name in USER_STATISTICS}
    variants = {
        "of the request's time": now,
        "user's of the build": RequestFeatures(history_length_R=now.history_length_R, user=user, item=now.item),
        "all of the build": RequestFeatures(history_length_R=now.history_length_R, user=user, item=item),
    }
    logits = {name: score(folder / "model", opened, asked, known) for name, known in variants.items()}
    order = np.argsort(asked.times_R, kind="stable")
    parts = [
        {name: _figures(asked, shown, logits[name], logits["of the request's time"], part) for name in variants}
        for part in np.array_split(order, PARTS)
    ]
    return {"requests": len(order), "parts": parts, "stability": _stability(asked, now, user, item)}


def _figures(asked: Any, shown: Any, logits_RC: Floats, best_RC: Floats, part: NDArray[np.int64]) -> dict[str, float]:
    """Of the items shown: log loss, AUC and predicted over real clicks; of all candidates: how often the best of a request is another one."""
    real_RK = shown.shown_RK[part] >= 0
    logit_N = np.take_along_axis(logits_RC[part], np.maximum(shown.shown_RK[part], 0), axis=1)[real_RK]
    click_N = shown.clicks_RK[part][real_RK]
    masked = [np.where(asked.real[part], values[part], -np.inf).argmax(axis=1) for values in (logits_RC, best_RC)]
    return {
        "log_loss": float(np.mean(np.logaddexp(0, np.where(click_N == 1, -logit_N, logit_N)))),
        "auc": float(roc_auc_score(click_N, logit_N)),
        "predicted_over_clicked": float((1 / (1 + np.exp(-logit_N))).sum() / click_N.sum()),
        "other_best": float(np.mean(masked[0] != masked[1])),
    }


def _stability(asked: Any, now: Any, user: dict[str, Any], item: dict[str, Any]) -> dict[str, float]:
    """Population stability index (as serving.drift's) of each count as the service has it against what it would be, in the last part."""
    from longtrail.drift import make_feature, psi

    last = np.argsort(asked.times_R, kind="stable")[-(len(asked.times_R) // PARTS) :]
    real = asked.real[last]
    pairs = {name: (now.user[name][last], values[last]) for name, values in user.items()}
    pairs |= {name: (now.item[name][last][real], values[last][real]) for name, values in item.items()}
    found = {}
    for name, (true, frozen) in pairs.items():
        feature = make_feature(true, frozen, training_observations=1, newest_observations=1)
        found[name] = psi(feature.training, feature.newest)
    return found


def table(result: dict[str, Any]) -> str:
    rows = ["| after the build | counts | log loss | AUC | predicted / clicked | another best item |", "|---|---|---|---|---|---|"]
    for place, part in enumerate(result["parts"]):
        for name, each in part.items():
            figures = f"{each['log_loss']:.4f} | {each['auc']:.4f} | {each['predicted_over_clicked']:.3f} | {each['other_best']:.1%}"
            rows.append(f"| {place * 30 // PARTS}–{(place + 1) * 30 // PARTS} % of the log | {name} | {figures} |")
    return "\n".join(rows)


def main(
    users: Annotated[int, typer.Option(help="of the simulated log")] = 600,
    items: Annotated[int, typer.Option(help="of the simulated log")] = 400,
    out: Annotated[Path, typer.Option(help="JSON to write")] = Path("build/benchmarks/frozen_counts.json"),
) -> None:
    """Log loss, AUC and calibration with counts of each request's time, and with those of the build."""
    logging.disable(logging.INFO)
    before = psutil.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="longtrail-frozen-") as name:
        prepare(Path(name), users=users, items=items)
        result = judge(Path(name))
    write_json(out, {"made": made(before), "settings": {"users": users, "items": items, "ranker": RANKER}, **result})
    print(table(result))
    print("stability index in the last part: " + ", ".join(f"{name} {value:.2f}" for name, value in result["stability"].items()), f"-> {out}")


if __name__ == "__main__":
    typer.run(main)
