"""What RecJPQPrune's stop rests on, watched in the compiled search itself: list by list."""

from typing import Any

import numpy as np
import pytest

from longtrail.retrieval import kernels
from longtrail.retrieval.pq import PQIndex
from longtrail.retrieval.prune import Pruning
from longtrail.retrieval.simd import CODES
from tests.retrieval.worlds import SHAPES, catalogue, exclusions, users

ITEMS, SPLITS, WIDTH, USERS = 1500, 4, 16, 3


def captured(index: PQIndex, user_BD: Any, k: int, exclude: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """The arguments of the search, with what it filled."""
    found: list[tuple[Any, ...]] = []
    with monkeypatch.context() as patch:
        real = kernels.search_lists
        patch.setattr(kernels, "search_lists", lambda *given: (real(*given), found.append(given)))
        index.topk(user_BD, k, exclude=exclude)
    assert len(found) == 1
    return found[0]


def thresholds(given: tuple[Any, ...], lists: int, k: int) -> np.ndarray:
    """[U]: the k-th best score after so many lists at most, -inf before there are k."""
    part, width, (lists_UR, bounds_UR, costs_UR, counts_U, turns_UT), *middle = given[:9]
    heaps = np.zeros((USERS, k), np.float32), np.zeros((USERS, k), np.int64), np.zeros(USERS, np.int64)
    done_U = np.zeros(USERS, bool)
    plans = (lists_UR, bounds_UR, costs_UR, np.minimum(counts_U, lists), turns_UT)
    kernels.search_lists(part, width, plans, *middle, *heaps, np.zeros(USERS, np.int64), done_U, given[-1])
    return np.where(heaps[2] == k, heaps[0][:, 0], -np.inf)


@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize(("batch", "steepest"), [(1, False), (8, False), (256, False), (1, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_thresholds_rise_bounds_fall_and_nothing_is_missed_where_they_meet(
    shape: str, batch: int, steepest: bool, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """θ never falls, σ never rises; the search goes on while σ reaches θ, and then no item outside the lists visited scores above σ < θ."""
    rng = np.random.default_rng([SHAPES.index(shape), batch, k])
    codes_NM, centroids = catalogue(rng, ITEMS, SPLITS, WIDTH, shape)
    pruning = Pruning(least_blocks=1, trials=((10**6, 1e3),), longest_pause=0, batch=batch, steepest=steepest)  # to the end, whatever it costs
    index = PQIndex(codes_NM, centroids, pruning=pruning)
    exclude = exclusions(rng, USERS, 100)
    given = captured(index, users(rng, USERS, index.width), k, exclude, monkeypatch)
    lists_UR, bounds_UR = given[2][:2]
    tables_UMb, turn_U, done_U = given[6].reshape(USERS, SPLITS, CODES), given[-3], given[-2]
    assert done_U.all() and len(given[2][3]) == USERS
    theta_RU = np.stack([thresholds(given, lists, k) for lists in range(int(turn_U.max()) + 1)])
    assert (theta_RU[1:] >= theta_RU[:-1]).all()
    codes_MN = codes_NM[1:].numpy().astype(int).T
    for u, turn in enumerate(turn_U):
        theta_R, sigma_R = theta_RU[: turn + 1, u], bounds_UR[u, : turn + 1]
        assert (sigma_R[1:] <= sigma_R[:-1]).all()
        assert (sigma_R[:-1] >= theta_R[:-1]).all()  # no list without need
        met_N = np.zeros(ITEMS, bool)
        for chosen in lists_UR[u, :turn]:
            met_N |= codes_MN[chosen // WIDTH] == chosen % WIDTH
        scores_N = np.zeros(ITEMS, np.float32)
        for split in range(SPLITS):
            scores_N += tables_UMb[u, split, codes_MN[split]]
        assert sigma_R[-1] < theta_R[-1] or met_N.all()
        assert met_N.all() or scores_N[~met_N].max() <= sigma_R[-1]
