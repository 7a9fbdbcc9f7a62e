"""A model of FuxiCTR's LongCTR collection on the click workload, for `--click-rival`. Needs an environment with fuxictr and nothing of Longtrail:

python -m venv RIVAL && RIVAL/bin/pip install torch==2.13.0 fuxictr==2.3.10        # RIVAL: a folder outside the repository
python -m benchmarks.training --click-rival "FuxiCTR DIN=RIVAL/bin/python benchmarks/training/rivals/fuxictr_click.py --model DIN --seconds 10"

Its own model, loader, training step and optimiser; D = 32 + 32 and the hidden layers as ours have them, all else as FuxiCTR has it. Afterwards one
request: 200 candidates of one user, each a row with its own copy of the history, as the library takes them.
"""

import argparse
import json
import logging
import os
import resource
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from fuxictr.features import FeatureMap
from model_zoo import LongCTR
from model_zoo.LongCTR.longctr_dataloader import LongCTRDataLoader

WARM_UP = 2  # steps before the clock starts
STATISTICS = 4  # width of the vector that FuxiCTR makes of each number of user and item


def prepare(folder: Path, place: Path, length: int) -> FeatureMap:
    """The workload as the library's loader reads it: requests, histories and catalogue in a file each; and what it must know of the columns."""
    segment = folder / "history" / json.loads((folder / "history" / "manifest.json").read_text())["segments"][0]["name"]
    items, offsets = np.load(segment / "items.npy"), np.load(segment / "offsets.npy")
    pd.DataFrame({"full_item_seq": np.split(items, offsets[1:-1])}).to_parquet(place / "users.parquet")
    catalogue = pd.read_parquet(folder / "catalogue.parquet", columns=["item_id", "category_id"])
    ids = np.concatenate([[0], catalogue["item_id"]])
    things = pd.DataFrame({"item_index": ids, "item": ids, "category": np.concatenate([[0], catalogue["category_id"]])})
    things.to_parquet(place / "items.parquet")
    examples = pd.read_parquet(folder / "examples" / "train.parquet")
    known = {"request_id", "user_id", "item_id", "timestamp", "position", "click", "history_length"}
    numbers = [name for name in examples.columns if name not in known and pd.api.types.is_numeric_dtype(examples[name])]
    rows = {
        "user_index": examples["user_id"],
        "item_index": examples["item_id"],
        "seq_len": np.full(len(examples), length),
        "click": examples["click"],
    }
    pd.DataFrame({**rows, **{name: examples[name] for name in numbers}}).astype("int64").to_parquet(place / "train.parquet")
    columns = FeatureMap("clicks", str(place))
    for name in ("user_index", "item_index", "seq_len"):
        columns.features[name] = {"type": "meta"}
    for name in numbers:
        columns.features[name] = {"type": "numeric", "source": "user", "embedding_dim": STATISTICS}
    for name in ("item", "category"):
        vocabulary = int(things[name].max()) + 1
        columns.features[name] = {"type": "categorical", "source": "item", "vocab_size": vocabulary, "padding_idx": 0, "embedding_dim": 32}
    columns.labels = ["click"]
    columns.num_fields = columns.get_num_fields()
    columns.set_column_index()
    return columns


def train(model: Any, batches: Any, seconds: float) -> dict[str, Any]:
    """Samples and processor seconds of the library's own training step, reading included, after the warm-up."""
    model._max_gradient_norm, samples, losses = 10.0, 0, []
    model.train()
    begun: tuple[float, float] = (0.0, 0.0)
    cpu = wall = 0.0
    while True:
        for index, batch in enumerate(batches):
            model._batch_index = index
            losses.append(float(model.train_step(batch).item()))
            if len(losses) == WARM_UP:
                begun = time.process_time(), time.perf_counter()
            elif len(losses) > WARM_UP:
                samples += len(batch[2])
                cpu, wall = time.process_time() - begun[0], time.perf_counter() - begun[1]
            if len(losses) >= WARM_UP + 3 and cpu >= seconds:
                at = {str(step): float(np.mean(losses[max(0, step - 5) : step])) for step in (10, 20, 40, 80, 160) if step <= len(losses)}
                return {"steps": len(losses) - WARM_UP, "per_cpu_second": samples / cpu, "per_second": samples / wall, "loss_at": at}


@torch.no_grad()
def request_cpu_ms(model: Any, batches: Any, candidates: int) -> float:
    """Median processor milliseconds of one request's forward pass; rows made before the clock starts."""
    model.eval()
    columns = batches.dataset.darray[:candidates].copy()
    columns[:, batches.dataset.column_index["user_index"]] = columns[0, batches.dataset.column_index["user_index"]]
    request, taken = batches.collate_fn(list(columns)), []
    while len(taken) < 4 or (sum(taken) < 3 and len(taken) < 50):
        begun = time.process_time()
        model((dict(request[0]), dict(request[1]), request[2]))
        taken.append(time.process_time() - begun)
    return 1000 * statistics.median(taken[1:])


def main() -> None:
    """Print one line of JSON."""
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    options.add_argument("--model", required=True, choices=["DIN", "SIM", "ETA", "SDIM", "TWIN"])
    options.add_argument("--length", type=int, default=1000)
    options.add_argument("--batch", type=int, default=256)
    options.add_argument("--candidates", type=int, default=200)
    options.add_argument("--seconds", type=float, default=30.0)
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    with TemporaryDirectory() as name:
        place = Path(name)
        columns = prepare(chosen.folder, place, chosen.length)
        batches = LongCTRDataLoader(
            columns, os.fspath(place / "train.parquet"), os.fspath(place / "users.parquet"), os.fspath(place / "items.parquet"),
            batch_size=chosen.batch, shuffle=True, num_workers=0, max_len=chosen.length,
        )  # fmt: skip
        model = getattr(LongCTR, chosen.model)(
            columns, model_id=chosen.model, gpu=-1, embedding_dim=32, dnn_hidden_units=[200, 80], attention_hidden_units=[32], attention_dim=64,
            learning_rate=1e-3, optimizer="adam", loss="binary_crossentropy", metrics=["AUC"], model_root=name, verbose=0,
        )  # fmt: skip
        figures = train(model, batches, chosen.seconds)
        figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        figures["request_cpu_ms"] = request_cpu_ms(model, batches, chosen.candidates)
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
