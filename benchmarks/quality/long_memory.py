"""A world whose interests come back after thousands of events: only a model that reads the whole history can know them.

U users, C categories. Every user has a fixed taste for every category. Their history goes through phases, each about `kept` of the categories, so
that a category comes back after phase · C / kept events on average: 2,500. What they are shown comes from all categories alike, and a click depends
on the taste and on the item's quality. The newest 200 events tell of few categories, the whole history of all.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from longtrail.files import atomic_directory

START = 1_600_000_000  # seconds


def write_long_memory(
    folder: Path, *, users: int, events: int, items: int = 1_000, categories: int = 20, phase: int = 250, kept: int = 2,
    requests: int = 40, shown: int = 10, seed: int = 0,
) -> None:  # fmt: skip
    """`events.parquet` and `impressions.parquet` in `folder`. `kept` categories make a phase of `phase` events."""
    rng = np.random.default_rng(seed)
    taste_UC = rng.normal(0, 1.5, (users, categories))
    quality_N = rng.normal(0, 0.5, items)
    category_N = np.arange(items) % categories
    phases = -(-events // phase)
    chosen_UPK = rng.random((users, phases, categories)).argsort(axis=2)[:, :, :kept]
    user_E = np.repeat(np.arange(users), events)
    phase_E = np.tile(np.arange(events) // phase, users)
    category_E = chosen_UPK[user_E, phase_E, rng.integers(kept, size=len(user_E))]
    item_E = category_E + categories * rng.integers(items // categories, size=len(user_E))
    liked_E = rng.random(len(user_E)) < _sigmoid(taste_UC[user_E, category_E] + quality_N[item_E])
    gap = 600
    time_E = START + np.tile(np.arange(events) * gap, users) + rng.integers(gap, size=len(user_E))
    R = users * requests
    user_R = np.repeat(np.arange(users), requests)
    # Requests come in the last quarter of the histories: the past they read is already long.
    time_R = START + rng.integers(events * gap * 3 // 4, events * gap, size=R)
    item_RK = rng.integers(items, size=(R, shown))
    click_RK = rng.random((R, shown)) < _sigmoid(-1 + taste_UC[user_R[:, None], category_N[item_RK]] + quality_N[item_RK])
    with atomic_directory(folder) as out:
        actions = np.where(liked_E, "like", "skip")
        pd.DataFrame({"user": user_E, "item": item_E, "ts": time_E, "action": actions, "category": category_E}).to_parquet(out / "events.parquet")
        rows = {
            "user": np.repeat(user_R, shown), "item": item_RK.ravel(), "ts": np.repeat(time_R, shown), "click": click_RK.ravel().astype(int),
            "category": category_N[item_RK].ravel(), "request": np.repeat(np.arange(R), shown), "position": np.tile(np.arange(1, shown + 1), R),
        }  # fmt: skip
        pd.DataFrame(rows).to_parquet(out / "impressions.parquet")


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
