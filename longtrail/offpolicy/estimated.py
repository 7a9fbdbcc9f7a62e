"""Propensities where none were logged, and examination where nobody measured it. Both are estimates and are marked as such wherever they are used.

N rows, I items, P positions.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from longtrail.errors import EvaluationError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_PLACES = 1 << 20  # positions below this, so that item and position make one key


@dataclass(frozen=True)
class ShareCounts:
    """How often each item stood at each position: what a logger that looks at nothing but the position is estimated from. Counts of blocks merge.

    P(item at position) is estimated by its share of the rows at that position. Right only where the logger chose without regard to user and time:
    a logger that looks at the user makes every estimate from these propensities biased, and no figure of the log alone can show it.
    Shares of the same rows, not cross-fitted: such propensities lose nothing against the true ones (Hirano, Imbens & Ridder, Econometrica 2003).
    """

    keys: Ints = field(default_factory=lambda: np.zeros(0, np.int64))  # item · 2^20 + position, sorted
    counts: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, items_N: Ints, positions_N: Ints) -> "ShareCounts":
        """Raises EvaluationError for a position outside 1 .. 2^20 − 1."""
        positions = np.asarray(positions_N, np.int64)
        if len(positions) and (positions.min() < 1 or positions.max() >= _PLACES):
            raise EvaluationError(f"positions run from {positions.min()} to {positions.max()}; expected 1 to {_PLACES - 1}")
        keys, counts = np.unique(np.asarray(items_N, np.int64) * _PLACES + positions, return_counts=True)
        return cls(keys, counts)

    def merge(self, other: "ShareCounts") -> "ShareCounts":
        keys, where = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        counts = np.bincount(where, weights=np.concatenate([self.counts, other.counts]), minlength=len(keys))
        return ShareCounts(keys, counts.astype(np.int64))

    def propensities(self, items_N: Ints, positions_N: Ints) -> Floats:
        """[N] P(item at position); NaN where the pair was never counted."""
        position_of_key = self.keys % _PLACES
        positions, where = np.unique(position_of_key, return_inverse=True)
        total = np.bincount(where, weights=self.counts)[where] if len(positions) else np.zeros(0)
        if not len(self.keys):
            return np.full(len(items_N), np.nan)
        wanted = np.asarray(items_N, np.int64) * _PLACES + np.asarray(positions_N, np.int64)
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[place] == wanted, self.counts[place] / total[place], np.nan)


@dataclass(frozen=True, kw_only=True)
class PositionBias:
    """Examination of each position, relative to the first: `examination_P`, position 1 first, and how many rounds it took."""

    examination_P: Floats
    attraction_I: Floats  # P(click | examined) of each item, in the unit where position 1 is always examined
    rounds: int
    estimated: bool = True

    @classmethod
    def fit(cls, shown_IP: Floats, clicked_IP: Floats, *, rounds: int = 500, tolerance: float = 1e-7) -> "PositionBias":
        """The position-based click model, P(click) = examination(position) · attraction(item), by EM (Chuklin et al., Click Models for Web Search,
        2015, ch. 4), on counts: impressions and clicks of each item at each position, which sum over blocks.

        Told apart only where items were shown at several positions: raises EvaluationError naming a position that shares no chain of items with the
        first. An item's attraction is the same for all users here: a logger that puts items on top for users who like them makes the top look
        more examined than it is.
        """
        shown, clicked = np.asarray(shown_IP, np.float64), np.asarray(clicked_IP, np.float64)
        _check_chain(shown)
        used = shown.sum(axis=1) > 0
        shown_, clicked_ = shown[used], clicked[used]
        examination = np.full(shown.shape[1], 0.5)
        attraction = np.full(len(shown_), 0.5)
        for done in range(1, rounds + 1):  # noqa: B007 (how many rounds it took)
            both = examination * attraction[:, None]
            missed = shown_ - clicked_
            # Among impressions without a click: P(examined | no click) and P(attractive | no click).
            examined = missed * (examination * (1 - attraction[:, None]) / np.maximum(1 - both, 1e-12))
            attracted = missed * (attraction[:, None] * (1 - examination) / np.maximum(1 - both, 1e-12))
            new_e = (clicked_ + examined).sum(axis=0) / np.maximum(shown_.sum(axis=0), 1e-12)
            new_a = (clicked_ + attracted).sum(axis=1) / shown_.sum(axis=1)
            moved = max(np.abs(new_e - examination).max(), np.abs(new_a - attraction).max())
            examination, attraction = new_e, new_a
            if moved < tolerance:
                break
        whole = np.full(len(shown), np.nan)
        whole[used] = attraction * examination[0]
        return cls(examination_P=examination / examination[0], attraction_I=whole, rounds=done)


def _check_chain(shown_IP: Floats) -> None:
    """Positions must hang together through items shown at more than one of them."""
    seen = shown_IP > 0
    reached = np.zeros(shown_IP.shape[1], bool)
    reached[0] = True
    for _ in range(shown_IP.shape[1]):
        reached |= seen[seen[:, reached].any(axis=1)].any(axis=0)
    if not reached.all():
        raise EvaluationError(
            f"position bias: position {int(np.argmin(reached)) + 1} shares no items with position 1, not even through others; "
            "expected items that were shown at several positions"
        )
