"""The engines over codes against the dense index, against a sort, and against each other: exhaustive, pruned, with and without 8-bit bounds."""

import numpy as np
import pytest
import torch

from longtrail.config import RetrievalSettings
from longtrail.errors import ModelError
from longtrail.models.items.recjpq import RecJPQItems
from longtrail.retrieval import build_index
from longtrail.retrieval.dense import DenseIndex
from longtrail.retrieval.device import DeviceCatalogue
from longtrail.retrieval.index import Exclusion, Filter, Index
from longtrail.retrieval.pq import PQIndex
from longtrail.retrieval.prune import Pruning, take_lists
from longtrail.retrieval.simd import CODES
from longtrail.retrieval.tables import plan, sub_scores
from tests.retrieval.worlds import SHAPES, catalogue, exclusions, users, vectors

PRUNINGS = {
    "exhaustive": None,
    "pruned": Pruning(least_blocks=1, trials=(), longest_pause=0),  # lists to the end, whatever they cost
    "as the paper orders": Pruning(least_blocks=1, trials=(), longest_pause=0, batch=8, steepest=False),
    "as the paper orders, one by one": Pruning(least_blocks=1, trials=(), longest_pause=0, batch=1, steepest=False),
    "one by one": Pruning(least_blocks=1, trials=(), longest_pause=0, batch=1),
    "whole splits": Pruning(least_blocks=1, trials=(), longest_pause=0, batch=256, steepest=False),
    "changes over": Pruning(least_blocks=1, trials=((2, 0.3), (3, 0.0)), longest_pause=0, batch=1),
}


