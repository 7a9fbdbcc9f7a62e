"""Exact top-k of a catalogue: Longtrail's engines beside torch, numpy and faiss, on random and on trained codes.

    python -m benchmarks.retrieval                                   # about eight minutes on 2 cores, after a first run that trains the codes
    python -m benchmarks.retrieval --items 1000000 --seconds 0.3     # a look

Every engine of a cell answers the same queries, a new user each call. Engines take turns in bursts of calls, so that a busy machine is busy for
all, and yet each finds its own data in the caches, as a service would that searches all day. Recall is of the whole catalogue's true list, by score;
for exact engines it must be 1. N items, M splits, D width, B users of a call, K results.
"""

import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numba
import numpy as np
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from benchmarks.ranker_latency import hardware
from benchmarks.retrieval_world import trained
from longtrail.costs import peak_memory
from longtrail.files import write_json
from longtrail.retrieval.dense import DenseIndex
from longtrail.retrieval.pq import PQIndex
from longtrail.retrieval.prune import Pruning
from longtrail.retrieval.rival import FaissIndex
from longtrail.retrieval.simd import CODES
from longtrail.retrieval.storage import open_index, save_index
from longtrail.retrieval.tables import sub_scores
from longtrail.retrieval.workers import cuts, run_all

WIDTH, QUERIES = 512, 256
DENSE_ITEMS = 1_000_000  # 2 GB of vectors; ten million are 20 GB
BUILT_UP_TO = {"hnsw": 100_000, "ivf_pq": 10_000}  # beyond, building would take most of the run
LIST_BYTES = 1_200_000_000
EXACT = {"torch", "numpy", "faiss flat", "faiss pq", "dense", "pqtopk", "recjpq_prune"}
Engine = Callable[[Tensor, int], Tensor]  # (users [B, D], k) -> ids [B, K]


class Catalogue:
    """Codes, centroids and users of one cell, and true scores to judge lists by."""

    def __init__(self, codes_NM: Tensor, centroids_MbE: Tensor, users: Tensor) -> None:
        self.codes_NM, self.centroids_MbE, self.users = codes_NM, centroids_MbE, users
        self.items, self.splits = len(codes_NM) - 1, codes_NM.shape[1]

    def vectors(self) -> Tensor:
        """[N + 1, D]."""
        rows = torch.cat([self.centroids_MbE[k][self.codes_NM[:, k].int()] for k in range(self.splits)], 1)
        rows[0] = 0
        return rows

    def scores(self, user: int) -> np.ndarray:
        """[N + 1] of one user; padding -inf."""
        table = np.zeros((1, self.splits * CODES), np.float32)
        sub_scores(self.users[user : user + 1].numpy(), self.centroids_MbE.numpy(), table)
        scores = np.zeros(self.items + 1, np.float32)
        for k in range(self.splits):
            scores += table[0, k * CODES : (k + 1) * CODES][self.codes_NM[:, k].numpy()]
        scores[0] = -np.inf
        return scores

    def recall(self, engine: Engine, k: int, true: list[np.ndarray]) -> float:
        """Share of the returned items whose true score is at least the k-th best, up to rounding."""
        found = engine(self.users[: len(true)], k).numpy()
        cuts_ = [float(np.partition(scores, -k)[-k]) for scores in true]
        good = [scores[ids] >= cut - 1e-5 * max(1.0, abs(cut)) for scores, ids, cut in zip(true, found, cuts_, strict=True)]
        distinct = [len(set(ids.tolist())) == k for ids in found]
        return float(np.mean(good)) if all(distinct) else 0.0


