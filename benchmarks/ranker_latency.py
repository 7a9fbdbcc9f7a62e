"""Cost of one ranking request, model alone, as the service scores it: SAM, IFA and DIN beside the same weights with the history tiled.

    python -m benchmarks.ranker_latency                              # about two minutes on one core
    python -m benchmarks.ranker_latency --lengths 1000 --candidates 200 --width 32

The tiled twins embed the history once, build [C, L, 4D] features as the papers write them and put them through the same MLP; before anything is
timed, their logits must equal the models'. "ifa, stored state" has the user's state already, as the service keeps it. All models of a size take turns
within one loop, so that a busy machine is busy for all of them. CPU ms are processor time of all threads, wall ms what one request waits.
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

from longtrail.config import DINSettings, IFASettings, SAMSettings
from longtrail.files import write_json
from longtrail.models.attention.fused import SharedKeys, serving
from longtrail.models.contracts import Candidates, Context, History, Sizes
from longtrail.models.embedding import RECENT_EVENTS
from longtrail.models.order import newest
from longtrail.models.rankers.din import DIN, TargetAttention
from longtrail.models.rankers.ifa import IFA
from longtrail.models.rankers.sam import SAM, AttentionPass

SIZES = Sizes(items=100_000, categories=100, actions=5)
SEED = 0
Request = tuple[History, Candidates, Context]


def make_request(length: int, candidates: int, sizes: Sizes = SIZES, requests: int = 1) -> Request:
    """Users with full histories, all ids uniform."""
    random = torch.Generator().manual_seed(SEED)

    def ids(largest: int, count: int) -> Tensor:
        return torch.randint(1, largest + 1, (requests, count), generator=random)

    history = History(
        items_BL=ids(sizes.items, length),
        categories_BL=ids(sizes.categories, length),
        actions_BL=ids(sizes.actions, length),
        times_BL=ids(10**15, length),
        lengths_B=torch.full((requests,), length),
    )
    shown = Candidates(
        items_BC=ids(sizes.items, candidates),
        categories_BC=ids(sizes.categories, candidates),
        statistics_BCF=torch.randn(requests, candidates, 3, generator=random),
        lengths_B=torch.full((requests,), candidates),
    )
    return history, shown, Context(statistics_BG=torch.randn(requests, 3, generator=random), times_B=torch.full((requests,), 10**15))


def cpu_ms(call: Callable[[], Any], seconds: float = 1.0) -> float:
    """Median milliseconds of processor time of a call, all threads together; the first three are not counted."""
    taken: list[float] = []
    while len(taken) < 6 or (sum(taken) < seconds and len(taken) < 200):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return 1000 * float(np.median(taken[3:]))


def request_cpu_ms(ranker: nn.Module, request: Request) -> float:
    """cpu_ms of one request, scored as serving.scoring.Scorer does."""
    ranker.eval()
    with torch.inference_mode(), serving():
        return cpu_ms(partial(ranker, *request))


def tiled_pairs(keys_BLD: Tensor, *queries_BCD: Tensor) -> tuple[Tensor, ...]:
    """Everything as [B, C, L, D], with memory of its own, as a model that takes (candidate, history) rows gets it."""
    shape = (*queries_BCD[0].shape[:2], *keys_BLD.shape[1:])
    return keys_BLD.unsqueeze(1).expand(shape).contiguous(), *(query.unsqueeze(2).expand(shape) for query in queries_BCD)


def tiled_sam_pass(layer: AttentionPass, keys: SharedKeys, mask_BL: Tensor, query_BCD: Tensor, memory_BCD: Tensor) -> tuple[Tensor, Tensor]:
    """AttentionPass.forward, sigmoid weights, with [B, C, L, 4D] features."""
    k, q, m = tiled_pairs(keys.keys_BLD, query_BCD, memory_BCD)
    z = torch.cat([q - k, q * k, m - k, m * k], dim=-1)
    hidden = torch.sigmoid(z @ layer.first.flatten(0, 1) + layer.first_bias)
    assert layer.second_bias is not None
    weights_BCL = torch.sigmoid((hidden @ layer.second + layer.second_bias).masked_fill(~mask_BL.unsqueeze(1), -torch.inf))
    return weights_BCL, weights_BCL @ keys.keys_BLD


def tiled_din_attention(attention: TargetAttention, keys_BLD: Tensor, mask_BL: Tensor, query_BCD: Tensor) -> tuple[Tensor, Tensor]:
    """TargetAttention.forward, one hidden layer and linear weights, with [B, C, L, 4D] features."""
    k, q = tiled_pairs(keys_BLD, query_BCD)
    z = torch.cat([q, k, q - k, q * k], dim=-1)
    hidden = torch.sigmoid(z @ attention.first.flatten(0, 1) + attention.first_bias)
    assert attention.last_bias is not None
    weights_BCL = (hidden @ attention.last + attention.last_bias).masked_fill(~mask_BL.unsqueeze(1), 0)
    return weights_BCL, weights_BCL @ keys_BLD


def make_calls(length: int, candidates: int, width: int) -> dict[str, Callable[[], Tensor]]:
    """Logits by name. Weights in eval mode; each twin shares its model's."""
    torch.manual_seed(SEED)
    request = make_request(length, candidates)
    sam = SAM(SAMSettings(max_history=length, width=width), SIZES).eval()
    ifa = IFA(IFASettings(max_history=length, width=width), SIZES).eval()
    din = DIN(DINSettings(max_history=length, width=width), SIZES).eval()
    tiled_sam, tiled_din = copy.deepcopy(sam), copy.deepcopy(din)
    for layer in tiled_sam.passes:
        layer.forward = partial(tiled_sam_pass, layer)  # type: ignore[method-assign, arg-type]
    tiled_din.attention.forward = partial(tiled_din_attention, tiled_din.attention)  # type: ignore[method-assign]
    models: dict[str, nn.Module] = {"sam": sam, "sam, tiled": tiled_sam, "ifa": ifa, "din": din, "din, tiled": tiled_din}
    calls: dict[str, Callable[[], Tensor]] = {name: partial(model, *request) for name, model in models.items()}
    with torch.inference_mode():
        state = ifa.state(request[0])
    newest_events = newest(request[0], max(RECENT_EVENTS, ifa.settings.recent_events))
    calls["ifa, stored state"] = partial(ifa, newest_events, *request[1:], state=state)
    return calls


