"""The history store beside one padded row an example, the layout of RecBole: bytes, build time, memory, batches a second.

    python -m benchmarks.history --help

Both layouts are measured in the same run on the same log, on the same pointers, and their batches are compared with each other. The
rival is RecBole 1.2's `SequentialDataset.data_augmentation`: for each event but a user's first, a row of three arrays, `item_id_list`
(int64), `timestamp_list` (float32) and `action_list` (int64), right-padded to MAX_ITEM_LIST_LENGTH and filled in a Python loop over rows.
That loop is timed on LOOP_ROWS random rows and scaled up. Where the whole table is larger than `--budget`, only a slice (the first users') is
made to read batches from: its bytes are exact all the same, since every row has the same size, and its batches come from a smaller
table than they would.
"""

import json
import multiprocessing
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from numpy.typing import NDArray
from tqdm import tqdm

from longtrail.examples.buckets import Buckets, padding_share
from longtrail.files import write_json
from longtrail.history import HistoryStore, build_history
from longtrail.schema import INTERACTIONS
from longtrail.segments import Segment

ACTIONS = ("click", "view", "buy")
MEAN_LENGTH = 200  # events a user
ITEMS = 100_000
BATCH = 256
CELL_BYTES = 20  # of the rival: int64 item, float32 time, int64 action
SECONDS = 3.0  # each throughput is measured for about so long
LOOP_ROWS = 20_000  # rows on which the rival's Python loop is timed

Ints = NDArray[np.int64]
Row = dict[str, Any]


