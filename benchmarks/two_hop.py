"""Does training teach SAM's memory to follow a pointer? Two hops, with and without feedback, beside a DIN with as many parameters.

    python -m benchmarks.two_hop                       # the table of docs/experiments/sam-two-hop.md: a quarter of an hour on one core
    python -m benchmarks.two_hop --only "din" --steps 500

B requests, L history, D width, P passes. Each history is L items [own code ; code of the item it points to ; its bit], codes of ±1, new in every
batch; pointers are one cycle through the history. The candidate is the code of one item; the label is the bit of the item that it points to. So a
model must read the item that the candidate names, and then ask for what it has read. Passes that do not see the memory can only guess from what all
the items have in common, which is the less the more there are. With a curriculum, items point to themselves at first: the share of such histories
falls to zero over the first half of training, so that one hop is learnt before two. Vectors are given; only what reads them is trained.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.ranker_latency import hardware
from longtrail.config import DINSettings, SAMSettings
from longtrail.files import write_json
from longtrail.metrics import auc
from longtrail.models.contracts import Sizes
from longtrail.models.rankers.din import TargetAttention
from longtrail.models.rankers.sam import SAM

CODE, BIT = 16, 4
D = 2 * CODE + BIT
BATCH, TEST = 256, 20_000
SIZES = Sizes(items=1, categories=1, actions=1)


def make_task(rows: int, length: int, to_themselves: float, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """keys [B, L, D], queries [B, 1, D], labels [B]. In a share of the histories `to_themselves` every item points to itself."""
    codes_BLc = torch.randint(0, 2, (rows, length, CODE), generator=random) * 2.0 - 1
    bits_BL = torch.randint(0, 2, (rows, length), generator=random).float()
    order_BL = torch.rand(rows, length, generator=random).argsort(1)
    points_BL = torch.empty_like(order_BL).scatter_(1, order_BL, order_BL.roll(-1, 1))
    self_B = torch.rand(rows, generator=random) < to_themselves
    points_BL = torch.where(self_B.unsqueeze(1), torch.arange(length), points_BL)
    pointed_BLc = codes_BLc.gather(1, points_BL.unsqueeze(-1).expand(-1, -1, CODE))
    keys_BLD = torch.cat([codes_BLc, pointed_BLc, (bits_BL * 2 - 1).unsqueeze(-1).expand(-1, -1, BIT)], dim=-1)
    asked_B1 = torch.randint(0, length, (rows, 1), generator=random)
    own_B1c = codes_BLc.gather(1, asked_B1.unsqueeze(-1).expand(-1, -1, CODE))
    labels_B = bits_BL.gather(1, points_BL.gather(1, asked_B1)).squeeze(1)
    return keys_BLD, functional.pad(own_B1c, (0, D - CODE)), labels_B


class Reader(nn.Module):
    """Logits [B] from keys and queries: a SAM's passes, or a DIN's attention, and a small head."""

    def __init__(self, settings: SAMSettings | DINSettings) -> None:
        super().__init__()
        self.sam = SAM(settings, SIZES) if isinstance(settings, SAMSettings) else None
        self.din = TargetAttention(D, settings.attention_hidden, settings.attention_weights) if isinstance(settings, DINSettings) else None
        read = settings.passes * D if isinstance(settings, SAMSettings) else 2 * D
        self.head = nn.Sequential(nn.Linear(read, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, keys_BLD: Tensor, query_B1D: Tensor) -> Tensor:
        mask_BL = torch.ones(keys_BLD.shape[:2], dtype=torch.bool)
        if self.sam is not None:
            parts = self.sam.read(keys_BLD, mask_BL, mask_BL.sum(1), query_B1D)
        else:
            assert self.din is not None
            _, read_B1D = self.din(keys_BLD, mask_BL, query_B1D)
            parts = [read_B1D, read_B1D * query_B1D]
        return self.head(torch.cat(parts, dim=-1)).view(-1)

    def used_parameters(self) -> list[nn.Parameter]:
        """Those of attention, cell and head; the tables of SAM's embedding and its own head are not used here."""
        parts = [self.head, self.din] if self.sam is None else [self.head, self.sam.passes, self.sam.cell]
        return [parameter for part in parts if part is not None for parameter in part.parameters()]


