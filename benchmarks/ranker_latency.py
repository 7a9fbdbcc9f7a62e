"""Latency of one ranking request, model alone: SAM and DIN as they are, beside the same weights with the history tiled to every candidate.

    python -m benchmarks.ranker_latency                              # about two minutes on 2 cores
    python -m benchmarks.ranker_latency --lengths 1000 --candidates 200 --compiled

The tiled twins build [C, L, 4D] features as the papers write them and put them through the same MLP; before anything is timed, their logits
must equal the factored models'. All models of a size take turns within one loop, so that a busy machine is busy for all of them.
"""

import copy
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from torch import Tensor, nn

from longtrail.config import DINSettings, SAMSettings
from longtrail.files import write_json
from longtrail.models.contracts import Candidates, Context, History, Sizes
from longtrail.models.rankers.din import DIN, TargetAttention
from longtrail.models.rankers.sam import SAM, AttentionPass

SIZES = Sizes(items=100_000, categories=100, actions=5)
SEED = 0
Request = tuple[History, Candidates, Context]


def make_request(length: int, candidates: int) -> Request:
    """One user with a full history, all ids uniform."""
    random = torch.Generator().manual_seed(SEED)

    def ids(largest: int, count: int) -> Tensor:
        return torch.randint(1, largest + 1, (1, count), generator=random)

    history = History(
        items_BL=ids(SIZES.items, length),
        categories_BL=ids(SIZES.categories, length),
        actions_BL=ids(SIZES.actions, length),
        times_BL=ids(10**15, length),
        lengths_B=torch.tensor([length]),
    )
    shown = Candidates(
        items_BC=ids(SIZES.items, candidates),
        categories_BC=ids(SIZES.categories, candidates),
        statistics_BCF=torch.randn(1, candidates, 3, generator=random),
        lengths_B=torch.tensor([candidates]),
    )
    return history, shown, Context(statistics_BG=torch.randn(1, 3, generator=random), times_B=torch.tensor([10**15]))


def tiled_pairs(keys_BLD: Tensor, *queries_BCD: Tensor) -> tuple[Tensor, ...]:
    """Everything as [B, C, L, D], with memory of its own, as a model that takes (candidate, history) rows gets it."""
    shape = (*queries_BCD[0].shape[:2], *keys_BLD.shape[1:])
    return keys_BLD.unsqueeze(1).expand(shape).contiguous(), *(query.unsqueeze(2).expand(shape) for query in queries_BCD)


def tiled_sam_pass(layer: AttentionPass, keys_BLD: Tensor, mask_BL: Tensor, query_BCD: Tensor, memory_BCD: Tensor) -> tuple[Tensor, Tensor]:
    """AttentionPass.forward, sigmoid weights, with [B, C, L, 4D] features."""
    k, q, m = tiled_pairs(keys_BLD, query_BCD, memory_BCD)
    z = torch.cat([q - k, q * k, m - k, m * k], dim=-1)
    hidden = torch.sigmoid(z @ layer.first.flatten(0, 1) + layer.first_bias)
    assert layer.second_bias is not None
    weights_BCL = torch.sigmoid((hidden @ layer.second + layer.second_bias).masked_fill(~mask_BL.unsqueeze(1), -torch.inf))
    return weights_BCL, weights_BCL @ keys_BLD


def tiled_din_attention(attention: TargetAttention, keys_BLD: Tensor, mask_BL: Tensor, query_BCD: Tensor) -> tuple[Tensor, Tensor]:
    """TargetAttention.forward, one hidden layer and linear weights, with [B, C, L, 4D] features."""
    k, q = tiled_pairs(keys_BLD, query_BCD)
    z = torch.cat([q, k, q - k, q * k], dim=-1)
    hidden = torch.sigmoid(z @ attention.first.flatten(0, 1) + attention.first_bias)
    assert attention.last_bias is not None
    weights_BCL = (hidden @ attention.last + attention.last_bias).masked_fill(~mask_BL.unsqueeze(1), 0)
    return weights_BCL, weights_BCL @ keys_BLD


