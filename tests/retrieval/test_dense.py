"""The exact index against a full stable sort, over random grids with ties, exclusions and short catalogues."""

import numpy as np
import pytest
import torch

from longtrail.errors import ModelError
from longtrail.retrieval.dense import DenseIndex
from longtrail.retrieval.index import Exclusion, Index


def oracle(user, items, k, excluded):
    """(ids, scores, whole order) of each user by a Python sort."""
    answers = []
    for u, hidden in zip(user, excluded, strict=True):
        scores = {i: float(u @ items[i]) for i in range(1, len(items)) if i not in hidden}
        order = sorted(scores, key=lambda i: (-scores[i], i))
        ids = order[:k] + [0] * (k - len(order[:k]))
        answers.append((ids, [scores.get(i, -np.inf) for i in ids], order))
    return answers


def integers(rng, *shape, levels):
    """Small integers in float32: inner products are exact, and ties many."""
    return torch.tensor(rng.integers(-levels, levels + 1, size=shape), dtype=torch.float32)


def csr(excluded):
    return Exclusion(np.cumsum([0, *map(len, excluded)]), np.array([i for e in excluded for i in e], np.int64))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("users", "items", "k"), [(1, 1, 1), (1, 5, 9), (7, 40, 10), (16, 300, 50), (5, 30, 30)])
@pytest.mark.parametrize("levels", [1, 50])
def test_topk_and_ranks_equal_a_full_sort(seed, users, items, k, levels):
    rng = np.random.default_rng(seed)
    user, item = integers(rng, users, 3, levels=levels), integers(rng, items + 1, 3, levels=levels)
    sizes = rng.integers(0, items + 1, size=users)
    sizes[0] = [0, items, items // 2][seed % 3]  # nothing seen, everything seen, some
    excluded = [list(rng.choice(np.arange(1, items + 1), size=s, replace=False)) for s in sizes]
    targets = torch.tensor(rng.integers(1, items + 1, size=users))
    index = DenseIndex(item, block_scores=3 * (items + 1))  # blocks of three users
    ids, scores, ranks = index.topk_and_ranks(user, targets, k, exclude=csr(excluded))
    for row, (expected_ids, expected_scores, order) in enumerate(oracle(user.numpy(), item.numpy(), k, excluded)):
        assert ids[row].tolist() == expected_ids
        assert scores[row].tolist() == expected_scores
        target = int(targets[row])
        assert int(ranks[row]) == (order.index(target) + 1 if target in order else 0)
    alone_ids, alone_scores = index.topk(user, k, exclude=csr(excluded))
    assert torch.equal(alone_ids, ids) and torch.equal(alone_scores, scores)


def test_nothing_excluded_and_all_equal_gives_the_lowest_ids():
    index = DenseIndex.build(torch.ones(101, 1))
    ids, _ = index.topk(torch.ones(2, 1), 5)
    assert ids.tolist() == [[1, 2, 3, 4, 5]] * 2
    assert isinstance(index, Index)


def test_no_users():
    ids, scores, ranks = DenseIndex.build(torch.ones(4, 2)).topk_and_ranks(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), 3)
    assert ids.shape == scores.shape == (0, 3) and ranks.shape == (0,)


@pytest.mark.parametrize(
    ("user", "item", "exclude", "message"),
    [
        (torch.ones(1, 2), torch.tensor([[0.0, 0], [1, torch.nan]]), None, "1 of 2 item vectors are not finite, first at row 1"),
        (torch.tensor([[torch.inf, 0]]), torch.ones(3, 2), None, "user vectors are not finite"),
        (torch.ones(1, 3), torch.ones(3, 2), None, r"expected \[users, 2\]"),
        (torch.ones(1, 2), torch.ones(1, 2), None, "at least one item"),
        (torch.ones(2, 2), torch.ones(3, 2), csr([[1]]), r"2 offsets; expected 3"),
        (torch.full((1, 2), 10.0), torch.tensor([[0.0, 0], [1, 1], [3e38, -3e38]]), None, "scores overflow float32"),
        (torch.full((1, 2), 10.0), torch.full((2, 2), 3e38), None, "scores overflow float32"),
    ],
)
def test_bad_input_is_named(user, item, exclude, message):
    with pytest.raises(ModelError, match=message):
        DenseIndex.build(item).topk(user, 1, exclude=exclude)


def test_autocast_around_a_search_changes_nothing():
    """Early stopping asks within a GPU's bf16: scores of 8 bits tie by the hundred, and equal scores go to the lower id."""
    draws = torch.Generator().manual_seed(0)
    user, item = torch.randn(9, 16, generator=draws), torch.randn(2001, 16, generator=draws)
    targets = torch.randint(1, 2001, (9,), generator=draws)
    index = DenseIndex(item)
    exact = index.topk_and_ranks(user, targets, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (user @ item.T)[0].unique().numel() < 1200  # of 2,001: what a search would see
        found = index.topk_and_ranks(user, targets, 20)
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
