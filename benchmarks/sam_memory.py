"""Peak memory of a training step by length, at the sizes of the one figure in the code of SAM's authors: the table of docs/models/sam.md.

    python -m benchmarks.sam_memory                    # a minute on one core

Batches of 512 requests of one candidate, D = 32, 8 attention units; SAM with three passes and DIN with sigmoid weights. What is held beyond model
and batch, forward and backward, with each attention layer by torch (attention/fused.py) and by compiled code where that applies.
"""

from typing import Annotated

import torch
import typer

from benchmarks.models import peak_bytes
from benchmarks.ranker_latency import make_request
from longtrail.config import DINSettings, SAMSettings
from longtrail.models.attention import fused
from longtrail.models.contracts import Sizes
from longtrail.models.registry import build_model

SIZES = Sizes(items=1000, categories=20, actions=5)
LENGTHS = (50, 100, 200, 500, 1000)
NEVER = 1 << 62


def peak_mib(settings: DINSettings | SAMSettings, batch: int) -> float:
    """Of one training step at the settings' `max_history`, after a first one."""
    torch.manual_seed(0)
    model, request = build_model(settings, SIZES).train(), make_request(settings.max_history, 1, SIZES, batch)

    def step() -> None:
        model(*request).sum().backward()

    step()
    return peak_bytes(step) / 2**20


def table(batch: int, lengths: tuple[int, ...] = LENGTHS) -> dict[str, list[float]]:
    """MiB by length, by the model and by what its attention runs on."""
    found, usual = {}, fused.COMPILED_PAIRS
    try:
        for way, pairs in (("torch", NEVER), ("compiled", usual)):
            fused.COMPILED_PAIRS = pairs
            found[f"DIN, {way}"] = [peak_mib(DINSettings(attention_hidden=(8,), attention_weights="sigmoid", max_history=n), batch) for n in lengths]
            found[f"SAM 3P, {way}"] = [peak_mib(SAMSettings(max_history=n), batch) for n in lengths]
    finally:
        fused.COMPILED_PAIRS = usual
    return found


def main(batch: Annotated[int, typer.Option(help="requests of a step")] = 512) -> None:
    torch.set_num_threads(1)
    print(f"| MiB | {' | '.join(f'{n:,}' for n in LENGTHS)} |\n|---{'|---' * len(LENGTHS)}|")
    for name, row in table(batch).items():
        print(f"| {name} | {' | '.join(f'{mib:.0f}' for mib in row)} |")


if __name__ == "__main__":
    typer.run(main)
