"""Ingest at 20 million events: seconds and peak memory, beside the same work in pandas, each in a process of its own.

    python -m benchmarks.ingest                    # 20M events, about ten minutes and 3 GB of disk
    python -m benchmarks.ingest --events 1000000

Both read the same CSV, drop exact duplicates, give dense ids in order of first appearance, sort by time and write Parquet; both must count
the same rows, users and items. Longtrail also checks every value, writes the quarantine, and is held to DuckDB's memory limit.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import typer
import yaml

from longtrail.files import read_json, write_json

CHUNK = 1_000_000
COLUMNS = {"user": "user", "item": "item", "timestamp": "ts", "action": "event", "value": "seconds"}
LONGTRAIL = "from components.ingest import ingest; from pathlib import Path; ingest(Path({params!r}), Path({out!r}))"
PANDAS = """
import json, pandas as pd
rows = pd.read_csv({source!r})
rows = rows.drop_duplicates(["user", "item", "ts", "event"])
rows["timestamp"] = pd.to_datetime(rows["ts"], unit="s", utc=True)
rows = rows.sort_values("timestamp", kind="stable")
rows["user_id"] = rows["user"].factorize()[0] + 1
rows["item_id"] = rows["item"].factorize()[0] + 1
rows[["user_id", "item_id", "timestamp", "event", "seconds"]].to_parquet({out!r} + ".parquet", compression="zstd")
for key in ("user", "item"):
    seen = rows.groupby(key).agg(first_seen=("timestamp", "min"), events=("timestamp", "size"))
    seen.to_parquet({out!r} + "." + key + ".parquet", compression="zstd")
counts = dict(interactions=len(rows), users=int(rows["user_id"].max()), items=int(rows["item_id"].max()))
json.dump(counts, open({out!r} + ".json", "w"))
"""


def generate(folder: Path, events: int, seed: int = 0, *, csv: bool = True) -> dict[str, Path]:
    """One log as CSV (unless `csv` is False) and as Parquet: a year of events, Zipf items, uneven users, 1 row in 1,000 repeated."""
    files = {"csv": folder / "log.csv", "parquet": folder / "log.parquet"}
    rng = np.random.default_rng(seed)
    users, items = max(events // 200, 1), max(events // 100, 1)
    schema = pa.schema({"user": pa.string(), "item": pa.int64(), "ts": pa.int64(), "event": pa.string(), "seconds": pa.float64()})
    actions = pa.array(["view", "click", "purchase"])
    with ExitStack() as stack:
        packed = stack.enter_context(pq.ParquetWriter(files["parquet"], schema, compression="zstd"))
        text = stack.enter_context(pyarrow.csv.CSVWriter(files["csv"], schema)) if csv else None
        for start in range(0, events, CHUNK):
            n = min(CHUNK, events - start)
            user = (users * rng.random(n) ** 2).astype(np.int64)
            item = np.minimum(items * rng.random(n) ** 3, items - 1).astype(np.int64)
            time_s = 1_700_000_000 + rng.integers(0, 365 * 86_400, n)
            action = rng.choice(3, n, p=[0.8, 0.15, 0.05])
            again = np.flatnonzero(rng.random(n) < 0.001)
            again = again[again > 0]
            for column in (user, item, time_s, action):
                column[again] = column[again - 1]
            names = pa.compute.binary_join_element_wise("user", pa.array(user).cast(pa.string()), "-")
            block = pa.table([names, item, time_s, actions.take(pa.array(action)), np.round(rng.exponential(30, n), 1)], schema=schema)
            if text is not None:
                text.write_table(block)
            packed.write_table(block)
    return files


def measure(code: str) -> tuple[float, float, bool]:
    """Run `code` in a new interpreter: (seconds, peak resident bytes, whether it succeeded)."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "2"})
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return time.perf_counter() - start, usage.ru_maxrss * 1024.0, child.returncode == 0


def main(
    events: Annotated[int, typer.Option(help="rows of the log")] = 20_000_000,
    memory_limit: Annotated[str, typer.Option(help="ingest.memory_limit")] = "2GB",
    pandas: Annotated[bool, typer.Option(help="also run pandas")] = True,
    out: Annotated[Path, typer.Option(help="result")] = Path("build/benchmarks/ingest.json"),
) -> None:
    """Print a table, write JSON."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=_scratch()) as scratch:
        folder = Path(scratch)
        files = generate(folder, events)
        sizes = {kind: path.stat().st_size for kind, path in files.items()}
        print(f"{events:,} events: CSV {sizes['csv'] / 1e6:,.0f} MB, Parquet {sizes['parquet'] / 1e6:,.0f} MB", flush=True)
        cases: list[tuple[str, str, float | None]] = [("interactions, CSV", "csv", None), ("interactions, Parquet", "parquet", None)]
        cases.append(("interactions and impressions (like_from), Parquet", "parquet", 30.0))
        for name, kind, like_from in cases:
            tables = folder / "tables"
            params = _params(folder, files[kind], like_from, memory_limit)
            seconds, peak, ok = measure(LONGTRAIL.format(params=str(params), out=str(tables)))
            counts = read_json(tables / "counts.json") if ok else None
            rows.append(_row("longtrail", name, seconds, peak, ok, counts))
        if pandas:
            target = folder / "pandas"
            seconds, peak, ok = measure(PANDAS.format(source=str(files["csv"]), out=str(target)))
            counts = read_json(folder / "pandas.json") if ok else None
            rows.append(_row("pandas", "interactions, CSV", seconds, peak, ok, counts))
            if ok and rows[0]["ok"] and any(rows[0][k] != rows[-1][k] for k in ("interactions", "users", "items")):
                raise SystemExit(f"the two disagree: {json.dumps(rows)}")
    result = {"events": events, "bytes": sizes, "memory_limit": memory_limit, "machine": _machine(), "rows": rows}
    write_json(out, result)
    print(f"result: {out}")


def _scratch() -> Path:
    folder = Path("build")
    folder.mkdir(exist_ok=True)
    return folder.absolute()


def _params(folder: Path, source: Path, like_from: float | None, memory_limit: str) -> Path:
    values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    values["dataset"] = {"kind": "event_log", "source": str(source), "columns": COLUMNS, "like_from": like_from}
    values["ingest"] = {"memory_limit": memory_limit, "threads": 2}
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def _row(who: str, case: str, seconds: float, peak: float, ok: bool, counts: dict[str, Any] | None) -> dict[str, Any]:
    row = {"who": who, "case": case, "ok": ok, "seconds": round(seconds, 1), "peak_gb": round(peak / 1e9, 2)}
    row |= {name: (counts or {}).get(name) for name in ("interactions", "impressions", "users", "items", "rows_quarantined")}
    print(f"{who:10} {case:52} {seconds:8.1f} s {peak / 1e9:6.2f} GB peak  {'' if ok else 'FAILED'}", flush=True)
    return row


def _machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    load = round(psutil.getloadavg()[0], 1)
    return {
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version(),
        "commit": commit,
        "load_after": load,
    }


if __name__ == "__main__":
    typer.run(main)