def random_catalogue(items: int, splits: int) -> Catalogue:
    draws = torch.Generator().manual_seed(0)
    codes_NM = torch.randint(0, CODES, (items + 1, splits), dtype=torch.uint8, generator=draws)
    centroids = torch.randn(splits, CODES, WIDTH // splits, generator=draws)
    return Catalogue(codes_NM, centroids, torch.randn(QUERIES, WIDTH, generator=draws))


def engines(world: Catalogue, *, rivals_of_vectors: bool, notes: list[str]) -> Iterator[tuple[str, Engine, Callable[[int], None]]]:
    """(name, engine, how its threads are set) of all that fit; what does not is said in `notes`."""
    import faiss

    def ours(name: str, index: Any) -> tuple[str, Engine, Callable[[int], None]]:
        return name, lambda users, k: index.topk(users, k)[0], lambda threads: setattr(index, "threads", threads)

    where = f"N = {world.items:,}, M = {world.splits}"
    yield ours("pqtopk", PQIndex(world.codes_NM, world.centroids_MbE).warm_up())
    size = world.items * world.splits * (world.splits + 4)
    if size <= LIST_BYTES:
        yield ours("recjpq_prune", PQIndex(world.codes_NM, world.centroids_MbE, pruning=Pruning()).warm_up())
    else:
        notes.append(f"{where}: no recjpq_prune, its lists take {size / 1e9:.1f} GB")
    pq = FaissIndex("pq", world.codes_NM, world.centroids_MbE)
    yield "faiss pq", lambda users, k: pq.topk(users, k)[0], faiss.omp_set_num_threads
    if not rivals_of_vectors:
        return
    if world.items > DENSE_ITEMS:
        notes.append(f"{where}: no dense engines, vectors of width {WIDTH} take {world.items * WIDTH * 4 / 1e9:.0f} GB")
        return
    vectors = world.vectors()
    transposed = vectors.T
    plain = vectors.numpy()
    yield "torch", lambda users, k: (users @ transposed)[:, 1:].topk(k).indices + 1, torch.set_num_threads

    def numpy_engine(users: Tensor, k: int) -> Tensor:
        scores = (users.numpy() @ plain.T)[:, 1:]
        ids = np.argpartition(scores, -k, axis=1)[:, -k:]
        order = np.argsort(-np.take_along_axis(scores, ids, 1), axis=1)
        return torch.from_numpy(np.take_along_axis(ids, order, 1) + 1)

    yield "numpy", numpy_engine, lambda threads: None
    dense = DenseIndex(vectors)
    yield "dense", lambda users, k: dense.topk(users, k)[0], torch.set_num_threads
    flat = FaissIndex("flat", vectors)
    yield "faiss flat", lambda users, k: flat.topk(users, k)[0], faiss.omp_set_num_threads
    for kind, most in BUILT_UP_TO.items():
        if world.items <= most:
            began = time.perf_counter()
            rival = FaissIndex(kind, vectors)  # type: ignore[arg-type]
            notes.append(f"{where}: faiss {kind} was built in {time.perf_counter() - began:.1f} s")
            yield f"faiss {kind}", lambda users, k, rival=rival: rival.topk(users, k)[0], faiss.omp_set_num_threads  # type: ignore[misc]
        else:
            notes.append(f"{where}: no faiss {kind}: left out, because building it would take most of the run")


def time_in_bursts(calls: dict[str, Callable[[int], Any]], seconds: float, rounds: int = 5, most: int = 60) -> dict[str, list[float]]:
    """Milliseconds of each call, in `rounds` bursts of seconds / rounds and at most `most` calls each, the first of each not counted.

    A call that outlasts its burst is the burst's only one, and counts; one that takes half a second is made twice in all.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds):
        for name, call in calls.items():
            if round_ > 1 and min(taken[name]) > 500:
                continue
            end = time.perf_counter() + seconds / rounds
            burst = []
            for i in range(most + 1):
                start = time.perf_counter()
                call(round_ * most + i)
                burst.append(1000 * (time.perf_counter() - start))
                if time.perf_counter() > end:
                    break
            taken[name] += burst[1:] or burst
    return taken


@numba.njit(nogil=True)
def _read(words: np.ndarray) -> np.uint64:
    total = np.uint64(0)
    for i in range(len(words)):
        total ^= words[i]
    return total


def bandwidth(size: int, threads: int) -> float:
    """Bytes a second at which `threads` threads read `size` bytes again and again, best of 40: what a scan of so many bytes cannot beat."""
    words = np.arange(size // 8, dtype=np.uint64)
    _read(words[:1])
    times = []
    for _ in range(40):
        start = time.perf_counter()
        run_all([lambda a=a, b=b: _read(words[a:b]) for a, b in cuts(len(words), threads)])  # type: ignore[misc]
        times.append(time.perf_counter() - start)
    return size / min(times)


def measure(name: str, world: Catalogue, *, seconds: float, rivals_of_vectors: bool, notes: list[str], bar: Any) -> list[dict[str, Any]]:
    true = [world.scores(user) for user in range(4)]
    made = {engine: (call, threads) for engine, call, threads in engines(world, rivals_of_vectors=rivals_of_vectors, notes=notes)}
    recalls: dict[tuple[str, int], float] = {}
    rows = []
    blocked = (world.items // 512 + 1) * 512 * world.splits
    for threads in (1, 2):
        for _, (_, set_threads) in made.items():
            set_threads(threads)
        torch.set_num_threads(threads)
        limit = bandwidth(blocked, threads)
        for users in (1, 32):
            for k in (10, 100):
                for engine, (call, _) in made.items():
                    if (engine, k) not in recalls:
                        recalls[engine, k] = world.recall(call, k, true)
                        assert engine not in EXACT or recalls[engine, k] == 1, f"{name}: {engine}: recall {recalls[engine, k]}"

                def asking(engine: str, users: int = users, k: int = k) -> Callable[[int], Any]:
                    call = made[engine][0]
                    return lambda i: call(world.users[i * users % (QUERIES - users + 1) :][:users], k)

                taken = time_in_bursts({engine: asking(engine) for engine in made}, seconds)
                for engine, ms in taken.items():
                    p50, p99 = float(np.percentile(ms, 50)), float(np.percentile(ms, 99))
                    row = {"codes": name, "items": world.items, "splits": world.splits, "threads": threads, "users": users, "k": k, "engine": engine}
                    row |= {"p50_ms": p50, "p99_ms": p99, "calls": len(ms), "recall": recalls[engine, k]}
                    if engine == "pqtopk" and users == 1:
                        row |= {"bandwidth_gb_s": limit / 1e9, "share_of_limit": blocked / limit / (p50 / 1000)}
                    rows.append(row)
                bar.update(1)
    return rows


def evaluation(world: Catalogue, users: int = 2048) -> dict[str, Any]:
    """Lists of 50 and ranks of targets among all items, as evaluation asks for them: batches of 256 users, two threads."""
    index = PQIndex(world.codes_NM, world.centroids_MbE, threads=2).warm_up()
    vectors = world.users[torch.arange(users) % len(world.users)]
    targets = index.topk(vectors, 1000)[0][torch.arange(users), torch.arange(users) % 1000]  # good and middling ones
    before, start = peak_memory(), time.perf_counter()
    for first in range(0, users, 256):
        index.topk_and_ranks(vectors[first : first + 256], targets[first : first + 256], 50)
    seconds = time.perf_counter() - start
    return {"items": world.items, "users": users, "users_a_second": users / seconds, "peak_bytes_more": peak_memory() - before}


def memory(folder: Path, items: int, splits: int) -> dict[str, Any]:
    """Of a process of its own that opens an index of random codes from disk and answers 200 requests."""
    path = folder / f"index-{items}-{splits}"
    if not (path / "index.json").is_file():
        world = random_catalogue(items, splits)
        save_index(path, PQIndex(world.codes_NM, world.centroids_MbE))
    done = subprocess.run([sys.executable, "-m", "benchmarks.retrieval", "--opened", str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def opened(path: Path) -> dict[str, Any]:
    PQIndex(torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(8, 256, 64)).warm_up()  # kernels loaded: what is left is the index's own
    gc.collect()
    base, own_base = peak_memory(), _status("RssAnon")
    start = time.perf_counter()
    index = open_index(path, threads=2)
    seconds = time.perf_counter() - start
    users = torch.randn(200, index.width)
    for user in range(200):
        index.topk(users[user : user + 1], 10)
    return {
        "items": index.items,
        "splits": len(index.centroids_MbE),
        "file_bytes": sum(file.stat().st_size for file in path.iterdir()),
        "open_seconds": seconds,
        "peak_bytes": peak_memory(),
        "peak_bytes_of_index": peak_memory() - base,
        "own_bytes_of_index": _status("RssAnon") - own_base,
    }


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()


def show(rows: list[dict[str, Any]]) -> str:
    """A line a cell and engine."""
    lines = [f"{'codes':8} {'items':>10} {'M':>3} {'threads':>7} {'users':>5} {'k':>4} {'engine':13} {'p50 ms':>9} {'p99 ms':>9} {'recall':>7}"]
    for r in rows:
        cell = f"{r['codes']:8} {r['items']:>10,} {r['splits']:>3} {r['threads']:>7} {r['users']:>5} {r['k']:>4} {r['engine']:13}"
        more = f"  {100 * r['share_of_limit']:.0f} % of {r['bandwidth_gb_s']:.0f} GB/s" if "share_of_limit" in r else ""
        lines.append(f"{cell} {r['p50_ms']:>9.3f} {r['p99_ms']:>9.3f} {r['recall']:>7.3f}{more}")
    return "\n".join(lines)


def main(
    items: Annotated[list[int] | None, typer.Option(help="catalogue sizes; default 10^4 to 10^7")] = None,
    splits: Annotated[list[int] | None, typer.Option(help="splits; default 8 and 16")] = None,
    seconds: Annotated[float, typer.Option(help="time of an engine in a cell")] = 0.3,
    folder: Annotated[Path, typer.Option(help="where trained codes are kept between runs")] = Path("build/benchmarks"),
    out: Annotated[Path, typer.Option(help="results")] = Path("build/benchmarks/retrieval.json"),
    opened_path: Annotated[Path | None, typer.Option("--opened", hidden=True)] = None,
) -> None:
    """Print the table, and write it as JSON."""
    if opened_path is not None:
        print(json.dumps(opened(opened_path)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    sizes, all_splits, notes = items or [10_000, 100_000, 1_000_000, 10_000_000], splits or [8, 16], []
    worlds: list[tuple[str, int, int]] = [("random", n, m) for n in sizes for m in all_splits]
    worlds += [("trained", n, 8) for n in sizes if n == 1_000_000 and 8 in all_splits]
    rows, judged = [], None
    with tqdm(total=8 * len(worlds), unit="cell", mininterval=10) as bar:
        for name, n, m in worlds:
            world = random_catalogue(n, m) if name == "random" else Catalogue(*trained(folder, items=n, width=WIDTH, splits=m))
            rows += measure(name, world, seconds=seconds, rivals_of_vectors=m == all_splits[0] and name == "random", notes=notes, bar=bar)
            if name == "trained":
                judged = evaluation(world)
            gc.collect()
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.retrieval " + " ".join(sys.argv[1:]),
        "hardware": {**hardware(), "machine": platform.processor() or platform.machine()},
        "commit": commit(),
        "notes": notes,
        "memory": memory(folder, max(sizes), all_splits[0]),
        "evaluation": judged,
        "rows": rows,
    }
    write_json(out, result)
    print(show(rows), *notes, result["memory"], judged, sep="\n")


if __name__ == "__main__":
    typer.run(main)