def check_equal(calls: dict[str, Callable[[], Tensor]]) -> None:
    """Raises AssertionError where a twin's logits differ from its model's."""
    for name, call in calls.items():
        difference = (call() - calls[name.split(",")[0]]()).abs().max().item()
        assert difference < 1e-3, f"{name}: logits differ by {difference}"


def time_in_turns(calls: dict[str, Callable[[], Any]], repeats: int, seconds: float) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) milliseconds of each call, `repeats` times in turns; one whose share of `seconds` is used up sits out the rest (but has 10)."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            if len(taken[name]) >= 10 and sum(wall for wall, _ in taken[name]) > 1000 * seconds:
                continue
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            taken[name].append((1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)))
    return taken


def measure(length: int, candidates: int, width: int, repeats: int, seconds: float) -> list[dict[str, Any]]:
    """A row a model."""
    with torch.inference_mode(), serving():
        calls = make_calls(length, candidates, width)
        check_equal(calls)
        taken = {name: np.array(times) for name, times in time_in_turns(calls, repeats, seconds).items()}
    return [
        {
            "model": name,
            "length": length,
            "candidates": candidates,
            "width": 2 * width,
            "calls": len(ms),
            "cpu_ms": float(np.median(ms[:, 1])),
            "p50_ms": float(np.percentile(ms[:, 0], 50)),
            "p99_ms": float(np.percentile(ms[:, 0], 99)),
            "min_ms": float(ms[:, 0].min()),
        }
        for name, ms in taken.items()
    ]


def device_name(device: str = "cpu") -> str:
    """Of the GPU, or of the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def hardware(device: str = "cpu") -> dict[str, Any]:
    """What the figures were taken on, and how busy it was."""
    return {
        "processor": device_name(),
        **({} if torch.device(device).type == "cpu" else {"device": device_name(device)}),
        "cores": psutil.cpu_count(),
        "load": psutil.getloadavg()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def show(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = ["| L | C | D | model | CPU ms | p50 ms | p99 ms | least ms | calls |", "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row['cpu_ms']:.2f} | {row['p50_ms']:.2f} | {row['p99_ms']:.2f} | {row['min_ms']:.2f} | {row['calls']}"
        lines.append(f"| {row['length']} | {row['candidates']} | {row['width']} | {row['model']} | {figures} |")
    return "\n".join(lines)


def main(
    lengths: Annotated[list[int], typer.Option(help="history lengths L")] = [200, 1_000],  # noqa: B006
    candidates: Annotated[list[int], typer.Option(help="candidates C of the request")] = [50, 200, 500],  # noqa: B006
    repeats: Annotated[int, typer.Option(help="calls of each model")] = 300,
    seconds: Annotated[float, typer.Option(help="most time for one model at one size")] = 15.0,
    width: Annotated[int, typer.Option(help="width of item and of category: D is twice that")] = 16,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    out: Annotated[Path, typer.Option(help="where the figures go")] = Path("build/benchmarks/ranker_latency.json"),
) -> None:
    """Measure the cost of one request, model alone."""
    torch.set_num_threads(threads)
    rows = []
    for length in lengths:
        for count in candidates:
            rows += measure(length, count, width, repeats, seconds)
            print(f"L = {length}, C = {count} done", flush=True)
    write_json(out, {"hardware": hardware(), "rows": rows})
    print(show(rows))
    print(f"{hardware()}; written to {out}")


if __name__ == "__main__":
    typer.run(main)
