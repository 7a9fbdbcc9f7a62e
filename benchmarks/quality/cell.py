"""One cell of a board, in a process of its own: train, judge on the test split, write a JSON file. Run by `python -m benchmarks.quality`."""

import logging
import resource
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.quality.board import Board, Cell, K, load_boards
from benchmarks.quality.prepare import features_digest, prepare
from components.command import run
from longtrail.commits import git_commit
from longtrail.config import EvaluationSettings
from longtrail.files import hash_path, write_json

log = logging.getLogger("quality")


def cell(
    board: Annotated[str, typer.Option()], model: Annotated[str, typer.Option()], seed: Annotated[int, typer.Option()],
    data: Annotated[Path, typer.Option()], work: Annotated[Path, typer.Option()], out: Annotated[Path, typer.Option()],
) -> None:  # fmt: skip
    """Train and judge one model of a board."""
    import torch

    from longtrail.examples import FeatureSet
    from longtrail.models.store import LoadedModel, ModelCard
    from longtrail.training import train

    chosen = load_boards([board])[board]
    torch.set_num_threads(chosen.training.threads)
    folder = prepare(board, chosen, data=data, work=work)
    features, settings = FeatureSet.open(folder), chosen.models[model]
    training = chosen.training.model_copy(update={"seed": seed, "accumulate": chosen.pieces.get(model, 1)})
    since = _since(features, chosen) if settings.stage == "ranking" else None
    memory = _peak_memory_bytes()
    before, began = time.process_time(), time.perf_counter()
    trained = train(
        features, settings, f"{board}-{model}-{seed}", training,
        data=hash_path(folder / "features.json"), checkpoints=work / "checkpoints", since=since,
    )  # fmt: skip
    cpu_seconds, seconds, trained_memory = time.process_time() - before, time.perf_counter() - began, _peak_memory_bytes()
    card = ModelCard(name=model, settings=settings, sizes=features.sizes, actions=features.actions, prior_click_rate=features.prior_click_rate)
    result: dict[str, Any] = {
        **vars(Cell(seed=seed, board=board, model=model)),
        "protocol": chosen.protocol,
        "features": features_digest(folder),
        "settings": settings.model_dump(mode="json"),
        "pieces": training.accumulate,
        "metrics": judge(LoadedModel(module=trained.module, card=card), features, chosen),
        "valid": {trained.metric: trained.value},
        "epochs": trained.epochs,
        "curve": [round(row[key], 5) for row in trained.curve if (key := f"valid_{trained.metric}") in row],
        "best_epoch": trained.best_epoch,
        "train_cpu_seconds": cpu_seconds,
        "train_seconds": seconds,
        "resumed": trained.resumed_from > 0,
        "parameters": sum(p.numel() for p in trained.module.parameters()),
        "state_bytes": sum(t.numel() * t.element_size() for t in trained.module.state_dict().values()),
        "peak_memory_bytes": trained_memory,
        "memory_before_training_bytes": memory,
        "commit": git_commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    write_json(out, result)
    if trained.checkpoint is not None:
        trained.checkpoint.remove()
    log.info("%s %s seed %d: %s", board, model, seed, {name: value and round(value, 4) for name, value in result["metrics"].items()})


def _peak_memory_bytes() -> int:
    """Of this process until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def judge(model: Any, features: Any, board: Board) -> dict[str, float]:
    """Unsampled metrics of the test split; for retrieval also the expected sampled one, by its name."""
    from benchmarks.quality.sampled import sampled_metrics
    from longtrail.evaluation import judge_ranking, judge_retrieval, predict_ranking, predict_retrieval

    settings = EvaluationSettings(k=(K,), replicates=1)
    if model.card.stage == "ranking":
        result = judge_ranking(predict_ranking(model.module, features, "test"), features, settings)
        sampled: dict[str, float] = {}
    else:
        rows = predict_retrieval(model.module, features, "test", k=K)
        result = judge_retrieval(rows, features, settings)
        sampled = sampled_metrics(rows.ranks_n, rows.catalogue - rows.seen_n - 1, K)
    return {name: float(e.value) for name, e in result.metrics.items() if e.value is not None} | sampled


def _since(features: Any, board: Board) -> int | None:
    """The time from which on the training split holds the board's number of newest requests."""
    from longtrail.examples.features import column

    if board.newest_requests is None:
        return None
    table = features.examples("train")
    requests = table.group_by("request_id").aggregate([("timestamp", "max")])
    times = np.sort(column(requests, "timestamp_max"))
    return int(times[-board.newest_requests]) if len(times) > board.newest_requests else None


if __name__ == "__main__":
    run(cell)
