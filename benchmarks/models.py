"""Time and peak memory of every ranker, encoder and attention over the length of the history, and the slopes of both.

    python -m benchmarks.models --models full --models naive --models blossom     # the attentions
    python -m benchmarks.models --models sasrec --models sam --seconds 1          # every name that begins so
    python -m benchmarks.models                                                   # everything: about ten minutes on one core

Forward: one user, as the service scores (inference mode, compiled code; rankers: --candidates). Training: forward and backward in training mode, as a
learner asks and with freed memory kept; rankers --batch requests of --training-candidates, so that large batches take the compiled paths that
training takes, encoders one window with a target at every place; no loss, no optimiser. The models' own default sizes, full histories. All models of
a length take turns, so that a busy machine is busy for all of them. "full" is torch's scaled-dot-product attention, "naive" the same layer with its
L×L weights written out. Memory is what a call allocates at its highest, weights and inputs aside. A size that would take over the limits, by what the
one before took, is left out and named. Cells already in the file are not measured again where device, threads, torch, candidates and batch are the
same: a run that was stopped goes on, each cell with the commit and the hardware that it was measured with, and --fresh starts over.
"""

import copy
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import typer
from torch import Tensor, nn

from benchmarks.ranker_latency import device_name, hardware, make_request
from longtrail.config import BlossomSettings, RankerModel, RetrieverModel
from longtrail.examples import SequenceBatch
from longtrail.files import read_json, write_json
from longtrail.models.attention.blossom import BlossomAttention
from longtrail.models.attention.full import FullAttention
from longtrail.models.attention.fused import serving
from longtrail.models.contracts import Retriever, Sizes, WithAuxiliary
from longtrail.models.registry import build_model
from longtrail.training.memory import freed_memory_is_kept

