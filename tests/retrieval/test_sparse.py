"""SparseIndex against every score written out and sorted."""

import numpy as np
import pytest
import torch

from longtrail.errors import ModelError
from longtrail.models.contracts import ScoreRows
from longtrail.retrieval import sparse
from longtrail.retrieval.index import Exclusion, Filter, Index
from longtrail.retrieval.sparse import SparseIndex


def random_rows(rng: np.random.Generator, items: int, rows: int, *, named: float, levels: int) -> ScoreRows:
    """Base scores and row scores of few `levels`, so that ties abound; some rows name nothing, some everything."""
    names_RN = rng.random((rows, items)) < rng.choice([0, named, 1], (rows, 1), p=[0.2, 0.6, 0.2])
    counts_R = names_RN.sum(1)
    scores_n = rng.integers(0, levels, counts_R.sum()) / levels
    base_N1 = np.concatenate([[0], rng.integers(0, levels, items) / levels])
    return ScoreRows(
        torch.from_numpy(np.concatenate([[0], np.cumsum(counts_R)])),
        torch.from_numpy(np.nonzero(names_RN)[1].astype(np.int32) + 1),
        torch.from_numpy(scores_n.astype(np.float32)),
        torch.from_numpy(base_N1.astype(np.float32)),
        torch.from_numpy(rng.choice([0.1, 1 / 3, 1.0], rows).astype(np.float32)),
    )


def slow(
    rows: ScoreRows, users: list[int], targets: list[int], k: int, banned: list[set[int]], may: np.ndarray
) -> tuple[list[list[int]], list[list[float]], list[int]]:
    lists, scores, ranks = [], [], []
    for row, target, gone in zip(users, targets, banned, strict=True):
        all_scores = float(rows.weights_R[row]) * rows.base_N1.double().numpy()
        for place in range(int(rows.offsets_R1[row]), int(rows.offsets_R1[row + 1])):
            all_scores[int(rows.items_n[place])] += float(rows.scores_n[place])
        order = sorted((i for i in range(1, len(all_scores)) if may[i] and i not in gone), key=lambda i: (-all_scores[i], i))
        lists.append((order + [0] * k)[:k])
        scores.append(([float(np.float32(all_scores[i])) for i in order] + [-np.inf] * k)[:k])
        ranks.append(order.index(target) + 1 if target in order else 0)
    return lists, scores, ranks


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_sorted_catalogue(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    items, users = int(rng.choice([1, 2, 30, 120])), int(rng.choice([0, 1, 40]))
    rows = random_rows(rng, items, 7, named=0.2, levels=int(rng.choice([2, 5, 1000])))
    k = int(rng.choice([1, 5, items, items + 3]))
    monkeypatch.setattr(sparse, "_BLOCK", int(rng.choice([1, 50, 1 << 21])))
    index = SparseIndex(rows)
    assert isinstance(index, Index) and index.items == items
    users_B1, targets_B = torch.from_numpy(rng.integers(0, 7, (users, 1))), torch.from_numpy(rng.integers(0, items + 1, users))
    banned = [set(rng.integers(-items - 3, items + 5, rng.choice([0, 3, items])).tolist()) for _ in range(users)]
    flat = [i for gone in banned for i in (*gone, *gone)]  # repeats, 0, negative and unknown ids do no harm
    exclude = Exclusion(np.concatenate([[0], np.cumsum([2 * len(gone) for gone in banned])]).astype(np.int64), np.array(flat, np.int64))
    for allowed in (None, Filter(rng.random(items + 1) < 0.6), Filter(np.zeros(1, bool))):
        may = np.ones(items + 1, bool) if allowed is None else allowed.up_to(items)
        for given in (exclude, None):
            gone = banned if given else [set()] * users
            ids, scores, ranks = index.topk_and_ranks(users_B1, targets_B, k, exclude=given, allowed=allowed)
            expected = slow(rows, users_B1[:, 0].tolist(), targets_B.tolist(), k, gone, may)
            assert (ids.tolist(), scores.tolist(), ranks.tolist()) == expected
            assert all(torch.equal(a, b) for a, b in zip(index.topk(users_B1, k, exclude=given, allowed=allowed), (ids, scores), strict=True))
            assert (ids.dtype, scores.dtype, ranks.dtype) == (torch.int64, torch.float32, torch.int64)


def test_what_does_not_fit_is_refused() -> None:
    rows = random_rows(np.random.default_rng(0), 5, 3, named=0.5, levels=5)
    index, one = SparseIndex(rows), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ModelError, match="from 3 to 3; expected 0 to 2"):
        index.topk(one + 3, 2)
    with pytest.raises(ModelError, match="expected 0 to 2"):
        index.topk(one - 1, 2)
    with pytest.raises(ModelError, match="shape"):
        index.topk(torch.zeros(1, 2, dtype=torch.int64), 2)
    with pytest.raises(ModelError, match="k is 0"):
        index.topk(one, 0)
    with pytest.raises(ModelError, match="targets"):
        index.topk_and_ranks(one, torch.tensor([6]), 2)
    with pytest.raises(ModelError, match="weights above 0"):
        SparseIndex(rows._replace(weights_R=rows.weights_R * 0))
    with pytest.raises(ModelError, match="not finite"):
        SparseIndex(rows._replace(base_N1=rows.base_N1 * torch.nan))
