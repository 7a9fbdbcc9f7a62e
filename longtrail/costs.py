"""What a model costs to serve: time of one request, peak memory, bytes on disk.

Time and memory are measured in a process of their own, which loads the model and answers requests one by one on the CPU, so that neither the
caller's memory nor its threads count. B = 1 request, L history, C candidates, N items.
"""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longtrail.config import EvaluationSettings, RetrievalSettings
from longtrail.errors import ModelError

_WARM_UP = 10  # requests before the clock starts: allocators and caches settle
ROUNDS = 3  # of all requests, of which the calmest counts (as timeit advises): other processes can only add to a time
_SECONDS = 60.0  # for all of it, our choice: a slow model on a busy machine is known to be slow by then
_FEWEST = 3  # requests a round, however long they take
_FILES = ("model.safetensors", "model.json")
# The service's (serving.run): threads that spin while they wait make a request a hundred times slower as soon as anything else wants a core.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Latency in ms of one request, model alone; peak resident bytes of a process that serves it (torch itself included, and told apart)."""

    latency_ms_p50: float
    latency_ms_p99: float
    processor_ms_p50: float  # of all threads together: what other processes do hardly adds to it
    processor_ms_p99: float
    peak_memory_bytes: int
    base_memory_bytes: int  # of the same process before the model was loaded
    model_bytes: int
    history: int  # L of the timed requests: the most the model reads
    candidates: int  # C ranked, or items retrieved
    requests: int  # timed in the calmest round: fewer than asked for where time was out
    threads: int

    def json(self) -> dict[str, Any]:
        return {
            "latency_ms": {"p50": self.latency_ms_p50, "p99": self.latency_ms_p99},
            "processor_ms": {"p50": self.processor_ms_p50, "p99": self.processor_ms_p99},
            "peak_memory_bytes": self.peak_memory_bytes,
            "model_bytes": self.model_bytes,
            "measured": {
                "how": f"one request at a time on the CPU, in a process of its own, calmest of {ROUNDS} rounds; memory is its peak resident size",
                "base_memory_bytes": self.base_memory_bytes,
                "history": self.history,
                "candidates": self.candidates,
                "requests": self.requests,
                "threads": self.threads,
            },
        }


def model_bytes(folder: Path) -> int:
    """Bytes of weights and card. Raises ModelError where one is missing."""
    try:
        return sum((Path(folder) / name).stat().st_size for name in _FILES)
    except FileNotFoundError as error:
        raise ModelError(f"{error.filename}: no such file; expected a model folder with {' and '.join(_FILES)}") from None


