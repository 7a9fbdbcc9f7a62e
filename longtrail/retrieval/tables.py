"""Compiled, before a scan: a user's sub-scores, and the order in which pruning visits the lists of sub-ids.

M splits, b sub-ids a split, U users of a call, T = 256 M places of a table, R lists.
"""

import numba
import numpy as np

from longtrail.kernels import kernel
from longtrail.retrieval.simd import CODES

MADE_WITH = {"kernels.py": "be9794c4dfea49a5", "retrieval/simd.py": "2facfbbeb4173517"}


@numba.njit(nogil=True, fastmath={"reassoc", "contract"})
def _dot(a, b, width):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(width):
        total += a[i] * b[i]
    return total


@kernel
def sub_scores(users_UD, centroids_MbE, tables_UT):  # type: ignore[no-untyped-def]
    """tables_UT[u, 256 k + j] = <centroid j of split k, part k of user u>, the same bits in every batch. Returns whether all are finite."""
    splits, codes, width = centroids_MbE.shape
    total = np.float32(0)
    for u in range(len(users_UD)):
        for k in range(splits):
            part = users_UD[u, k * width : (k + 1) * width]
            for j in range(codes):
                tables_UT[u, k * CODES + j] = _dot(part, centroids_MbE[k, j], width)
                total += tables_UT[u, k * CODES + j] * np.float32(0)  # 0, or NaN
    return total == 0


@kernel
def plan(tables_UT, order_UMb, starts, limit, batch, steepest, lists_UR, bounds_UR, costs_UR, counts_U, turns_UT):  # type: ignore[no-untyped-def]
    """The order in which lists are visited, best sub-ids of a split first, until they hold `limit` blocks or all items.

    order_UMb: the sub-ids of each split by falling sub-score.
    List k * width + j holds the items of sub-id j of split k, in blocks starts[list] .. starts[list + 1].
    bounds_UR[u, r] bounds the score of every item that none of the first r lists holds: the sum, in the order of the splits as scores are summed,
    of the best sub-score left in each. costs_UR[u, r]: blocks of the first r lists; both for r = 0 .. counts_U[u]. turns_UT: r of each list chosen.
    Each step takes `batch` lists of one split: the one whose next sub-score is highest (RecJPQPrune, Petrov et al., SIGIR 2025), or, steepest, the
    one whose sub-scores fall most within the batch (ours: it lowers the bound fastest).
    """
    splits, width = order_UMb.shape[1:]
    falling, at = np.empty((splits, width), np.float32), np.empty(splits, np.int64)
    for u in range(len(tables_UT)):
        order = order_UMb[u]
        for k in range(splits):
            for j in range(width):
                falling[k, j] = tables_UT[u, k * CODES + order[k, j]]
        at[:] = 0
        done, cost, left = 0, 0, True
        while True:
            bound = np.float32(0)
            for k in range(splits):
                left = left and at[k] < width
                bound += falling[k, min(at[k], width - 1)]
            bounds_UR[u, done], costs_UR[u, done] = bound if left else -np.inf, cost
            if cost >= limit or not left:
                break
            best, chosen = np.float32(-np.inf), -1
            for k in range(splits):
                worth = falling[k, at[k]]
                if steepest:
                    worth -= falling[k, min(at[k] + batch, width - 1)]
                if chosen < 0 or worth > best:
                    best, chosen = worth, k
            for _ in range(min(batch, width - at[chosen])):
                j = order[chosen, at[chosen]]
                lists_UR[u, done] = chosen * width + j
                turns_UT[u, chosen * CODES + j] = done
                cost += starts[chosen * width + j + 1] - starts[chosen * width + j]
                at[chosen] += 1
                done += 1
                bounds_UR[u, done], costs_UR[u, done] = bound, cost  # of the batch's start: it holds within the batch, too
        counts_U[u] = done
