"""Step `evaluate`: one model, judged on the validation and test splits, and what it costs."""

import csv
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.command import run
from longtrail.config import load_config
from longtrail.errors import ModelError
from longtrail.files import atomic_directory, read_json, write_json

if TYPE_CHECKING:
    from longtrail.config import EvaluationSettings, RetrievalSettings

log = logging.getLogger("evaluate")

SPLITS = ("valid", "test")


def evaluate(
    model: Annotated[Path, typer.Option(help="model folder, written by train")],
    features: Annotated[Path, typer.Option(help="folder written by build_features")] = Path("build/features"),
    params: Annotated[Path, typer.Option(help="settings")] = Path("params.yaml"),
    out: Annotated[Path | None, typer.Option(help="folder to write; default: build/evaluations/NAME of the model folder")] = None,
) -> None:
    """Judge one model: unsampled metrics and slices with intervals, latency, memory and size; as JSON, CSV and a page with plots."""
    config = load_config(params)
    evaluate_model(
        model, features=features, settings=config.evaluation, retrieval=config.retrieval, out=out or Path("build/evaluations") / model.name
    )


def evaluate_model(model: Path, *, features: Path, settings: "EvaluationSettings", retrieval: "RetrievalSettings", out: Path) -> dict[str, Any]:
    """What the command does, with settings already read. Returns evaluation.json. Raises ModelError and HistoryError of damaged inputs."""
    import torch  # takes seconds: --help and a bad params.yaml need not wait for it

    from components.evaluation_page import write_page
    from components.trained_table import trained_rows
    from longtrail.costs import ROUNDS, measure_cost
    from longtrail.evaluation import evaluate as judge
    from longtrail.examples import FeatureSet
    from longtrail.models.store import CARD, load_model
    from longtrail.models.vocabulary import FILE, moved_ids

    if moved := moved_ids(model, features / "catalogue.parquet"):
        raise ModelError(f"{model / FILE}: {moved} ids mean other items or categories in {features}; expected the features it was trained on")
    torch.set_num_threads(settings.threads)
    loaded = load_model(model)
    feature_set = FeatureSet.open(features)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    splits = {split: judge(loaded, feature_set, split, settings, retrieval=retrieval, device=device) for split in SPLITS}
    log.info("%s: timing a request in a process of its own, %d rounds of %d, a minute at most", loaded.card.name, ROUNDS, settings.latency_requests)
    cost = measure_cost(model, settings, retrieval)
    if cost.requests < settings.latency_requests:
        log.warning("%s: slow: %d of %d requests were timed in each round's share", loaded.card.name, cost.requests, settings.latency_requests)
    evaluation: dict[str, Any] = {
        "model": loaded.card.name,
        "stage": loaded.card.stage,
        "kind": loaded.card.settings.kind,
        "weights": read_json(model / CARD)["weights"]["sha256"],
        "confidence": settings.confidence,
        "splits": {split: result.json() for split, result in splits.items()},
        "curves": {split: result.curve for split, result in splits.items()},
        "classification": {split: result.classification for split, result in splits.items() if result.classification},
        "cost": cost.json(),
    }
    with atomic_directory(out) as folder:
        write_json(folder / "evaluation.json", evaluation)
        write_json(folder / "metrics.json", flat_metrics(evaluation))
        write_slices(folder / "slices.csv", evaluation)
        write_curve(folder / ("calibration.csv" if loaded.card.stage == "ranking" else "hit_rate.csv"), evaluation)
        write_page(folder, evaluation, trained_rows(model))
    log.info("%s: %s", out, headline(evaluation))
    return evaluation


def main_metric(evaluation: dict[str, Any]) -> str:
    """The metric to name first: auc, or ndcg at the smallest k."""
    names = evaluation["splits"]["test"]["metrics"]
    return "auc" if evaluation["stage"] == "ranking" else min((n for n in names if n.startswith("ndcg@")), key=lambda n: int(n[5:]))


def headline(evaluation: dict[str, Any]) -> str:
    """The evaluation in a sentence."""
    name = main_metric(evaluation)
    found, cost = evaluation["splits"]["test"]["metrics"][name], evaluation["cost"]
    value = f"undefined ({found.get('reason')})" if found["value"] is None else f"{found['value']:.4f}"
    interval = "" if found["low"] is None else f" ({found['low']:.4f} to {found['high']:.4f})"
    latency = cost["latency_ms"]
    return (
        f"{evaluation['model']}: {name} {value}{interval} on the test split; "
        f"one request takes {milliseconds(latency['p50'])} (p99 {milliseconds(latency['p99'])}); {cost['model_bytes']:,} bytes"
    )


def milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def flat_metrics(evaluation: dict[str, Any]) -> dict[str, Any]:
    """metrics.json, as `dvc metrics` reads it. What is undefined is left out."""
    return {
        **{
            split: {name: e["value"] for name, e in evaluation["splits"][split]["metrics"].items() if e["value"] is not None}
            for split in evaluation["splits"]
        },
        "latency_ms_p50": evaluation["cost"]["latency_ms"]["p50"],
        "latency_ms_p99": evaluation["cost"]["latency_ms"]["p99"],
        "peak_memory_bytes": evaluation["cost"]["peak_memory_bytes"],
        "model_bytes": evaluation["cost"]["model_bytes"],
    }


def write_slices(path: Path, evaluation: dict[str, Any]) -> None:
    """One line a split, slice, bucket and metric; empty cells where a figure is undefined."""
    rows = [
        {"split": split, **{key: part[key] for key in ("slice", "bucket", "rows")}, "metric": name, **_numbers(estimate)}
        for split, result in evaluation["splits"].items()
        for part in result["slices"]
        for name, estimate in part["metrics"].items()
    ]
    _write_csv(path, ["split", "slice", "bucket", "rows", "metric", "value", "low", "high"], rows)


def write_curve(path: Path, evaluation: dict[str, Any]) -> None:
    """Ranking: click rate (`value`) by mean prediction. Retrieval: hit rate (`value`) by k."""
    place = "predicted" if evaluation["stage"] == "ranking" else "k"
    rows = [{"split": split, place: point[place], **_numbers(point)} for split, curve in evaluation["curves"].items() for point in curve]
    _write_csv(path, ["split", place, "value", "low", "high"], rows)


def _numbers(estimate: dict[str, Any]) -> dict[str, Any]:
    return {key: estimate[key] for key in ("value", "low", "high")}


def _write_csv(path: Path, names: list[str], rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    run(evaluate)