SEED, WIDTH, HEADS = 0, 64, 2  # SASRec's default sizes
SIZES = Sizes(items=1_000, categories=100, actions=5)  # few, so that the gradient of the item table does not hide the rest
Cell = dict[str, Any]
Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a call is given, besides L, and where it runs: all that a figure depends on but the code."""

    candidates: int = 50  # of the request that a ranker scores
    batch: int = 16  # requests that it is trained on
    training_candidates: int = 8  # of each of them
    device: str = "cpu"
    threads: int = 1

    def key(self, name: str, length: int) -> str:
        """Of a cell in the file."""
        where = f"{device_name(self.device)}, {self.threads} threads, torch {torch.__version__}"
        return f"{name}|{length}|{where}|C = {self.candidates}, trained on {self.batch} × {self.training_candidates}"


class NaiveAttention(FullAttention):
    """Full attention with its L×L weights: what the paper's memory is compared with."""

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        q, k, v = self.inputs(x_BLD).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(2, 3)) * (D // self.heads) ** -0.5
        future_LL = torch.ones(L, L, dtype=torch.bool, device=x_BLD.device).triu(1)
        mixed_BHLd = scores.masked_fill(future_LL, -torch.inf).softmax(-1) @ v
        return self.output(mixed_BHLd.transpose(1, 2).reshape(B, L, D))


def attentions() -> dict[str, Callable[[int], nn.Module]]:
    made: dict[str, Callable[[int], nn.Module]] = {
        "full": lambda length: FullAttention(WIDTH, HEADS),
        "naive": lambda length: NaiveAttention(WIDTH, HEADS),
        "full, 4 heads": lambda length: FullAttention(WIDTH, 4),
        "blossom, 4 heads": lambda length: BlossomAttention(BlossomSettings(), WIDTH, 4),
    }
    for selector in get_args(BlossomSettings.model_fields["selector"].annotation):
        made[f"blossom {selector}"] = partial(_blossom, selector)
    return made


def _blossom(selector: Any, length: int) -> nn.Module:
    return BlossomAttention(BlossomSettings(selector=selector), WIDTH, HEADS)


def registered() -> dict[str, Callable[[int], nn.Module]]:
    """Every trained model of the registry by name, and those with an attention slot a second time with Blossom in it."""
    made: dict[str, Callable[[int], nn.Module]] = {}
    for union in (RetrieverModel, RankerModel):
        for settings in get_args(get_args(union)[0]):
            fields, kind = settings.model_fields, settings.model_fields["kind"].default
            if "learning_rate" not in fields:  # counted, not trained
                continue
            for attention in ("full", "blossom") if "attention" in fields else ("",):
                # Full attention as torch has it, like "full" and "naive" above: rotary positions would be a part of their own.
                positions = {"positions": "learned"} if attention == "full" else {}
                more = {"attention": {"kind": attention, **positions}} if attention else {}
                made[f"{kind} {attention}".strip()] = partial(_registered, settings, more)
    return made


def _registered(settings: Any, more: dict[str, Any], length: int) -> nn.Module:
    bound = {"max_history": length} if "max_history" in settings.model_fields else {}
    return build_model(settings(**more, **bound), SIZES)


def calls(module: nn.Module, length: int, work: Work) -> dict[str, Call]:
    """`forward` as in serving, and `training`: forward and backward of what a learner asks for."""
    served = module.to(work.device).eval()
    taught = copy.deepcopy(served).train()
    serve, learn = _runs(served, taught, length, work)

    def forward() -> None:
        with torch.inference_mode(), serving():
            serve()

    def training() -> None:
        torch.stack([made.square().sum() for made in learn()]).sum().backward()
        taught.zero_grad(set_to_none=True)

    return {"forward": forward, "training": training}


def _runs(served: Any, taught: Any, length: int, work: Work) -> tuple[Call, Callable[[], list[Tensor]]]:
    if isinstance(served, FullAttention | BlossomAttention):
        x = torch.randn(1, length, WIDTH, device=work.device, requires_grad=True)
        lengths = torch.tensor([length], device=work.device)
        return partial(served, x, lengths), lambda: [taught(x, lengths)]
    request = [part.to(work.device) for part in make_request(length, work.candidates, SIZES)]
    if isinstance(served, Retriever):
        history: Any = request[0]
        targets_BL = torch.cat([history.items_BL[:, 1:], history.items_BL[:, :1]], dim=1)
        none_B = torch.zeros_like(history.lengths_B)
        window = SequenceBatch(history=history, targets_BL=targets_BL, first_targets_B=none_B, lengths_B=history.lengths_B, users_B=none_B)
        return partial(served.user_vectors, history), lambda: [taught.training_pairs(window).states_TD]
    batch: list[Any] = [part.to(work.device) for part in make_request(length, work.training_candidates, SIZES, work.batch)]
    return partial(served, *request), lambda: taught.training_logits(*batch) if isinstance(taught, WithAuxiliary) else [taught(*batch)]


def peak_bytes(call: Call, device: torch.device | str = "cpu") -> int:
    """The most that a call holds at once, beyond what was there before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([0, *(change for _, change in changes)]).max())


def measure(made: dict[str, Call], seconds: float, device: torch.device) -> dict[str, Cell]:
    """Peak memory and times of each call, in turns, until each has used `seconds`, and at least three times: a first one may wait for fresh pages."""
    cells: dict[str, Cell] = {}
    for name, call in made.items():
        call()
        cells[name] = {"peak_mb": peak_bytes(call, device) / 1e6, "ms": []}
    busy = dict(made)
    while busy:
        for name, call in list(busy.items()):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken = cells[name]["ms"]
            taken.append(1000 * (time.perf_counter() - start))
            if sum(taken) > 1000 * seconds and len(taken) >= 3:
                del busy[name]
    return {
        name: {"peak_mb": cell["peak_mb"], "least_ms": min(cell["ms"]), "p50_ms": float(np.median(cell["ms"])), "calls": len(cell["ms"])}
        for name, cell in cells.items()
    }


def too_large(before: Cell | None, most_ms: float, most_mb: float) -> str | None:
    """Why a cell is left out: four times what half the length took is over a limit. Length by length, so that a doubling is what is foreseen."""
    if before is None:
        return None
    if 4 * before["training"]["least_ms"] > most_ms:
        return f"over {most_ms:.0f} ms"
    return f"over {most_mb:.0f} MB" if 4 * before["training"]["peak_mb"] > most_mb else None


def slope(lengths: list[int], values: list[float]) -> float:
    """Of the straight line through the logarithms; nan for fewer than two points."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0]) if len(lengths) > 1 else float("nan")


def table(cells: dict[tuple[str, int], Cell], names: list[str], lengths: list[int], kind: str, figure: str) -> str:
    """One figure by model and length in Markdown, with the slope over all lengths and over those from 1,024 on."""
    lines = [
        f"| {kind}, {figure} | " + " | ".join(f"{length:,}" for length in lengths) + " | slope | from 1,024 |",
        "|---" * (len(lengths) + 3) + "|",
    ]
    for name in names:
        found = {length: cells.get((name, length), {}).get(kind, {}).get(figure) for length in lengths}
        known = {length: value for length, value in found.items() if value}
        late = {length: value for length, value in known.items() if length >= 1024}
        slopes = [slope(list(part), list(part.values())) for part in (known, late)]
        shown = [f"{value:.3g}" if value else "–" for value in found.values()]
        lines.append(f"| {name} | " + " | ".join(shown) + " | " + " | ".join(f"{value:.2f}" for value in slopes) + " |")
    return "\n".join(lines)


def chosen(models: list[str]) -> dict[str, Callable[[int], nn.Module]]:
    """Those whose name begins with one of `models`; all where none is named. Raises typer.BadParameter for a name that nothing begins with."""
    known = attentions() | registered()
    for model in models:
        if not any(name.startswith(model) for name in known):
            raise typer.BadParameter(f"no model begins with {model!r}; expected one of: {', '.join(known)}")
    return {name: build for name, build in known.items() if not models or name.startswith(tuple(models))}


def main(
    models: Annotated[list[str], typer.Option(help="beginnings of names; default all")] = [],  # noqa: B006
    lengths: Annotated[list[int], typer.Option(help="history lengths L; default 64 to 16,384, doubling")] = [],  # noqa: B006
    candidates: Annotated[int, typer.Option(help="candidates of the request that a ranker scores")] = 50,
    batch: Annotated[int, typer.Option(help="requests that a ranker is trained on")] = 16,
    training_candidates: Annotated[int, typer.Option(help="candidates of each of them")] = 8,
    seconds: Annotated[float, typer.Option(help="time for one call of one model at one length")] = 0.5,
    most_ms: Annotated[float, typer.Option(help="leave out what would take longer")] = 4_000.0,
    most_mb: Annotated[float, typer.Option(help="leave out what would need more memory")] = 1_500.0,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    fresh: Annotated[bool, typer.Option(help="measure every cell anew")] = False,
    out: Annotated[Path, typer.Option(help="where the figures are kept")] = Path("build/benchmarks/models.json"),
) -> None:
    """Measure forward and training passes over the length of the history."""
    torch.set_num_threads(threads)
    work = Work(candidates=candidates, batch=batch, training_candidates=training_candidates, device=device, threads=threads)
    lengths = sorted(lengths or [2**n for n in range(6, 15)])
    builders = chosen(models)
    kept: dict[str, Cell] = read_json(out)["cells"] if out.exists() else {}
    cells: dict[tuple[str, int], Cell] = {}
    left: dict[tuple[str, int], str] = {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    for length in lengths:
        made: dict[str, dict[str, Call]] = {"forward": {}, "training": {}}
        for name, build in builders.items():
            if (known := kept.get(work.key(name, length))) is not None and not fresh:
                cells[name, length] = known
            elif why := left.get((name, length // 2)) or too_large(cells.get((name, length // 2)), most_ms, most_mb):
                left[name, length] = why
            else:
                torch.manual_seed(SEED)
                for kind, call in calls(build(length), length, work).items():
                    made[kind][name] = call
        for kind, kind_calls in made.items():
            with freed_memory_is_kept() if kind == "training" else nullcontext():
                found = measure(kind_calls, seconds, torch.device(device))
            for name, figures in found.items():
                cells.setdefault((name, length), {"commit": commit, "hardware": hardware(device)})[kind] = figures
        kept |= {work.key(name, length): cells[name, length] for name in builders if (name, length) in cells}
        write_json(out, {"cells": kept})
        print(f"L = {length:,} done", flush=True)
    for kind in ("forward", "training"):
        for figure in ("least_ms", "peak_mb"):
            print("\n" + table(cells, list(builders), lengths, kind, figure))
    commits = ", ".join(f"{commit} ({count} cells)" for commit, count in Counter(cell["commit"] for cell in cells.values()).items())
    print(f"\n{work}, {hardware(device)}; commits: {commits}; left out: {left or 'nothing'}; written to {out}")


if __name__ == "__main__":
    typer.run(main)
