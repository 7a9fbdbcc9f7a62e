"""User states for histories longer than the online store keeps: only packaging has the whole of them, so it makes these states for the service.

B users, S numbers of a state.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from longtrail.examples import FeatureSet, history_tensors
from longtrail.models.rankers.ifa import IFA
from longtrail.models.store import LoadedModel, load_model

_CELLS = 1 << 20  # events in memory at once, padding counted; a longer history by itself


def write_states(folder: Path, rankers: Iterable[Path], features: Path, *, online_history_length: int) -> int:
    """`folder`/VERSION/{users,events,states}.npy (serving.packed_states) of users with more events than the online store keeps; returns how many.

    Nothing is written for a ranker without user states, or where the online store keeps all that the ranker reads (its max_history): then the
    service makes the states itself.
    """
    return sum(_write(folder, load_model(ranker), features, online_history_length) for ranker in rankers)


def _write(folder: Path, ranker: LoadedModel, features: Path, online_history_length: int) -> int:
    module = ranker.module
    if not isinstance(module, IFA) or module.attention is None or module.settings.max_history <= online_history_length:
        return 0
    target = folder / module.version()
    if target.exists():  # two arms with equal weights
        return 0
    opened = FeatureSet.open(features)
    lengths_U = opened.history.lengths(np.arange(opened.history.users + 1))
    users_U = np.flatnonzero(lengths_U > online_history_length)
    if not len(users_U):
        return 0
    events_U = lengths_U[users_U]
    with torch.inference_mode():
        size = module.state(history_tensors(opened.history.gather(users_U[:1], events_U[:1], 1), opened.catalogue)).flat().shape[1]
        target.mkdir(parents=True)
        states_US = np.lib.format.open_memmap(target / "states.npy", mode="w+", dtype=np.float64, shape=(len(users_U), size))
        for rows_B in _batches(events_U):
            history = opened.history.gather(users_U[rows_B], events_U[rows_B], int(events_U[rows_B].max()))
            states_US[rows_B] = module.state(history_tensors(history, opened.catalogue)).flat(torch.float64).numpy()
        states_US.flush()
    np.save(target / "users.npy", users_U.astype(np.int64), allow_pickle=False)
    np.save(target / "events.npy", events_U.astype(np.int64), allow_pickle=False)
    return len(users_U)


def _batches(events_U: np.ndarray) -> list[np.ndarray]:
    """Rows of like length, _CELLS events with padding at most, or one row."""
    order_U = np.argsort(events_U, kind="stable")
    batches, start = [], 0
    for stop in range(1, len(order_U) + 1):
        if stop == len(order_U) or (stop + 1 - start) * events_U[order_U[stop]] > _CELLS:
            batches.append(order_U[start:stop])
            start = stop
    return batches