@pytest.mark.parametrize("fast", [True, False], ids=["bounds", "adding"])
@pytest.mark.parametrize("pruning", PRUNINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_lists_scores_and_ranks_equal_the_dense_index(shape: str, pruning: str, fast: bool) -> None:
    """k from 1 to beyond the catalogue, 1 to 1,000 among them; nothing, some and nearly everything excluded or filtered away."""
    rng = np.random.default_rng([SHAPES.index(shape), len(pruning), fast])
    for items, splits, codes in ((1, 1, 1), (40, 3, 5), (511, 4, 256), (1500, 8, 16), (6000, 2, 200)):
        codes_NM, centroids = catalogue(rng, items, splits, codes, shape)
        index, dense = PQIndex(codes_NM, centroids, pruning=PRUNINGS[pruning]), DenseIndex(vectors(codes_NM, centroids))
        index.fast &= fast
        for k in (1, 10, 100, 1000):
            user_BD, targets_B = users(rng, 3, index.width), torch.from_numpy(rng.integers(0, items + 1, size=3))
            exclude = exclusions(rng, 3, items) if k != 10 else None
            allowed = Filter(rng.random(items + 1) < rng.choice([0.0, 0.02, 0.5])) if k in (10, 100) else None
            for found, expected in zip(
                index.topk_and_ranks(user_BD, targets_B, k, exclude=exclude, allowed=allowed),
                dense.topk_and_ranks(user_BD, targets_B, k, exclude=exclude, allowed=allowed),
                strict=True,
            ):
                assert torch.equal(found, expected), (items, k)
            alone = index.topk(user_BD[:1], k, allowed=allowed)
            assert torch.equal(alone[0], index.topk(user_BD, k, allowed=allowed)[0][:1])


@pytest.mark.parametrize("pruning", ["exhaustive", "pruned", "changes over"])
def test_ten_thousand_small_cases_equal_a_sort(pruning: str) -> None:
    """12,000 users in 60 catalogues, three engines: 36,000 cases. Scores are summed as the engines say and sorted whole."""
    rng = np.random.default_rng(5)
    cases = 0
    for round_ in range(60):
        items, splits, codes = int(rng.integers(1, 90)), int(rng.integers(1, 9)), int(rng.integers(1, 17))
        codes_NM, centroids = catalogue(rng, items, splits, codes, SHAPES[round_ % len(SHAPES)])
        index, count, k = PQIndex(codes_NM, centroids, pruning=PRUNINGS[pruning]), 200, int(rng.integers(1, items + 3))
        index.fast = index.fast and round_ % 3 > 0
        user_BD, exclude = users(rng, count, index.width), exclusions(rng, count, items)
        scores_BN = (user_BD @ vectors(codes_NM, centroids).T).numpy()
        scores_BN[:, 0] = -np.inf
        owners, hidden = np.repeat(np.arange(count), np.diff(exclude.offsets_B)), exclude.items
        known = (hidden >= 0) & (hidden <= items)
        scores_BN[owners[known], hidden[known]] = -np.inf
        order_BN = np.argsort(-scores_BN, axis=1, kind="stable")[:, :k]
        best_BN = np.take_along_axis(scores_BN, order_BN, 1)
        order_BN[best_BN == -np.inf] = 0
        ids, scores = (values.numpy()[:, : order_BN.shape[1]] for values in index.topk(user_BD, k, exclude=exclude))
        np.testing.assert_array_equal(ids, order_BN)
        np.testing.assert_array_equal(scores, best_BN)
        cases += count
    assert cases >= 10_000


@pytest.mark.parametrize("shape", ["random", "peaked"])
def test_threads_change_nothing(shape: str) -> None:
    rng = np.random.default_rng(1)
    codes_NM, centroids = catalogue(rng, 70_000, 8, 256, shape, width=4)
    one, three = (PQIndex(codes_NM, centroids, threads=threads) for threads in (1, 3))
    user_BD, targets = users(rng, 9, one.width), torch.arange(1, 10)
    for part in (slice(0, 1), slice(0, 9)):
        for a, b in zip(one.topk_and_ranks(user_BD[part], targets[part], 100), three.topk_and_ranks(user_BD[part], targets[part], 100), strict=True):
            assert torch.equal(a, b)


def test_real_numbers_give_the_sums_in_the_order_of_the_splits() -> None:
    """Not integers: scores are, bit for bit, the float32 sums; they are near the inner products; pruned and exhaustive lists are the same."""
    rng = np.random.default_rng(2)
    codes_NM, _ = catalogue(rng, 9000, 8, 256, "random")
    centroids, user_BD = torch.randn(8, 256, 16), torch.randn(20, 128)
    tables = np.zeros((20, 8 * CODES), np.float32)
    sub_scores(user_BD.numpy(), centroids.numpy(), tables)
    scores = np.zeros((20, len(codes_NM)), np.float32)
    for k in range(8):
        scores += tables[:, k * CODES + codes_NM[:, k].numpy().astype(int)]
    scores[:, 0] = -np.inf
    for pruning in PRUNINGS.values():
        index = PQIndex(codes_NM, centroids, pruning=pruning)
        for k in (1, 10, 1000):
            ids, found = index.topk(user_BD, k)
            np.testing.assert_array_equal(ids.numpy(), np.argsort(-scores, axis=1, kind="stable")[:, :k])
            np.testing.assert_array_equal(found.numpy(), -np.sort(-scores, axis=1)[:, :k])
    dense = DenseIndex(vectors(codes_NM, centroids)).topk(user_BD, 50)[1]
    torch.testing.assert_close(PQIndex(codes_NM, centroids).topk(user_BD, 50)[1], dense, rtol=1e-4, atol=1e-4)


def planned(table_MT: np.ndarray, width: int, batch: int, steepest: bool) -> tuple[list[int], np.ndarray]:
    """(lists, bounds) of one user's whole plan, of lists that have a block each."""
    splits = len(table_MT)
    order, most = np.argsort(-table_MT[None, :, :width], axis=2), splits * width
    lists, bounds, costs = np.zeros((1, most), np.int64), np.zeros((1, most + 1), np.float32), np.zeros((1, most + 1), np.int64)
    counts, turns = np.zeros(1, np.int64), np.full((1, splits * CODES), 10**6, np.int32)
    plan(table_MT.reshape(1, -1), order, np.arange(most + 1), 10**6, batch, steepest, lists, bounds, costs, counts, turns)
    return lists[0, : counts[0]].tolist(), bounds[0, : counts[0] + 1]


@pytest.mark.parametrize("steepest", [True, False])
@pytest.mark.parametrize("batch", [1, 8, 256])
def test_the_bound_of_a_plan_falls_and_bounds_what_is_left(steepest: bool, batch: int) -> None:
    rng = np.random.default_rng(3)
    splits, width = 4, 32
    codes_NM = rng.integers(0, width, size=(500, splits))
    table_MT = rng.standard_normal((splits, CODES)).astype(np.float32)
    lists, bounds = planned(table_MT, width, batch, steepest)
    done = len(lists)
    assert len(set(lists)) == done and np.all(np.diff(bounds) <= 0) and bounds[done] == -np.inf
    scores = np.zeros(500, np.float32)
    for k in range(splits):
        scores += table_MT[k, codes_NM[:, k]]
    for r in range(done):
        met = np.zeros(500, bool)
        for chosen in lists[:r]:
            met |= codes_NM[:, chosen // width] == chosen % width
        assert np.all(scores[~met] <= bounds[r])


@pytest.mark.parametrize("steepest", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_which_split_a_plan_goes_on_with(steepest: bool, batch: int) -> None:
    """The paper's: the one whose next sub-score is highest; steepest: the one whose sub-scores fall most within the batch. Until one is used up."""
    splits, width = 4, 32
    table_MT = np.random.default_rng(4).standard_normal((splits, CODES)).astype(np.float32)
    falling_Mb, at, expected = -np.sort(-table_MT[:, :width], axis=1), [0] * splits, []
    while max(at) < width:
        left = [falling_Mb[k, min(at[k] + batch, width - 1)] if steepest else 0 for k in range(splits)]
        k = int(np.argmax([falling_Mb[k, at[k]] - left[k] for k in range(splits)]))
        expected += [k * width + int(j) for j in np.argsort(-table_MT[k, :width])[at[k] : at[k] + batch]]
        at[k] += batch
    assert planned(table_MT, width, batch, steepest)[0] == expected


def test_pruning_visits_few_lists_where_scores_are_peaked_and_gives_up_where_they_are_flat() -> None:
    rng = np.random.default_rng(4)
    codes_NM, centroids = catalogue(rng, 60_000, 8, 64, "random")
    pruning = Pruning(least_blocks=1, batch=1)
    index = PQIndex(codes_NM, centroids, pruning=pruning)
    tables = np.zeros((2, 8, CODES), np.float32)
    tables[0, :, :64] = np.linspace(0, 1, 64)  # no sub-id stands out
    tables[1, :, :64] = rng.standard_normal((8, 64))
    tables[1, :, 0] = 50  # the first one of each split does
    lists, snapshot = index.snapshot.lists, index.snapshot
    assert lists is not None
    heaps = (np.zeros((2, 10), np.float32), np.zeros((2, 10), np.int64), np.zeros(2, np.int64))
    part, blocks = lists.part(snapshot.segments[0].valid), snapshot.segments[0].blocks
    nobody = (np.zeros(0, np.int64), np.zeros(3, np.int64))
    done, _, turn = take_lists(part, lists.starts, 64, blocks, pruning, tables.reshape(2, -1), *nobody, *heaps, fast=index.fast)
    assert not done[0] and turn[0] <= 24
    assert done[1] and turn[1] <= 24


@pytest.mark.parametrize("shape", ["random", "few values", "tied"])
def test_torch_batches_equal_the_kernels(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of GPUs, on the CPU; in chunks of 512 items and blocks of two users."""
    rng = np.random.default_rng(6)
    codes_NM, centroids = catalogue(rng, 1700, 4, 32, shape)
    index = PQIndex(codes_NM, centroids)
    index.add(torch.from_numpy(rng.integers(0, 32, size=(30, 4), dtype=np.uint8)))
    index.retire(np.array([5, 1700, 1710]))
    user_BD, targets, exclude = users(rng, 5, index.width), torch.from_numpy(rng.integers(0, 1731, size=5)), exclusions(rng, 5, 1730)
    allowed = Filter(rng.random(1731) < 0.7)
    for scores in (1 << 26, 1024):
        monkeypatch.setattr("longtrail.retrieval.device._SCORES", scores)
        monkeypatch.setattr("longtrail.retrieval.device._USERS", 2)
        on_device = DeviceCatalogue(index.snapshot, centroids, torch.device("cpu"))
        for k in (1, 30, 1800):
            found = on_device(user_BD, targets, k, exclude, allowed)
            for a, b in zip(found, index.topk_and_ranks(user_BD, targets, k, exclude=exclude, allowed=allowed), strict=True):
                assert a is not None and torch.equal(a, b)


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_a_catalogue_with_nothing_left_gives_empty_lists(pruning: str) -> None:
    """All excluded, all filtered away, all retired, all compacted away; also for nobody, and by torch as on a GPU."""
    codes_NM, centroids = catalogue(np.random.default_rng(9), 30, 2, 8, "random")
    index = PQIndex(codes_NM, centroids, pruning=PRUNINGS[pruning])
    dense, ids, nothing = DenseIndex(vectors(codes_NM, centroids)), np.arange(1, 31), Filter(np.zeros(31, bool))

    def check(user_BD: torch.Tensor, exclude: Exclusion | None, allowed: Filter | None) -> None:
        targets_B, on_device = torch.arange(len(user_BD)), DeviceCatalogue(index.snapshot, centroids, torch.device("cpu"))
        expected = dense.topk_and_ranks(user_BD, targets_B, 5, allowed=nothing)
        assert not expected[0].any() and not expected[2].any()
        for a, b, c in zip(
            index.topk_and_ranks(user_BD, targets_B, 5, exclude=exclude, allowed=allowed),
            on_device(user_BD, targets_B, 5, exclude, allowed),
            expected,
            strict=True,
        ):
            assert b is not None and torch.equal(a, c) and torch.equal(b, c)
        ids_BK, _, no_ranks = on_device(user_BD, None, 5, exclude, allowed)
        assert torch.equal(ids_BK, expected[0]) and no_ranks is None

    for people in (3, 1, 0):
        user_BD = users(np.random.default_rng(1), people, index.width)
        check(user_BD, Exclusion(np.arange(people + 1) * 30, np.tile(ids, people)), None)
        check(user_BD, None, nothing)
    index.retire(ids)
    for _ in range(2):
        for people in (3, 1, 0):
            check(users(np.random.default_rng(1), people, index.width), None, None)
        index.compact()


def test_what_cannot_be_ranked_is_refused() -> None:
    codes_NM, centroids = catalogue(np.random.default_rng(0), 30, 2, 8, "random")
    index = PQIndex(codes_NM, centroids)
    assert isinstance(index, Index)
    for bad, message in (
        (torch.full((1, 4), torch.nan), "1 of 1 user vectors are not finite"),
        (torch.tensor([[0.0, torch.inf, 0, 0]]), "not finite"),
        (torch.full((1, 4), 3e38), "overflow"),
        (torch.zeros(1, 5), r"expected \[users, 4\]"),
    ):
        with pytest.raises(ModelError, match=message):
            index.topk(bad, 3)
    with pytest.raises(ModelError, match="k is 0"):
        index.topk(torch.zeros(1, 4), 0)
    with pytest.raises(ModelError, match=r"2 offsets; expected 3"):
        index.topk(torch.zeros(2, 4), 3, exclude=Exclusion(np.array([0, 0]), np.zeros(0, np.int64)))
    with pytest.raises(ModelError, match="targets run from 1 to 31"):
        index.topk_and_ranks(torch.zeros(2, 4), torch.tensor([1, 31]), 3)
    with pytest.raises(ModelError, match="codes run to 7; the centroids have 4"):
        PQIndex(torch.full((9, 2), 7, dtype=torch.uint8), centroids[:, :4])
    with pytest.raises(ModelError, match=r"expected uint8 \[items \+ 1, 2\]"):
        PQIndex(codes_NM.int(), centroids)
    with pytest.raises(ModelError, match="centroid vectors are not finite"):
        PQIndex(codes_NM, centroids * torch.inf)


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_splits_that_share_the_user_vector_equal_the_dense_index(pruning: str) -> None:
    """RecJPQ with added pieces: a split is scored by the whole user vector. After a change of the catalogue too, as torch does it, for one user."""
    rng = np.random.default_rng(7)
    codes_NM, centroids = catalogue(rng, 1500, 4, 32, "random", width=6)
    index = PQIndex(codes_NM, centroids, shared=True, pruning=PRUNINGS[pruning])
    vectors_ND = torch.stack([centroids[k][codes_NM[:, k].long()] for k in range(4)]).sum(0)
    vectors_ND[0] = 0
    dense, user_BD, targets = DenseIndex(vectors_ND), users(rng, 7, 6), torch.from_numpy(rng.integers(0, 1501, size=7))
    assert index.width == 6
    expected = dense.topk_and_ranks(user_BD, targets, 20, exclude=exclusions(np.random.default_rng(8), 7, 1500))
    for a, b in zip(index.topk_and_ranks(user_BD, targets, 20, exclude=exclusions(np.random.default_rng(8), 7, 1500)), expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(index.topk(user_BD[:1], 20)[0], dense.topk(user_BD[:1], 20)[0])
    on_device = DeviceCatalogue(index.snapshot, centroids, torch.device("cpu"))
    assert torch.equal(on_device(user_BD.repeat(1, 4), None, 20, None, None)[0], dense.topk(user_BD, 20)[0])
    index.retire(dense.topk(user_BD[:1], 1)[0][0].numpy())
    assert torch.equal(index.topk(user_BD[:1], 5)[0], dense.topk(user_BD[:1], 6)[0][:, 1:])
    with pytest.raises(ModelError, match=r"expected \[users, 6\]"):
        index.topk(torch.zeros(1, 24), 3)


def test_no_users() -> None:
    codes_NM, centroids = catalogue(np.random.default_rng(0), 30, 2, 8, "random")
    ids, scores, ranks = PQIndex(codes_NM, centroids).topk_and_ranks(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 3)
    assert ids.shape == scores.shape == (0, 3) and ranks.shape == (0,)


def test_kinds_and_what_auto_takes() -> None:
    """Kinds are settings; vectors are dense whatever they say; auto goes by size and by the memory that lists take."""

    def kind(items: RecJPQItems | torch.Tensor, **settings: object) -> str:
        return build_index(items, RetrievalSettings(**settings)).kind  # type: ignore[arg-type, attr-defined]

    small, large = RecJPQItems(50, 8, splits=2, codes=16), RecJPQItems(40_000, 8, splits=2, codes=16)
    assert kind(small) == "dense" and kind(large) == "pqtopk"
    assert [kind(small, kind=name) for name in ("dense", "pqtopk", "recjpq_prune")] == ["dense", "pqtopk", "recjpq_prune"]
    assert kind(torch.ones(5, 2), kind="pqtopk") == "dense"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longtrail.retrieval.factory.PRUNE_ITEMS", 1000)
        assert kind(large) == "recjpq_prune" and kind(large, list_bytes=1000) == "pqtopk"


def test_autocast_around_a_search_changes_nothing() -> None:
    """As it is on a GPU, where early stopping asks within training's bf16, and on a CPU."""
    rng = np.random.default_rng(3)
    codes_NM, centroids = catalogue(rng, 900, 4, 64, "random")
    user_BD, targets = users(rng, 5, centroids.shape[0] * centroids.shape[2]), torch.from_numpy(rng.integers(1, 901, size=5))
    index = PQIndex(codes_NM, centroids)
    on_device = DeviceCatalogue(index.snapshot, centroids, torch.device("cpu"))
    exact = on_device(user_BD, targets, 20, None, None), index.topk_and_ranks(user_BD, targets, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = on_device(user_BD, targets, 20, None, None), index.topk_and_ranks(user_BD, targets, 20)
    for one, other in zip(found, exact, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))  # type: ignore[call-overload]