def measure_cost(folder: Path, settings: EvaluationSettings, retrieval: RetrievalSettings | None = None) -> Cost:
    """Cost of the longest request: a full history; `latency_candidates` candidates (ranking) or retrieved items (encode, then exact top-k).

    Raises ModelError where the folder does not load.
    """
    size = model_bytes(folder)
    task = {
        "folder": str(folder),
        "requests": settings.latency_requests,
        "candidates": settings.latency_candidates,
        "threads": settings.latency_threads,
        "retrieval": (retrieval or RetrievalSettings()).model_dump(mode="json"),
    }
    with lifeline() as stdin:
        command = [sys.executable, "-m", "longtrail.costs", json.dumps(task)]
        done = subprocess.run(command, stdin=stdin, env=_ENVIRONMENT | os.environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ModelError(
            f"{folder}: the model could not be timed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    (p50, p99), (cpu_p50, cpu_p99) = (np.percentile(found.pop(name), [50, 99]).tolist() for name in ("milliseconds", "processor_milliseconds"))
    times = {"latency_ms_p50": p50, "latency_ms_p99": p99, "processor_ms_p50": cpu_p50, "processor_ms_p99": cpu_p99}
    return Cost(**times, model_bytes=size, **found)


@contextmanager
def lifeline() -> Iterator[int]:
    """A pipe's end, to be a child's stdin: it reads as ended as soon as this process leaves the block or ends, however it is ended."""
    theirs, ours = os.pipe()  # neither is inherited by other children, which would keep it open
    try:
        yield theirs
    finally:
        os.close(ours)
        os.close(theirs)


# ---------------------------------------------------------------- in the process of its own


def _measure(folder: Path, *, requests: int, candidates: int, threads: int, retrieval: dict[str, Any]) -> dict[str, Any]:
    import torch

    from longtrail.models.attention.fused import serving
    from longtrail.models.store import load_model

    torch.set_num_threads(threads)
    base = peak_memory()
    model = load_model(folder)
    candidates = min(candidates, model.card.sizes.items)
    with torch.inference_mode(), serving():  # as the service answers
        if model.card.stage == "ranking":
            history, answer = _ranking(model, candidates)
        else:
            history, answer = _retrieval(model, candidates, RetrievalSettings.model_validate(retrieval), threads)
        calmest = calmest_round(answer, requests, seconds=_SECONDS)
    return {
        "milliseconds": [wall for wall, _ in calmest],
        "processor_milliseconds": [processor for _, processor in calmest],
        "peak_memory_bytes": peak_memory(),
        "base_memory_bytes": base,
        "history": history,
        "candidates": candidates,
        "requests": len(calmest),
        "threads": threads,
    }


def calmest_round(answer: Callable[[], object], requests: int, *, seconds: float) -> list[tuple[float, float]]:
    """(wall, processor) milliseconds of each request of the calmest of ROUNDS rounds, one after the other, after a warm-up.

    Warm-up and rounds have equal shares of `seconds`, in which fewer than `requests` may be answered, but some. Rounds for which no time is left are
    left out, but the first.
    """
    began, share = time.perf_counter(), seconds / (ROUNDS + 1)
    _round(answer, _WARM_UP, fewest=1, seconds=share)
    rounds = [_round(answer, requests, fewest=_FEWEST, seconds=share)]
    while len(rounds) < ROUNDS and time.perf_counter() - began < seconds:
        rounds.append(_round(answer, requests, fewest=_FEWEST, seconds=share))
    return min(rounds, key=lambda times: sum(wall for wall, _ in times) / len(times))


def _round(answer: Callable[[], object], requests: int, *, fewest: int, seconds: float) -> list[tuple[float, float]]:
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(times) < requests and (len(times) < fewest or time.perf_counter() < end):
        began, processor = time.perf_counter(), time.process_time()
        answer()
        times.append(((time.perf_counter() - began) * 1000, (time.process_time() - processor) * 1000))
    return times


def end_with_parent() -> None:
    """End this process when the other end of its stdin closes: `lifeline` of a parent that was killed."""

    def wait() -> None:
        # os.read and not sys.stdin, whose lock a waiting thread would hold when the interpreter ends.
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _full_history(card: Any, rng: np.random.Generator) -> Any:
    """One history of the greatest length the model reads, of random items a minute apart (the values do not matter to the time)."""
    import torch

    from longtrail.models.contracts import History

    length = getattr(card.settings, "max_history", 1)

    def ids(largest: int) -> Any:
        return torch.from_numpy(rng.integers(1, max(largest, 1) + 1, size=(1, length)))

    return History(
        items_BL=ids(card.sizes.items),
        categories_BL=ids(card.sizes.categories).clamp(max=card.sizes.categories),
        actions_BL=ids(card.sizes.actions),
        times_BL=torch.arange(length).unsqueeze(0) * 60_000_000,
        lengths_B=torch.tensor([length]),
    )


def _ranking(model: Any, candidates: int) -> tuple[int, Callable[[], object]]:
    import torch

    from longtrail.models.contracts import Candidates, Context
    from longtrail.statistics import ITEM_FEATURES, USER_FEATURES

    rng = np.random.default_rng(0)
    history = _full_history(model.card, rng)
    items_BC = torch.from_numpy(rng.permutation(model.card.sizes.items)[None, :candidates] + 1)
    asked = Candidates(
        items_BC=items_BC,
        categories_BC=torch.from_numpy(rng.integers(0, model.card.sizes.categories + 1, size=(1, candidates))),
        statistics_BCF=torch.zeros(1, candidates, ITEM_FEATURES),
        lengths_B=torch.tensor([candidates]),
    )
    context = Context(statistics_BG=torch.zeros(1, USER_FEATURES), times_B=history.times_BL[:, -1] + 1)
    return history.items_BL.shape[1], lambda: model.module(history, asked, context)


def _retrieval(model: Any, k: int, settings: RetrievalSettings, threads: int) -> tuple[int, Callable[[], object]]:
    from longtrail.retrieval.exact import exact_index
    from longtrail.retrieval.index import Exclusion

    history = _full_history(model.card, np.random.default_rng(0))
    index = exact_index(model.module, settings, threads=threads)
    seen = history.items_BL[0].numpy()
    exclude = Exclusion(np.array([0, len(seen)]), seen)
    return len(seen), lambda: index.topk(model.module.user_vectors(history), k, exclude=exclude)


def peak_memory() -> int:
    """Peak resident bytes of this process so far.

    On Linux from /proc: `getrusage` there starts from the parent's size, which for a child of a large process is nonsense.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    end_with_parent()
    task = json.loads(sys.argv[1])
    print(json.dumps(_measure(Path(task.pop("folder")), **task)))
