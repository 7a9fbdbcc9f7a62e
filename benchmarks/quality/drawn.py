"""Lists for a log of what people bought, which does not say what they were shown: beside each event, items that its user never had.

E events, K drawn. Ours: each drawn item is that of one of the next REACH events of the whole log, whoever's. So it is as popular, as new and as much
in season as what was bought: counts tell nothing and only the history does. (Drawn from the whole log, items were older than what was bought, and
the fewer purchases, the likelier. Being drawn shows in an item's impressions, too, but not on the same day.) These are not impressions: what a model
reaches is for comparing models, not for what people would click on.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from longtrail.files import atomic_file

VERSION = 1  # of the lists: made otherwise, they are other data
START, DAY = 1_000_000_000, 86_400  # seconds: the last day, where the file has no times
REACH = 200  # events


def write_drawn(source: Path, out: Path, *, drawn: int, seed: int = 0) -> None:
    """The lists of a Parquet file of `user`, `item` and perhaps `ts` (seconds), a user's events in their order, as a log of impressions."""
    events = pd.read_parquet(source)
    # Everybody's last event on one day, the last but one on the day before: where these are held out, so are those that their lists are drawn from.
    times_E = START - DAY * events.groupby("user").cumcount(ascending=False).to_numpy()
    if "ts" in events:  # days, mostly: a user's events of one day stay in their order
        times_E = events["ts"].to_numpy() + events.groupby(["user", "ts"]).cumcount().to_numpy()
    rng = np.random.default_rng(seed)
    users_E, items_E = events["user"].to_numpy(), events["item"].to_numpy()
    shown_EK = np.concatenate([items_E[:, None], _never_had(users_E, items_E, times_E, drawn, rng)], axis=1)
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


def _never_had(users_E: np.ndarray, items_E: np.ndarray, times_E: np.ndarray, drawn: int, rng: np.random.Generator) -> np.ndarray:
    """[E, K], drawn again, from twice as far, wherever the user has the item at any time or it stands in the row twice."""
    E, span = len(items_E), int(items_E.max()) + 1
    had = np.unique(users_E.astype(np.int64) * span + items_E)
    in_time_E = np.argsort(times_E, kind="stable")
    place_EK = np.repeat(np.argsort(in_time_E)[:, None], drawn, axis=1)
    found_EK, again_EK, reach = np.empty((E, drawn), items_E.dtype), np.ones((E, drawn), bool), min(REACH, E)
    while again_EK.any():
        later = place_EK[again_EK] + 1 + rng.integers(reach, size=int(again_EK.sum()))
        found_EK[again_EK] = items_E[in_time_E[np.where(later < E, later, 2 * E - 1 - later)]]  # the last ones look back
        again_EK = np.isin(users_E.astype(np.int64)[:, None] * span + found_EK, had) | _twice(found_EK)
        reach = min(2 * reach, E)
    return found_EK


def _twice(x_EK: np.ndarray) -> np.ndarray:
    """Where a value stands that stood in its row before."""
    order_EK = x_EK.argsort(axis=1, kind="stable")
    sorted_EK = np.take_along_axis(x_EK, order_EK, axis=1)
    twice_EK = np.zeros(x_EK.shape, bool)
    np.put_along_axis(twice_EK, order_EK[:, 1:], sorted_EK[:, 1:] == sorted_EK[:, :-1], axis=1)
    return twice_EK
