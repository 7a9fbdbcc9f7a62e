"""What a list's scores were made of, kept with the answer so that `python -m serving.replay` can make it again and compare.

Logged for `serving.evidence.share` of the personal lists, by the answer's id (C candidates, n events read):

  build                the Bento whose models scored (`build_name`)
  time                 UTC µs that the ranker was told
  read, total          events read of the history (the newest), and all the user has: with the event log, a pointer to exactly this history
  retrieved            whether the retriever chose the candidates
  user                 the user's statistics, in the order of USER_STATISTICS
  digests              8 bytes (hex) of each feature as it was read: history_items, …, and the candidates' statistics
  logits               of the candidates, in the order of the line's `candidates`: float32, base64
  history, items       for `serving.evidence.full` of the lists: [3, n] and [3, C] int64, zlib, base64, so that a difference is named by its values
"""

import base64
import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtrail.config import EvidenceSettings
from longtrail.files import hash_path
from longtrail.history import HistoryArrays
from longtrail.schema import ITEM_STATISTICS, USER_STATISTICS

Ints = NDArray[np.int64]

HISTORY = ("history_items", "history_actions", "history_times")
MOST = 1 << 14  # events of a history that are hashed, the newest: 0.4 ms; our choice


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Of one request, as it went into the models. Nothing is copied or computed before `entry`."""

    time: int
    history: HistoryArrays  # [1, L]
    total: int
    user: Mapping[str, Ints]  # USER_STATISTICS, each [1]
    items: Mapping[str, Ints]  # ITEM_STATISTICS, each [1, C]
    logits_C: NDArray[np.float64]
    retrieved: bool = False  # the candidates are the retriever's

    def entry(self, build: str, *, full: bool) -> dict[str, Any]:
        """What is logged of it."""
        features = self.features()
        logged: dict[str, Any] = {
            "build": build,
            "time": self.time,
            "read": int(self.history.lengths_B[0]),
            "total": self.total,
            "retrieved": self.retrieved,
            "user": [int(self.user[name][0]) for name in USER_STATISTICS],
            "digests": {name: digest(values) for name, values in features.items()},
            "logits": base64.b64encode(self.logits_C.astype("<f4").tobytes()).decode("ascii"),
        }
        if full:
            logged["history"] = _packed([features[name] for name in HISTORY])
            logged["items"] = _packed([features[name] for name in ITEM_STATISTICS])
        return logged

    def features(self) -> dict[str, Ints]:
        """Those that are digested: the newest MOST events read, and the candidates' statistics, each [n] or [C]."""
        length = int(self.history.lengths_B[0])
        newest = slice(max(0, length - MOST), length)
        arrays = (self.history.items_BL, self.history.actions_BL, self.history.times_BL)
        past = {name: values_BL[0, newest] for name, values_BL in zip(HISTORY, arrays, strict=True)}
        return {**past, **{name: self.items[name][0] for name in ITEM_STATISTICS}}


class Sampler:
    """Which answers get evidence, and how much: by their id, so that it needs no lock and can be told afterwards."""

    def __init__(self, settings: EvidenceSettings, build: str) -> None:
        self._settings = settings
        self._build = build

    def entry(self, request_id: str, evidence: Evidence | None) -> dict[str, Any] | None:
        """What to log with the answer `request_id` (hex digits, evenly distributed); None where nothing is."""
        place = int(request_id[:8], 16) / 2**32
        if evidence is None or place >= self._settings.share:
            return None
        return evidence.entry(self._build, full=place < self._settings.full)


def build_name(artifacts: Path) -> str:
    """12 hex digits that say which Bento scored: of its manifest's SHA-256."""
    return hash_path(artifacts / "manifest.json")[:12]


def digest(values: Ints) -> str:
    return hashlib.blake2b(np.ascontiguousarray(values, "<i8").tobytes(), digest_size=8).hexdigest()


def logits_of(entry: Mapping[str, Any]) -> NDArray[np.float32]:
    """[C] as served."""
    return np.frombuffer(base64.b64decode(entry["logits"]), "<f4")


def full_of(entry: Mapping[str, Any]) -> dict[str, Ints] | None:
    """The features as served, each [n] or [C]; None where only their digests were logged."""
    if "history" not in entry:
        return None
    return {**_unpacked(entry["history"], HISTORY), **_unpacked(entry["items"], ITEM_STATISTICS)}


def _packed(rows: list[Ints]) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(rows, "<i8").tobytes(), 1)).decode("ascii")


def _unpacked(text: str, names: tuple[str, ...]) -> dict[str, Ints]:
    values = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i8").reshape(len(names), -1)
    return dict(zip(names, values, strict=True))
