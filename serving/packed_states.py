"""States of users whose histories are longer than the online store keeps, made when the Bento was packaged, from the history store.

`artifacts/states/VERSION/`: users.npy int64 [U] ascending, events.npy int64 [U], states.npy float64 [U, S]; VERSION is IFA.version(). Written by
components.package_states, memory-mapped here.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longtrail.errors import ModelError

FOLDER = "states"


class PackedStates:
    """Thread-safe."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError where `folder` holds no states."""
        try:
            arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("users", "events", "states")]
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: {error}; expected users, events and states, as packaging writes them") from None
        self._users, self._events, self._states = arrays
        if not len(self._users) == len(self._events) == len(self._states):
            raise ModelError(f"{folder}: {[len(array) for array in arrays]} users, events, states; expected as many of each")

    @classmethod
    def find(cls, artifacts: Path, version: str) -> "PackedStates | None":
        """Those of a version; None where packaging wrote none, because the online store keeps all that the ranker reads."""
        folder = artifacts / FOLDER / version
        return cls(folder) if folder.exists() else None

    def of(self, user: int) -> list[tuple[int, NDArray[np.float64]]]:
        """The number of events and the state, of one user, or nothing."""
        place = int(np.searchsorted(self._users, user))
        if place == len(self._users) or self._users[place] != user:
            return []
        return [(int(self._events[place]), np.array(self._states[place]))]
