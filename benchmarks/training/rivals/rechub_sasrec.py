"""torch-rechub's SASRec on the next-item workload, for `--rival`. Needs an environment with torch-rechub and nothing of Longtrail:

python -m venv RIVAL && RIVAL/bin/pip install torch==2.13.0 torch-rechub==0.9.0 pyarrow    # RIVAL: a folder outside the repository
python -m benchmarks.training --rival "torch-rechub=RIVAL/bin/python benchmarks/training/rivals/rechub_sasrec.py --seconds 30 --threads 1"

The model is the library's, the loop a plain one: version 0.9.0's trainer fails on a loss a position ("The size of tensor a must match", in its
pairwise loss). It has no softmax over the catalogue, only SASRec's own loss with one negative a position. So beside it stands our SASRec with BCE.
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
from torch_rechub.basic.features import SequenceFeature
from torch_rechub.models.matching import SASRec
from torch_rechub.utils.data import TorchDataset

WARM_UP = 3  # steps before the clock starts
LENGTH, WIDTH, BATCH = 200, 64, 128


def windows(folder: Path, items: int) -> dict[str, Any]:
    """The newest LENGTH inputs of each user, padded before them, with what came next and a negative at each place; all int64 [U, LENGTH]."""
    segment = folder / "history" / json.loads((folder / "history" / "manifest.json").read_text())["segments"][0]["name"]
    events, offsets = np.load(segment / "items.npy").astype(np.int64), np.load(segment / "offsets.npy")
    lengths_U = np.diff(offsets)
    kept = lengths_U > 1
    place_UL = offsets[1:][kept, None] - 1 - LENGTH + np.arange(LENGTH)
    there_UL = place_UL >= offsets[:-1][kept, None]
    seq, pos = (np.where(there_UL, events[np.maximum(place_UL + later, 0)], 0) for later in (0, 1))
    negatives = np.random.default_rng(0).integers(1, items + 1, seq.shape)
    return {"seq": seq, "pos": pos, "neg": np.where(there_UL, negatives, 0)}


def main() -> None:
    """Print one line of JSON."""
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    options.add_argument("--seconds", type=float, default=30.0)
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    items = len(pd.read_parquet(chosen.folder / "catalogue.parquet", columns=["item_id"]))
    x = windows(chosen.folder, items)
    shared = {"vocab_size": items + 1, "embed_dim": WIDTH, "pooling": "concat"}
    features = [SequenceFeature("seq", **shared), *(SequenceFeature(name, shared_with="seq", **shared) for name in ("pos", "neg"))]
    model = SASRec(features, max_len=LENGTH, dropout_rate=0.2, num_blocks=2, num_heads=2)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(TorchDataset(x, np.zeros(len(x["seq"]))), batch_size=BATCH, shuffle=True, drop_last=True)
    model.train()
    steps, cpu, wall, start = 0, 0.0, 0.0, (0.0, 0.0)
    while steps < WARM_UP + 5 or cpu < chosen.seconds:
        for batch, _ in loader:
            positive_BL, negative_BL = model(batch)
            losses_BL = torch.nn.functional.softplus(-positive_BL) + torch.nn.functional.softplus(negative_BL)
            loss = losses_BL[batch["pos"] > 0].mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            steps += 1
            if steps == WARM_UP:
                start = time.process_time(), time.perf_counter()
            elif steps > WARM_UP:
                cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
                if steps >= WARM_UP + 5 and cpu >= chosen.seconds:
                    break
    users = (steps - WARM_UP) * BATCH
    figures = {
        "steps": steps - WARM_UP,
        "per_cpu_second": users / cpu,
        "per_second": users / wall,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
