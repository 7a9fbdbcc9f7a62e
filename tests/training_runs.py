"""Trainings that stop at a given resume file and tell which requests they saw: here, or as one of several processes."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from longtrail.config import DINSettings, IFASettings, SASRecSettings, TrainingSettings
from longtrail.examples import FeatureSet, RankingBatch
from longtrail.files import write_json
from longtrail.training import is_main_process, train
from longtrail.training.learners import RankerLearner
from longtrail.training.loop import EpochKeeper

CPU = TrainingSettings(accelerator="cpu", threads=1, checkpoint_steps=2)
SMALL: dict[str, Any] = {"max_history": 20, "max_epochs": 2, "patience": 2, "learning_rate": 3e-3, "dropout": 0.0}
MODELS: dict[str, Any] = {
    # 61 requests a step: the ragged last batches of buckets are smaller than the pieces
    "ifa": IFASettings(**SMALL, width=4, hidden=(8,), batch_size=61, listwise=0.3, relation_dropout=0.0),
    "sasrec": SASRecSettings(**SMALL, width=8, blocks=1, heads=1, batch_size=13),
    "din dropout": DINSettings(**SMALL | {"dropout": 0.3}, width=4, hidden=(8,), batch_size=61),
}


class StopError(Exception):
    """What an interruption looks like to the code around training."""


def run(features: Path, model: str, checkpoints: Path, *, accumulate: int = 1, stop: tuple[int, int] | None = None) -> dict[str, Any]:
    """Train, or go on, until the resume file of `stop` (epochs, step) is written. {"curve", "seen": [epoch, request], "module", "resumed_from"}."""
    seen: list[tuple[int, int]] = []
    step, save = RankerLearner.training_step, EpochKeeper._save

    def watched(learner: RankerLearner, batch: RankingBatch, index: int) -> Any:
        real = batch.requests_B[batch.candidates.lengths_B > 0]
        seen.extend((learner.epoch, request) for request in real.tolist())
        return step(learner, batch, index)

    def saved(keeper: EpochKeeper, *arguments: Any) -> None:
        save(keeper, *arguments)
        if (keeper.progress.epochs, keeper.progress.step) == stop:
            raise StopError

    found: dict[str, Any] = {"seen": seen}
    training = CPU.model_copy(update={"accumulate": accumulate})
    with patch.object(RankerLearner, "training_step", watched), patch.object(EpochKeeper, "_save", saved), suppress(StopError):
        trained = train(FeatureSet.open(features), MODELS[model], model, training, data="d", checkpoints=checkpoints)
        found |= {"curve": trained.curve, "module": trained.module, "resumed_from": trained.resumed_from}
    return found


def main(features: Path, jobs: list[dict[str, Any]], out: Path, rank: int) -> None:
    """Every job, one after the other, in each process; what a process saw goes to out/JOB.RANK.json."""
    for job in jobs:
        found = run(features, job["model"], Path(job["checkpoints"]), accumulate=job["accumulate"], stop=job["stop"] and tuple(job["stop"]))
        module = found.pop("module", None)
        if module is not None:
            found["weights"] = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
        write_json(out / f"{job['name']}.{rank}.json", {**found, "first": is_main_process()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
