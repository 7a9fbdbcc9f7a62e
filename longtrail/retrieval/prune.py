"""RecJPQPrune (Petrov et al., SIGIR 2025), exact: lists of the best sub-ids first, until no item outside them can enter the top k.

The paper's: the lists, the bound, the stop where no other item can do better; here items that could only draw level are looked at, too, and the
smaller id wins, as everywhere. Ours: that; each list carries its items' codes, so that it is read in order, 512 items at a time, and not item by item
(M (M + 4) bytes an item, so 96 with 8 splits); the order "steepest"; the change to the exhaustive scan when lists would cost more.
U users, K results, M splits, T = 256 M, R lists that a plan holds.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtrail.retrieval import kernels
from longtrail.retrieval.simd import CODES
from longtrail.retrieval.tables import plan

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
_NEVER = 2**31 - 1  # the turn of a list that no plan holds


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """How lists are visited. All choices give the same results."""

    batch: int = 8  # sub-ids of a split at a time, as many as the paper's code takes
    steepest: bool = True
    trials: tuple[tuple[int, float], ...] = ((8, 0.8), (24, 0.4))  # (lists, cost): after so many, the rest may cost this share of a whole scan
    least_blocks: int = 1024  # below it an exhaustive scan takes less time than a plan
    longest_pause: int = 64  # calls that go without lists, at most, after lists did not pay


class Habit:
    """Whether to try lists at all: where they do not pay, they are tried ever less often. Threads may race here; no result depends on it."""

    def __init__(self, longest: int) -> None:
        self._longest, self._pause, self._left = longest, 1, 0

    def wants(self) -> bool:
        if self._left > 0:
            self._left -= 1
            return False
        return True

    def learn(self, paid: bool) -> None:
        self._pause = 1 if paid else min(2 * self._pause, self._longest)
        self._left = 0 if paid else self._pause


def take_lists(
    part: Any, starts: Ints, codes: int, blocks: int, pruning: Pruning, tables_UT: Floats, excluded: Ints, at: Ints,
    scores_UK: Floats, places_UK: Ints, sizes_U: Ints, *, fast: bool,
) -> tuple[NDArray[np.bool_], NDArray[np.int32], Ints]:  # fmt: skip
    """Visit lists while that pays. Fills the heaps; returns done_U (their heaps are final for the base), turns_UT and turn_U: who is not done
    scans all blocks, passing over items of lists whose turn is below turn_U."""
    users, splits = len(tables_UT), part[2]
    turn_U = np.zeros(users, np.int64)
    if blocks < pruning.least_blocks:
        return np.zeros(users, bool), np.zeros((users, 0), np.int32), turn_U
    limit = int(max((cost for _, cost in pruning.trials), default=splits) * blocks)
    longest = min(splits * codes, limit + pruning.batch + int((np.diff(starts) == 0).sum()))  # a list has a block at least, unless it is empty
    lists_UR, bounds_UR = np.empty((users, longest), np.int64), np.empty((users, longest + 1), np.float32)
    costs_UR, counts_U = np.empty((users, longest + 1), np.int64), np.zeros(users, np.int64)
    turns_UT = np.full((users, splits * CODES), _NEVER, np.int32)
    order_UMb = np.argsort(-tables_UT.reshape(users, splits, CODES)[:, :, :codes], axis=2)
    plan(tables_UT, order_UMb, starts, limit, pruning.batch, pruning.steepest, lists_UR, bounds_UR, costs_UR, counts_U, turns_UT)
    done_U, trials = np.zeros(users, bool), np.array([*pruning.trials, (splits * codes, np.inf)], np.float64)
    plans = (lists_UR, bounds_UR, costs_UR, counts_U, turns_UT)
    kernels.search_lists(part, codes, plans, starts, trials, blocks, tables_UT, excluded, at, scores_UK, places_UK, sizes_U, turn_U, done_U, fast)
    return done_U, turns_UT, turn_U