def make_models(length: int, *, compiled: bool) -> dict[str, nn.Module]:
    """Weights in eval mode; each twin shares its model's."""
    torch.manual_seed(SEED)
    sam = SAM(SAMSettings(max_history=length), SIZES).eval()
    din = DIN(DINSettings(max_history=length), SIZES).eval()
    tiled_sam, tiled_din = copy.deepcopy(sam), copy.deepcopy(din)
    for layer in tiled_sam.passes:
        layer.forward = partial(tiled_sam_pass, layer)  # type: ignore[method-assign, arg-type]
    tiled_din.attention.forward = partial(tiled_din_attention, tiled_din.attention)  # type: ignore[method-assign]
    models: dict[str, nn.Module] = {"sam": sam, "sam tiled": tiled_sam, "din": din, "din tiled": tiled_din}
    if compiled:
        models["sam compiled"] = torch.compile(sam)  # type: ignore[assignment]
        models["din compiled"] = torch.compile(din)  # type: ignore[assignment]
    return models


def check_equal(models: dict[str, nn.Module], request: Request) -> None:
    """Raises AssertionError where a twin's logits differ from its model's."""
    for name, model in models.items():
        difference = (model(*request) - models[name.split()[0]](*request)).abs().max().item()
        assert difference < 1e-3, f"{name}: logits differ by {difference}"


def time_in_turns(calls: dict[str, Callable[[], Any]], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, `repeats` times in turns; one whose share of `seconds` is used up sits out the rest (but has at least 10)."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            if len(taken[name]) >= 10 and sum(taken[name]) > 1000 * seconds:
                continue
            start = time.perf_counter()
            call()
            taken[name].append(1000 * (time.perf_counter() - start))
    return taken


def measure(length: int, candidates: int, repeats: int, seconds: float, *, compiled: bool) -> list[dict[str, Any]]:
    """A row a model."""
    models, request = make_models(length, compiled=compiled), make_request(length, candidates)
    with torch.inference_mode():
        check_equal(models, request)
        taken = time_in_turns({name: partial(model, *request) for name, model in models.items()}, repeats, seconds)
    return [
        {
            "model": name,
            "length": length,
            "candidates": candidates,
            "calls": len(ms),
            "p50_ms": float(np.percentile(ms, 50)),
            "p99_ms": float(np.percentile(ms, 99)),
            "min_ms": min(ms),
        }
        for name, ms in taken.items()
    ]


def hardware() -> dict[str, Any]:
    """What the figures were taken on, and how busy it was."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "load": psutil.getloadavg()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def show(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = ["| L | C | model | p50 ms | p99 ms | least ms | calls |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row['p50_ms']:.2f} | {row['p99_ms']:.2f} | {row['min_ms']:.2f} | {row['calls']}"
        lines.append(f"| {row['length']} | {row['candidates']} | {row['model']} | {figures} |")
    return "\n".join(lines)


def main(
    lengths: Annotated[list[int], typer.Option(help="history lengths L")] = [200, 1_000],  # noqa: B006
    candidates: Annotated[list[int], typer.Option(help="candidates C of the request")] = [50, 200, 500],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="calls of each model")] = 300,
    seconds: Annotated[float, typer.Option(help="most time for one model at one size")] = 15.0,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    compiled: Annotated[bool, typer.Option(help="torch.compile too (needs a C++ compiler; half a minute a model)")] = False,
    out: Annotated[Path, typer.Option(help="where the figures go")] = Path("build/benchmarks/ranker_latency.json"),
) -> None:
    """Measure the latency of one request, model alone."""
    torch.set_num_threads(threads)
    rows = []
    for length in lengths:
        for count in candidates:
            rows += measure(length, count, repeats, seconds, compiled=compiled)
            print(f"L = {length}, C = {count} done", flush=True)
    write_json(out, {"hardware": hardware(), "rows": rows})
    print(show(rows))
    print(f"{hardware()}; written to {out}")


if __name__ == "__main__":
    typer.run(main)
