"""RecTools' SASRec on the next-item workload, for `--rival`. Needs an environment with rectools[torch] and nothing of Longtrail:

python -m benchmarks.training --rival "RecTools=path/to/its/python benchmarks/training/rivals/rectools_sasrec.py --seconds 30 --threads 2"
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

WARM_UP = 3  # steps before the clock starts


class Watch(Callback):
    """Users and processor seconds after the warm-up; stops when the time is used up."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.steps, self.users, self.cpu, self.wall = seconds, 0, 0, 0.0, 0.0
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        self.losses.append(float(outputs["loss"].detach()))
        if self.steps == WARM_UP:
            self.start = time.process_time(), time.perf_counter()
        elif self.steps > WARM_UP:
            self.users += len(batch["x"])
            self.cpu, self.wall = time.process_time() - self.start[0], time.perf_counter() - self.start[1]
        if self.steps >= WARM_UP + 5 and self.cpu >= self.seconds:
            trainer.should_stop = True


def interactions(folder: Path) -> pd.DataFrame:
    """The events of the workload's history store, oldest first within each user."""
    segment = folder / "history" / json.loads((folder / "history" / "manifest.json").read_text())["segments"][0]["name"]
    items, offsets = np.load(segment / "items.npy"), np.load(segment / "offsets.npy")
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    times = pd.to_datetime(np.arange(len(items)), unit="s", origin="2020-01-01")
    return pd.DataFrame({Columns.User: users, Columns.Item: items, Columns.Weight: 1.0, Columns.Datetime: times})


def main() -> None:
    """Print one line of JSON."""
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    options.add_argument("--seconds", type=float, default=30.0)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    watch = Watch(chosen.seconds)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    model = SASRecModel(
        n_blocks=2, n_heads=2, n_factors=64, dropout_rate=0.2, session_max_len=200, loss="softmax", batch_size=128, lr=1e-3,
        get_trainer_func=lambda: Trainer(accelerator="cpu", devices=1, max_epochs=1000, callbacks=[watch], **quiet),
    )  # fmt: skip
    model.fit(Dataset.construct(interactions(chosen.folder)))
    watch = next(callback for callback in model.fit_trainer.callbacks if isinstance(callback, Watch))  # RecTools trains with a copy
    figures = {
        "steps": watch.steps - WARM_UP,
        "per_cpu_second": watch.users / watch.cpu,
        "per_second": watch.users / watch.wall,
        "loss_at": {str(step): float(np.mean(watch.losses[max(0, step - 5) : step])) for step in (10, 20, 40, 80, 160) if step <= watch.steps},
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "parameters": sum(p.numel() for p in model.lightning_model.parameters()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
