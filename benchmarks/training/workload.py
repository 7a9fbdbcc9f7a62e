"""The generated logs that every case trains on, as features folders without Feast's part. U users, L history, C candidates, N items, E rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from longtrail.files import write_json
from longtrail.history import build_history
from longtrail.schema import CATALOGUE, EXAMPLES, Table

START = 1_700_000_000_000_000  # UTC µs
CATEGORIES = 100
CLICK_RATE = 0.2

Ints = NDArray[np.int64]


def write_next_item_log(folder: Path, *, users: int, items: int, longest: int, seed: int = 0) -> None:
    """Histories as long as MovieLens-1M's (log-normal, median 96; 46 % padding at 200), each cut to `longest` inputs and a target.

    Items are Zipf-popular; three in ten follow from the one before (the next id), so that there is something to learn.
    """
    rng = np.random.default_rng(seed)
    lengths_U = np.clip(rng.lognormal(np.log(96), 1.04, users), 20, longest + 1).astype(np.int64)
    _write(folder, rng, lengths_U, items)


def write_ranking_log(folder: Path, *, requests: int, candidates: int, items: int, length: int, seed: int = 0) -> None:
    """Requests of `candidates` shown items, each by a user of its own with a full history of `length` events."""
    rng = np.random.default_rng(seed)
    _write(folder, rng, np.full(requests, length, dtype=np.int64), items)
    request_E = np.repeat(np.arange(requests), candidates)
    user_impressions, item_impressions = rng.integers(0, 50, requests), rng.integers(0, 50, len(request_E))
    columns: dict[str, Any] = {
        "request_id": pa.array(request_E).cast(pa.string()),
        "user_id": request_E + 1,
        "item_id": _popular(rng, len(request_E), items),
        "timestamp": pa.array(START + length * 1_000_000 + request_E, pa.timestamp("us", tz="UTC")),
        "position": np.tile(np.arange(1, candidates + 1), requests),
        "click": rng.random(len(request_E)) < CLICK_RATE,
        "history_length": np.full(len(request_E), length),
        "user_impressions": np.repeat(user_impressions, candidates),
        "user_clicks": np.repeat(rng.binomial(user_impressions, CLICK_RATE), candidates),
        "item_events": item_impressions + rng.integers(0, 50, len(request_E)),
        "item_impressions": item_impressions,
        "item_clicks": rng.binomial(item_impressions, CLICK_RATE),
    }
    (folder / "examples").mkdir()
    pq.write_table(_table(EXAMPLES, columns), folder / "examples" / "train.parquet")


def _write(folder: Path, rng: np.random.Generator, lengths_U: Ints, items: int) -> None:
    users, events = len(lengths_U), int(lengths_U.sum())
    folder.mkdir(parents=True)
    item_E = _popular(rng, events, items)
    follows_E = rng.random(events) < 0.3
    item_E[1:] = np.where(follows_E[1:], item_E[:-1] % items + 1, item_E[1:])
    place_E = np.arange(events) - np.repeat(np.cumsum(lengths_U) - lengths_U, lengths_U)
    times = pa.array(START + place_E * 1_000_000, pa.timestamp("us", tz="UTC"))
    log = pa.table({"user_id": np.repeat(np.arange(1, users + 1), lengths_U), "item_id": item_E, "timestamp": times, "available_at": times})
    build_history(log.append_column("action", pa.array(["view"] * events)), folder / "history", users=users, actions=("view",))
    counts = np.bincount(item_E, minlength=items + 1)[1:]
    columns: dict[str, Any] = {
        "item_id": np.arange(1, items + 1),
        "item_key": pa.array(np.arange(1, items + 1)).cast(pa.string()),
        "title": pa.nulls(items, pa.string()),
        "category_id": rng.integers(1, CATEGORIES + 1, items),
        "category": pa.nulls(items, pa.string()),
        "first_seen": np.full(items, START),
    }
    pq.write_table(_table(CATALOGUE, {name: columns.get(name, counts) for name in CATALOGUE.names}), folder / "catalogue.parquet")
    np.save(folder / "train_lengths.npy", np.concatenate([[0], lengths_U]))
    sizes = {"items": items, "categories": CATEGORIES, "actions": 1}
    write_json(folder / "features.json", {"sizes": sizes, "users": users, "actions": ["view"], "prior_click_rate": CLICK_RATE})


def _table(kind: Table, columns: dict[str, Any]) -> pa.Table:
    schema = kind.arrow()
    return pa.table({name: pa.array(columns[name]).cast(schema.field(name).type) for name in schema.names})


def _popular(rng: np.random.Generator, count: int, items: int) -> Ints:
    """Zipf-like ids 1..N: the k-th most popular in proportion to 1 / k."""
    bounds = np.cumsum(1 / np.arange(1, items + 1))
    return np.searchsorted(bounds / bounds[-1], rng.random(count)) + 1