def write_log(path: Path, events: int, seed: int) -> int:
    """A log in order of time, users' activity log-normal (median 1/e^0.5 of the mean); returns the number of users."""
    rng = np.random.default_rng(seed)
    users = max(events // MEAN_LENGTH, 1)
    activity = rng.lognormal(0, 1, users)
    bounds = np.cumsum(activity) / activity.sum()
    schema = pa.schema([INTERACTIONS.arrow().field(name) for name in ("user_id", "item_id", "timestamp", "available_at", "action")])
    step = 1 << 20
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for low in range(0, events, step):
            n = min(step, events - low)
            times = pa.array(1_700_000_000_000_000 + (low + np.arange(n)) * 1_000_000, schema.field("timestamp").type)
            user = np.minimum(np.searchsorted(bounds, rng.random(n)), users - 1) + 1
            item = (rng.pareto(1.0, n) * 100).astype(np.int64) % ITEMS + 1
            action = pa.DictionaryArray.from_arrays(rng.integers(0, 3, n).astype(np.int32), ACTIONS).cast(pa.string())
            writer.write_table(pa.table([pa.array(user), pa.array(item), times, times, action], schema=schema))
    return users


def _watched(connection: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Run in a process of its own: seconds, and the most memory above what the process had before."""
    process, peak, done = psutil.Process(), {"rss": 0, "private": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            memory = process.memory_info()
            peak["rss"] = max(peak["rss"], memory.rss - base.rss)
            peak["private"] = max(peak["private"], (memory.rss - memory.shared) - (base.rss - base.shared))

    base = process.memory_info()
    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    work(*arguments)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    connection.send({"seconds": seconds, **peak})


def measured_alone(work: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_watched, args=(there, work, arguments))
    process.start()
    there.close()
    try:
        result = here.recv()
    finally:
        process.join()
    return result


def build(log: Path, folder: Path, users: int) -> None:
    build_history(log, folder, users=users, actions=ACTIONS)


def pointers(store: HistoryStore, users: int) -> tuple[Ints, Ints]:
    """(user, history_length) of every event but each user's first, of users 1..`users`."""
    total = store.lengths(np.arange(1, users + 1))
    rows = np.maximum(total - 1, 0)
    return np.repeat(np.arange(1, users + 1), rows), np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows) + 1


def rival_by_loop(store: HistoryStore, user_n: Ints, length_n: Ints, L: int) -> float:
    """Seconds a row of RecBole's filling loop, which slices and copies once a row and field. The events' own columns are ready beforehand."""
    segment = store._segments[0]
    sample = np.sort(np.random.default_rng(2).choice(len(user_n), min(len(user_n), LOOP_ROWS), replace=False))
    columns = [torch.from_numpy(np.array(values)).to(dtype) for values, dtype in _columns(segment)]
    stops = (segment.offsets[user_n[sample]] + length_n[sample]).tolist()
    kept = np.minimum(length_n[sample], L).tolist()
    started = time.perf_counter()
    for column in columns:
        made = torch.zeros((len(sample), L), dtype=column.dtype)
        for i, (stop, length) in enumerate(zip(stops, kept, strict=True)):
            made[i][:length] = column[stop - length : stop]
    return (time.perf_counter() - started) / len(sample)


def rival_table(store: HistoryStore, user_n: Ints, length_n: Ints, L: int) -> list[torch.Tensor]:
    """The three arrays of the rival's table, filled without its loop, which would take too long here."""
    segment = store._segments[0]
    kept_n = np.minimum(length_n, L)
    first_n = segment.offsets[user_n] + length_n - kept_n
    table = []
    for values, dtype in _columns(segment):
        made = torch.zeros((len(user_n), L), dtype=dtype)
        for low in range(0, len(user_n), 1_024):
            high = low + 1_024
            at = np.minimum(first_n[low:high, None] + np.arange(L), segment.events - 1)
            made[low:high] = torch.from_numpy(np.where(np.arange(L) < kept_n[low:high, None], values[at], 0)).to(dtype)
        table.append(made)
    return table


def _columns(segment: Segment) -> list[tuple[NDArray[Any], torch.dtype]]:
    return [(segment.items, torch.int64), (segment.times, torch.float32), (segment.actions, torch.int64)]


def rate(make: Callable[[Ints], Any], batches: list[Ints]) -> float:
    """Examples a second over about SECONDS of batches, after two to warm up."""
    for batch in batches[:2]:
        make(batch)
    done, started = 0, time.perf_counter()
    for batch in batches[2:]:
        make(batch)
        done += len(batch)
        if time.perf_counter() - started > SECONDS:
            break
    return done / (time.perf_counter() - started)


def measure_length(store: HistoryStore, L: int, budget: int) -> Row:
    """One row of the table: both layouts at width L."""
    user_n, length_n = pointers(store, store.users)
    rows = len(user_n)
    fits = min(rows, budget // (L * CELL_BYTES))
    rng = np.random.default_rng(0)
    whole = fits == rows
    slice_user, slice_length = user_n[:fits], length_n[:fits]
    per_row = rival_by_loop(store, user_n, length_n, L)
    table = rival_table(store, slice_user, slice_length, L)

    def tensors(user_B: Ints, length_B: Ints) -> list[torch.Tensor]:
        arrays = store.gather(user_B, length_B, L)
        return [torch.from_numpy(a) for a in (arrays.items_BL, arrays.times_BL, arrays.actions_BL)]

    _check_equal(table, tensors, slice_user, slice_length, rng.choice(fits, min(fits, 500), replace=False))
    shuffled = np.array_split(rng.permutation(rows)[: 4_000 * BATCH], max(min(rows // BATCH, 4_000), 3))
    kept_n = np.minimum(length_n, L)
    started = time.perf_counter()
    buckets = Buckets.make(kept_n, batch_size=BATCH)
    made = time.perf_counter()
    bucketed = buckets.batches(seed=0, epoch=0)
    planned = time.perf_counter()
    in_slice = np.array_split(rng.permutation(fits)[: 4_000 * BATCH], max(min(fits // BATCH, 4_000), 3))
    return {
        "L": L,
        "examples": rows,
        "rival_bytes": rows * L * CELL_BYTES,
        "rival_slice": 1.0 if whole else fits / rows,
        "rival_loop_seconds": per_row * rows,
        "buckets_seconds": made - started,
        "epoch_seconds": planned - made,
        "rival_rate": rate(lambda batch: [values[batch] for values in table], in_slice),
        "rival_padding": 1 - float(kept_n.sum()) / (rows * L),
        "rate_shuffled": rate(lambda batch: tensors(user_n[batch], length_n[batch]), shuffled),
        "rate_bucketed": rate(lambda batch: tensors(user_n[batch], length_n[batch]), bucketed),
        "padding_bucketed": padding_share(kept_n, bucketed),
    }


def _check_equal(table: list[torch.Tensor], tensors: Callable[..., list[torch.Tensor]], user_n: Ints, length_n: Ints, sample: Ints) -> None:
    for copied, gathered in zip(table, tensors(user_n[sample], length_n[sample]), strict=True):
        width = gathered.shape[1]
        if not torch.equal(copied[sample][:, :width], gathered.to(copied.dtype)) or copied[sample][:, width:].any():
            raise AssertionError("the two layouts differ: neither figure means anything")


def measure_size(events: int, lengths: list[int], budget: int, folder: Path) -> Row:
    log, out = folder / "log.parquet", folder / "store"
    users = write_log(log, events, seed=0)
    built = measured_alone(build, log, out, users)
    store = HistoryStore.open(out)
    size: Row = {"events": events, "users": users, "parquet_bytes": log.stat().st_size, "bytes": store.bytes, "build": built}
    size["append"] = measure_append(store, users)
    size["lengths"] = [measure_length(HistoryStore.open(out), L, budget) for L in tqdm(lengths, desc=f"{events:,} events", disable=None)]
    return size


def measure_append(store: HistoryStore, users: int) -> Row:
    """Seconds to add 1 % of new events, and to compact; the store is compact again afterwards."""
    rng = np.random.default_rng(1)
    n = max(store.events // 100, 1)
    times = pa.array(1_900_000_000_000_000 + np.arange(n), pa.timestamp("us", tz="UTC"))
    table = pa.table(
        {"user_id": rng.integers(1, users + 1, n), "item_id": rng.integers(1, ITEMS, n), "timestamp": times, "available_at": times}
    ).append_column("action", pa.array(["view"] * n))
    started = time.perf_counter()
    appended = store.append(table)
    middle = time.perf_counter()
    appended.compact()
    return {"events": n, "append_seconds": middle - started, "compact_seconds": time.perf_counter() - middle}


def show(sizes: list[Row]) -> str:
    """The two tables, in Markdown."""
    lines = [
        "| events | users | log (Parquet) | store on disk | built in | peak memory, private | append 1 % | compact |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s in sizes:
        lines.append(
            f"| {s['events']:,} | {s['users']:,} | {_bytes(s['parquet_bytes'])} | {_bytes(s['bytes'])} | {s['build']['seconds']:.1f} s "
            f"| {_bytes(s['build']['private'])} ({_bytes(s['build']['rss'])} with mapped files) "
            f"| {s['append']['append_seconds']:.2f} s | {s['append']['compact_seconds']:.1f} s |"
        )
    lines += [
        "",
        "| events | L | store | row per example | its making | batches for an epoch planned in | examples/s: store, bucketed | store, shuffled "
        "| row per example | padding: bucketed | row per example |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for s in sizes:
        for r in s["lengths"]:
            note = "" if r["rival_slice"] == 1 else f" (a slice of {r['rival_slice']:.2%} was made)"
            lines.append(
                f"| {s['events']:,} | {r['L']:,} | {_bytes(s['bytes'])} | {_bytes(r['rival_bytes'])}{note} "
                f"| {r['rival_loop_seconds']:,.0f} s | {r['epoch_seconds']:.1f} s "
                f"| {r['rate_bucketed']:,.0f} | {r['rate_shuffled']:,.0f} | {r['rival_rate']:,.0f} "
                f"| {r['padding_bucketed']:.1%} | {r['rival_padding']:.1%} |"
            )
    return "\n".join(lines)


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1_000 or unit == "TB":
            return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1_000
    raise AssertionError("unreachable")


def hardware() -> Row:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip() or None
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017
        "commit": commit,
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def main(
    events: Annotated[list[int], typer.Option(help="sizes of the log")] = [1_000_000, 20_000_000],  # noqa: B006
    lengths: Annotated[list[int], typer.Option(help="history lengths L")] = [50, 200, 1_000],  # noqa: B006
    budget: Annotated[int, typer.Option(help="bytes the row-per-example table may take; beyond it a slice is made")] = 2_000_000_000,
    out: Annotated[Path, typer.Option(help="where the figures go")] = Path("build/benchmarks/history.json"),
) -> None:
    """Measure the history store beside one padded row an example."""
    torch.set_num_threads(1)
    sizes = []
    for size in events:
        with TemporaryDirectory() as folder:
            sizes.append(measure_size(size, lengths, budget, Path(folder)))
    result = {"hardware": hardware(), "batch": BATCH, "budget": budget, "sizes": sizes}
    write_json(out, result)
    print(json.dumps(result["hardware"]))
    print(show(sizes))


if __name__ == "__main__":
    typer.run(main)
