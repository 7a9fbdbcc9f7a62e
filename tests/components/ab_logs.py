"""Small logs in the impressions schema, with two policies' probabilities, for the tests of what people see."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longtrail.offpolicy.policies import softmax
from longtrail.schema import PROPENSITY_METADATA

START = 1_704_067_200_000_000  # 2024-01-01 UTC in µs
DAY = 86_400_000_000


def write(
    path: Path, *, rows: int = 4_000, gap: float = 0.8, noise: float = 0.0, days: int = 10, seed: int = 0, sharper: float = 1.0, **more: object
) -> Path:
    """One item of five a request: columns `old` and `new` are P(logged item) of two policies; `new` likes what is clicked (`gap`), and what it
    likes without reason (`noise`). `sharper` as in benchmarks/coverage_logs.py; `more` replaces columns.
    """
    rng = np.random.default_rng(seed)
    score, quality = rng.normal(size=(rows, 5)), rng.normal(size=(rows, 5))
    lengths = np.full(rows, 5)
    really, logged = softmax(0.6 * sharper * score, lengths), softmax(0.6 * score, lengths)
    item = (rng.random((rows, 1)) > np.cumsum(really, axis=1)).sum(axis=1).clip(max=4)
    pick = np.arange(rows), item
    user = rng.integers(1, rows // 12, rows)
    taste = rng.normal(size=rows)[user] * 0.6
    click = (rng.random(rows) < 1 / (1 + np.exp(1.5 - quality[pick] - taste))).astype(np.int8)
    times = np.sort(rng.integers(0, days * DAY, rows)) + START
    columns = {
        "request_id": pa.array([f"r{n}" for n in range(rows)]),
        "user_id": user,
        "item_id": item + 1,
        "timestamp": pa.array(times, pa.timestamp("us", tz="UTC")),
        "position": np.ones(rows, np.int32),
        "click": click,
        "propensity": logged[pick],
        "policy": pa.array(["logger"] * rows),
        "old": softmax(0.5 * score, lengths)[pick],
        "new": softmax(0.5 * score + gap * quality + noise * rng.normal(size=(rows, 5)), lengths)[pick],
        "candidates": np.full(rows, 5),
        "history_length": rng.integers(0, 40, rows),
        "device": pa.array(np.where(user % 3 == 0, "phone", "desk").tolist()),
        **more,
    }
    pq.write_table(pa.table(columns).replace_schema_metadata({PROPENSITY_METADATA: "conditional"}), path)
    return path
