"""RePlay's SASRec on the next-item workload, for `--rival`. Needs an environment with replay-rec[torch] and nothing of Longtrail:

python -m venv RIVAL && RIVAL/bin/pip install torch==2.13.0 "replay-rec[torch]==0.22.0"        # RIVAL: a folder outside the repository
python -m benchmarks.training --rival "RePlay=RIVAL/bin/python benchmarks/training/rivals/replay_sasrec.py --seconds 30 --threads 1"
"""

import argparse
import json
import resource
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning
import numpy as np
import pandas as pd
import torch
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.sequential import SasRec
from replay.nn.transform.template import make_default_sasrec_transforms

WARM_UP = 3  # steps before the clock starts
LENGTH, WIDTH, BATCH = 200, 64, 128


class Watch(lightning.Callback):
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
            self.users += len(batch["padding_mask"])
            self.cpu, self.wall = time.process_time() - self.start[0], time.perf_counter() - self.start[1]
        if self.steps >= WARM_UP + 5 and self.cpu >= self.seconds:
            trainer.should_stop = True


def sequences(folder: Path, file: Path) -> int:
    """The workload's histories as the library's data module reads them, items from 0; how many items there are, which is the padding's id too."""
    segment = folder / "history" / json.loads((folder / "history" / "manifest.json").read_text())["segments"][0]["name"]
    items, offsets = np.load(segment / "items.npy"), np.load(segment / "offsets.npy")
    lists = [row for row in np.split(items.astype(np.int64) - 1, offsets[1:-1]) if len(row)]
    pd.DataFrame({"item_id": lists}).to_parquet(file)
    return len(pd.read_parquet(folder / "catalogue.parquet", columns=["item_id"]))


def main() -> None:
    """Print one line of JSON."""
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    options.add_argument("--seconds", type=float, default=30.0)
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    watch = Watch(chosen.seconds)
    with TemporaryDirectory() as place:
        file = Path(place) / "train.parquet"
        items = sequences(chosen.folder, file)
        column = TensorFeatureInfo(
            "item_id", is_seq=True, feature_type=FeatureType.CATEGORICAL, embedding_dim=WIDTH, padding_value=items, cardinality=items,
            feature_hint=FeatureHint.ITEM_ID, feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
        )  # fmt: skip
        schema = TensorSchema([column])
        shape = {"item_id": {"shape": LENGTH + 1, "padding": items}}
        transforms = {"train": make_default_sasrec_transforms(schema)["train"]}
        data = ParquetModule(BATCH, {"train": shape}, transforms, train_path=str(file))
        model = SasRec.from_params(schema, embedding_dim=WIDTH, num_heads=2, num_blocks=2, max_sequence_length=LENGTH, dropout=0.2)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
        lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1000, callbacks=[watch], limit_val_batches=0, **quiet).fit(
            LightningModule(model), datamodule=data
        )
    figures = {
        "steps": watch.steps - WARM_UP,
        "per_cpu_second": watch.users / watch.cpu,
        "per_second": watch.users / watch.wall,
        "loss_at": {str(step): float(np.mean(watch.losses[max(0, step - 5) : step])) for step in (10, 20, 40, 80, 160) if step <= watch.steps},
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
