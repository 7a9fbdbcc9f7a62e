"""RecBole's SASRec on the next-item workload, for `--rival`. Needs an environment with recbole and nothing of Longtrail:

python -m venv RIVAL && RIVAL/bin/pip install torch==2.13.0 recbole==1.2.1 "numpy<2" "pandas<3" setuptools    # RIVAL: a folder outside the repository
python -m benchmarks.training --rival "RecBole=RIVAL/bin/python benchmarks/training/rivals/recbole_sasrec.py --seconds 30 --threads 1"

RecBole makes a row of every prefix of a user's events, each with one target (its `data_augmentation`). Its rows are counted as the share of a user
that they are, so that the figure is of users as everybody else's.
"""

import argparse
import contextlib
import json
import os
import resource
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer

WARM_UP = 3  # steps before the clock starts
LENGTH, WIDTH, BATCH = 200, 64, 128


class TimeUsedError(Exception):
    """The measurement has what it needs."""


class Watch:
    """Stands before the model's loss: rows and processor seconds between the steps after the warm-up."""

    def __init__(self, model: Any, seconds: float) -> None:
        self.loss_of, self.seconds, self.steps, self.rows, self.cpu, self.wall = model.calculate_loss, seconds, 0, 0, 0.0, 0.0
        self.losses: list[float] = []

    def __call__(self, batch: Any) -> Any:
        if self.steps == WARM_UP:
            self.start = time.process_time(), time.perf_counter()
        elif self.steps > WARM_UP:
            self.rows += self.last
            self.cpu, self.wall = time.process_time() - self.start[0], time.perf_counter() - self.start[1]
            if self.steps >= WARM_UP + 5 and self.cpu >= self.seconds:
                raise TimeUsedError
        self.steps, self.last = self.steps + 1, len(batch["user_id"])
        loss = self.loss_of(batch)
        self.losses.append(float(loss.detach()))
        return loss


def atomic_file(folder: Path, place: Path) -> None:
    """The events of the workload's history store as the library reads them."""
    segment = folder / "history" / json.loads((folder / "history" / "manifest.json").read_text())["segments"][0]["name"]
    items, offsets = np.load(segment / "items.npy"), np.load(segment / "offsets.npy")
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    (place / "workload").mkdir()
    with (place / "workload" / "workload.inter").open("w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        np.savetxt(file, np.column_stack([users, items, np.arange(len(items))]), fmt="%d", delimiter="\t")


def main() -> None:
    """Print one line of JSON."""
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    options.add_argument("--seconds", type=float, default=30.0)
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(chosen.threads)
    with TemporaryDirectory() as place:
        atomic_file(chosen.folder.absolute(), Path(place))
        os.chdir(place)  # it leaves log_tensorboard where it runs
        settings = {
            "data_path": place, "checkpoint_dir": place, "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "use_gpu": False, "seed": 0,
            "MAX_ITEM_LIST_LENGTH": LENGTH, "train_batch_size": BATCH, "learning_rate": 1e-3, "train_neg_sample_args": None, "show_progress": False,
            "hidden_size": WIDTH, "inner_size": 4 * WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dropout_prob": 0.2, "attn_dropout_prob": 0.2,
            "loss_type": "CE", "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}, "state": "ERROR",
        }  # fmt: skip
        config = Config(model="SASRec", dataset="workload", config_dict=settings)
        dataset = create_dataset(config)
        train, _, _ = data_preparation(config, dataset)
        torch.manual_seed(0)
        model = SASRec(config, train.dataset)
        watch = model.calculate_loss = Watch(model, chosen.seconds)
        rows_a_user = len(train.dataset) / (dataset.user_num - 1)
        with contextlib.suppress(TimeUsedError):
            Trainer(config, model).fit(train, saved=False, verbose=False)
    users = watch.rows / rows_a_user
    figures = {
        "steps": watch.steps - WARM_UP,
        "per_cpu_second": users / watch.cpu,
        "per_second": users / watch.wall,
        "rows_per_cpu_second": watch.rows / watch.cpu,
        "loss_at": {str(step): float(np.mean(watch.losses[max(0, step - 5) : step])) for step in (10, 20, 40, 80, 160) if step <= watch.steps},
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
