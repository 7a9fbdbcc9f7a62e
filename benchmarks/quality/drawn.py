"""Lists for a log of what people bought, which does not say what they were shown: beside each event, items that its user never had.

E events, K drawn. Ours: an item is drawn as often as it is bought, so that how popular it is tells nothing and only the history does. These are not
impressions: what a model reaches here is for comparing models, not for what people would click on.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from longtrail.files import atomic_file

START = 1_000_000_000  # seconds, where the file has no times


def write_drawn(source: Path, out: Path, *, drawn: int, seed: int = 0) -> None:
    """The lists of a Parquet file of `user`, `item` and perhaps `ts` (seconds), a user's events in their order, as a log of impressions."""
    events = pd.read_parquet(source)
    times_E = np.arange(len(events)) + START
    if "ts" in events:  # days, mostly: a user's events of one day stay in their order
        times_E = events["ts"].to_numpy() + events.groupby(["user", "ts"]).cumcount().to_numpy()
    rng = np.random.default_rng(seed)
    users_E, items_E = events["user"].to_numpy(), events["item"].to_numpy()
    shown_EK = np.concatenate([items_E[:, None], _never_had(users_E, items_E, drawn, rng)], axis=1)
    place_EK = rng.random(shown_EK.shape).argsort(axis=1)
    K1 = drawn + 1
    rows = {
        "user": np.repeat(users_E, K1),
        "item": np.take_along_axis(shown_EK, place_EK, axis=1).ravel(),
        "ts": np.repeat(times_E, K1),
        "click": (place_EK == 0).ravel().astype(int),
        "request": np.repeat(np.arange(len(events)), K1),
        "position": np.tile(np.arange(1, K1 + 1), len(events)),
    }
    with atomic_file(out) as aside:
        pd.DataFrame(rows).to_parquet(aside)


def _never_had(users_E: np.ndarray, items_E: np.ndarray, drawn: int, rng: np.random.Generator) -> np.ndarray:
    """[E, K] items of other events, drawn evenly, again wherever the user has one at any time or one stands in the row twice."""
    span = int(items_E.max()) + 1
    had = np.unique(users_E.astype(np.int64) * span + items_E)
    found_EK = rng.choice(items_E, (len(items_E), drawn))
    while True:
        order_EK = found_EK.argsort(axis=1, kind="stable")
        sorted_EK = np.take_along_axis(found_EK, order_EK, axis=1)
        twice_EK = np.zeros(found_EK.shape, bool)
        np.put_along_axis(twice_EK, order_EK[:, 1:], sorted_EK[:, 1:] == sorted_EK[:, :-1], axis=1)
        again_EK = np.isin(users_E.astype(np.int64)[:, None] * span + found_EK, had) | twice_EK
        if not again_EK.any():
            return found_EK
        found_EK[again_EK] = rng.choice(items_E, int(again_EK.sum()))
