"""Training steps of SASRec over a large catalogue: a table of item vectors beside RecJPQ, in time and memory.

    python -m benchmarks.recjpq_training                    # a million items, width 128, gBCE: about a minute on 2 cores

Each is measured in a process of its own, because peak memory is the process's. A step is what training does: the loss of a batch of windows, its
gradient, clipping, AdamW. Ids are uniform, codes random: neither time nor memory depends on which they are.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.ranker_latency import hardware
from longtrail.config import DenseItemsSettings, RecJPQItemsSettings, SASRecSettings
from longtrail.costs import peak_memory
from longtrail.examples import SequenceBatch
from longtrail.files import write_json
from longtrail.losses import next_item_loss
from longtrail.models.contracts import History, Sizes
from longtrail.models.encoders.sasrec import SASRec

SLOTS = {"dense": DenseItemsSettings(), "recjpq": RecJPQItemsSettings(splits=8)}


def make_batch(items: int, windows: int, length: int) -> SequenceBatch:
    """Full windows of uniform ids."""
    ids_BL = torch.randint(1, items + 1, (windows, length + 1))
    ones_BL, lengths_B = torch.ones(windows, length, dtype=torch.int64), torch.full((windows,), length)
    history = History(items_BL=ids_BL[:, :-1], categories_BL=ones_BL, actions_BL=ones_BL, times_BL=ones_BL, lengths_B=lengths_B)
    return SequenceBatch(history=history, targets_BL=ids_BL[:, 1:], first_targets_B=ids_BL[:, 0], lengths_B=lengths_B, users_B=lengths_B)


def measure(slot: str, *, items: int, width: int, windows: int, length: int, steps: int, threads: int) -> dict[str, Any]:
    """One row: seconds a step (the first two are left out) and bytes, those of the process before the model was made taken off."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    before = peak_memory()
    settings = SASRecSettings(width=width, max_history=length, loss="gbce", items=SLOTS[slot])
    model = SASRec(settings, Sizes(items=items, categories=1, actions=1)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    taken = []
    for _ in range(steps + 2):
        batch = make_batch(items, windows, length)
        start = time.perf_counter()
        loss = next_item_loss(model.training_pairs(batch), model.items, settings)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        taken.append(time.perf_counter() - start)
    held = [tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items() if name.startswith("items.")]
    return {
        "items": slot,
        "catalogue": items,
        "parameters": sum(p.numel() for p in model.parameters()),
        "item_bytes": sum(held),
        "step_s": float(np.median(taken[2:])),
        "peak_bytes": peak_memory() - before,
    }


def show(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = ["| items | catalogue | parameters | item side on disk, MB | step, ms | peak memory, MB |", "|---|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row['parameters']:,} | {row['item_bytes'] / 1e6:.1f} | {1000 * row['step_s']:.0f} | {row['peak_bytes'] / 1e6:,.0f}"
        lines.append(f"| {row['items']} | {row['catalogue']:,} | {figures} |")
    return "\n".join(lines)


def main(
    items: Annotated[int, typer.Option(help="size of the catalogue")] = 1_000_000,
    width: Annotated[int, typer.Option(help="embedding width")] = 128,
    windows: Annotated[int, typer.Option(help="windows of a batch")] = 32,
    length: Annotated[int, typer.Option(help="events of a window")] = 100,
    steps: Annotated[int, typer.Option(help="timed steps")] = 10,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    only: Annotated[str | None, typer.Option(help="measure this one here and print JSON")] = None,
    out: Annotated[Path, typer.Option(help="where the figures go")] = Path("build/benchmarks/recjpq_training.json"),
) -> None:
    """Measure training steps with a dense table and with RecJPQ."""
    shape = {"items": items, "width": width, "windows": windows, "length": length, "steps": steps, "threads": threads}
    if only is not None:
        print(json.dumps(measure(only, **shape)))
        return
    rows = []
    for slot in SLOTS:
        arguments = [f"--{name}={value}" for name, value in shape.items()]
        done = subprocess.run([sys.executable, "-m", __spec__.name, *arguments, "--only", slot], check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    torch.set_num_threads(threads)
    write_json(out, {"hardware": hardware(), "shape": shape, "rows": rows})
    print(show(rows))
    print(f"{hardware()}; written to {out}")


if __name__ == "__main__":
    typer.run(main)