def train(settings: SAMSettings | DINSettings, *, length: int, curriculum: bool, steps: int, seed: int) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(seed)
    random, model = torch.Generator().manual_seed(seed), Reader(settings)
    parameters = model.used_parameters()
    optimiser = torch.optim.Adam(parameters, lr=3e-3)
    began, curve = time.perf_counter(), []
    for step in range(steps):
        share = max(0.0, 1 - 2 * step / steps) if curriculum else 0.0
        keys_BLD, query_B1D, labels_B = make_task(BATCH, length, share, random)
        loss = functional.binary_cross_entropy_with_logits(model(keys_BLD, query_B1D), labels_B)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if (step + 1) % max(1, steps // 8) == 0:
            curve.append(round(loss.item(), 3))
    with torch.no_grad():
        keys_BLD, query_B1D, labels_B = make_task(TEST, length, 0.0, torch.Generator().manual_seed(10_000 + seed))
        logits_B = model(keys_BLD, query_B1D)
        one_hop = make_task(TEST, length, 1.0, torch.Generator().manual_seed(20_000 + seed))
        one_hop_auc = auc(one_hop[2].numpy(), model(*one_hop[:2]).numpy())
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "auc": auc(labels_B.numpy(), logits_B.numpy()),
        "auc_self_pointing": one_hop_auc,
        "losses": curve,
        "seconds": time.perf_counter() - began,
    }


def sam(**changes: Any) -> SAMSettings:
    return SAMSettings(**({"width": D // 2, "compression": 0, "passes": 2} | changes))


Condition = tuple[SAMSettings | DINSettings, int, bool]
CONDITIONS: dict[str, Condition] = {  # settings, history length, curriculum
    "paper": (sam(), 8, False),
    "hidden 32": (sam(attention_hidden=32), 8, False),
    "hidden 32, curriculum": (sam(attention_hidden=32), 8, True),
    "hidden 32, mean, curriculum": (sam(attention_hidden=32, read_scale="mean"), 8, True),
    "softmax, hidden 32": (sam(attention_hidden=32, attention_weights="softmax"), 8, False),
    "softmax, hidden 32, curriculum": (sam(attention_hidden=32, attention_weights="softmax"), 8, True),
    "din, as many parameters": (DINSettings(attention_hidden=(70,), attention_weights="sigmoid"), 8, False),
    "long: paper": (sam(), 32, False),
    "long: hidden 32, curriculum": (sam(attention_hidden=32), 32, True),
    "long: hidden 32, mean, curriculum": (sam(attention_hidden=32, read_scale="mean"), 32, True),
    "long: hidden 32, three passes, curriculum": (sam(attention_hidden=32, passes=3), 32, True),
    "long: softmax, hidden 32": (sam(attention_hidden=32, attention_weights="softmax"), 32, False),
    "long: softmax, hidden 32, curriculum": (sam(attention_hidden=32, attention_weights="softmax"), 32, True),
    "long: din, as many parameters": (DINSettings(attention_hidden=(70,), attention_weights="sigmoid"), 32, False),
}


def main(
    only: Annotated[str, typer.Option(help="conditions whose name holds this")] = "",
    steps: Annotated[int, typer.Option(help="training steps of 256 requests")] = 2_500,
    seeds: Annotated[list[int], typer.Option(help="seeds")] = [0],  # noqa: B006
    out: Annotated[Path, typer.Option(help="where the figures go")] = Path("build/benchmarks/two_hop.json"),
) -> None:
    """Train every condition with and without feedback."""
    torch.set_num_threads(1)
    rows = []
    for name, (settings, length, curriculum) in CONDITIONS.items():
        if only not in name:
            continue
        variants = [settings.model_copy(update={"feedback": f}) for f in (True, False)] if isinstance(settings, SAMSettings) else [settings]
        for variant in variants:
            for seed in seeds:
                row = {"condition": name, "length": length, "feedback": getattr(variant, "feedback", None), "seed": seed}
                rows.append(row | train(variant, length=length, curriculum=curriculum, steps=steps, seed=seed))
                print(rows[-1], flush=True)
    write_json(out, {"hardware": hardware(), "steps": steps, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
