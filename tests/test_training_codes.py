"""Codes of RecJPQ: equally full bins as scikit-learn cuts them, from the training period alone, given once and kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.preprocessing import KBinsDiscretizer

from longtrail.config import DINSettings, RecJPQItemsSettings, SASRecSettings, TrainingSettings
from longtrail.examples import FeatureSet
from longtrail.models.items.factory import item_slots
from longtrail.models.registry import build_model
from longtrail.training import codes as coding
from longtrail.training import fitting, starts
from longtrail.training.codes import NOISE, assign, assign_codes, bpr_components, equal_bins, extend_codes, svd_components
from longtrail.training.interactions import interaction_matrix, unlabelled_until

How = Literal["svd", "bpr", "random"]
ONE_THREAD = TrainingSettings(accelerator="cpu", threads=1)


@pytest.fixture(scope="module")
def features(toy_features_folder: Path) -> FeatureSet:
    return FeatureSet.open(toy_features_folder)


def tastes(users: int, items: int, seed: int = 0) -> csr_matrix:
    """Counts of a log with four groups of items and of users; item i is of group i mod 4; a long tail."""
    rng = np.random.default_rng(seed)
    weights_N = 1 / np.arange(1, items + 1) ** 0.7
    rates_UN = weights_N * np.where(np.arange(users)[:, None] % 4 == np.arange(items) % 4, 3.0, 0.3)
    return csr_matrix(rng.poisson(rates_UN).astype(float))


# ---------------------------------------------------------------- bins


@pytest.mark.parametrize("items", [256, 257, 300, 1000, 3416, 20_000, 210_000])
def test_bins_are_scikit_learns_with_no_difference(items: int) -> None:
    values_N = np.random.default_rng(items).standard_t(2, items)
    peer = KBinsDiscretizer(256, encode="ordinal", strategy="quantile", quantile_method="averaged_inverted_cdf", subsample=None, dtype=np.float64)
    assert np.array_equal(equal_bins(values_N, 256), peer.fit_transform(values_N[:, None])[:, 0])


@pytest.mark.parametrize(("items", "codes"), [(1, 256), (2, 256), (255, 256), (256, 256), (257, 256), (1000, 7), (999, 256)])
def test_bins_are_equally_full_and_in_order(items: int, codes: int) -> None:
    values_N = np.random.default_rng(0).normal(size=items)
    bins_N = equal_bins(values_N, codes)
    assert bins_N.dtype == np.uint8 and bins_N.max() == codes - 1
    counts = np.bincount(bins_N, minlength=codes)
    assert counts.max() - counts.min() <= 1
    assert (np.diff(bins_N[np.argsort(values_N)].astype(int)) >= 0).all()


def test_equal_values_share_a_code_unless_noise_spreads_them() -> None:
    values_N1 = np.where(np.random.default_rng(0).random(20_000) < 0.6, 0.0, np.random.default_rng(1).random(20_000))[:, None]
    tied = values_N1[:, 0] == 0
    without, spread = (assign(values_N1, 1, 256, seed=0, noise=noise).codes_NM[1:, 0] for noise in (0.0, NOISE))
    assert len(set(without[tied])) == 1 and len(set(without)) < 110
    assert np.ptp(np.bincount(spread, minlength=256)) <= 1
    assert not np.array_equal(spread, assign(values_N1, 1, 256, seed=1).codes_NM[1:, 0])  # another seed, another order of the equal


@pytest.mark.parametrize("tied_at", [0.5, 1.0])
def test_the_noise_tells_equal_values_apart_far_from_zero_too(tied_at: float) -> None:
    """At .5 single precision has steps of 6e-8: 60,000 items within noise of 1e-5 would share values again."""
    random = np.random.default_rng(0)
    values_N1 = np.where(random.random(100_000) < 0.6, tied_at, random.random(100_000))[:, None]
    assert np.ptp(np.bincount(assign(values_N1, 1, 256, seed=0).codes_NM[1:, 0], minlength=256)) <= 1
    assert NOISE == 1e-5  # the paper's; less would still spread these, more would move items that differ


def test_levels_are_the_mean_values_of_the_codes_in_order() -> None:
    values_NK = np.random.default_rng(0).normal(size=(500, 2)) * [1, 1e-3] + [5, 0]
    found = assign(values_NK, 3, 8, seed=0)
    for k in range(2):
        means = [values_NK[found.codes_NM[1:, k] == code, k].mean() for code in range(8)]
        np.testing.assert_allclose(found.levels_Mb[k], means, rtol=0, atol=1e-4 * np.ptp(values_NK[:, k]))
    assert not found.levels_Mb[2].any() and len(set(found.codes_NM[1:, 2])) == 8  # a split past the components: by chance
    few = assign(np.array([[0.0], [1.0], [3.0]]), 1, 256, seed=0).levels_Mb[0]
    assert (np.diff(few) >= 0).all() and few[0] == pytest.approx(0, abs=1e-3) and few[-1] == pytest.approx(3, abs=1e-3)


# ---------------------------------------------------------------- factorisations


def test_svd_components_are_right_singular_vectors() -> None:
    matrix_UN = tastes(80, 60)
    _, _, exact_KN = np.linalg.svd(matrix_UN.toarray(), full_matrices=False)
    found_NK = svd_components(matrix_UN, 4, seed=0)
    assert np.abs((found_NK * exact_KN[:4].T).sum(0)).min() > 0.99  # unit vectors, whatever the sign


def test_bpr_factors_group_the_items_that_the_same_people_touch() -> None:
    factors_NK = bpr_components(tastes(200, 80), 4, seed=0)
    assert factors_NK.shape == (80, 4) and np.isfinite(factors_NK).all()
    unit_NK = factors_NK[:40] / np.linalg.norm(factors_NK[:40], axis=1, keepdims=True)
    alike_NN, group_N = unit_NK @ unit_NK.T, np.arange(40) % 4
    same_NN = (group_N[:, None] == group_N) & ~np.eye(40, dtype=bool)
    assert alike_NN[same_NN].mean() > 0.7 and alike_NN[group_N[:, None] != group_N].mean() < 0.2
    assert np.array_equal(factors_NK, bpr_components(tastes(200, 80), 4, seed=0))


def slow_bpr(matrix_UN: csr_matrix, components: int, *, seed: int, epochs: int, steps: int) -> np.ndarray:
    """Pair by pair in float64, on the same draws: Adagrad steps down the mean of -log σ(⟨p_u, q_i - q_j⟩ + c_i - c_j) and .001 of all squares."""
    draws, (users, items) = torch.Generator().manual_seed(seed), matrix_UN.shape
    events = [(u, i) for u in range(users) for i in range(items) for _ in range(int(matrix_UN[u, i]))]
    p, q = (((torch.rand(rows, components, generator=draws) - 0.5) / components).double() for rows in (users, items))
    values = [p, q, torch.zeros(items).double()]
    c, sums = values[2], [torch.zeros_like(x) for x in values]
    for _ in range(epochs):
        for batch in torch.randperm(len(events), generator=draws).split(max(1, len(events) // steps)):
            slopes = [torch.zeros_like(x) for x in values]
            drawn = torch.randint(len(events), (len(batch),), generator=draws).tolist()
            for event, other in zip(batch.tolist(), drawn, strict=True):
                (u, i), j = events[event], events[other][1]
                pull = -torch.sigmoid(c[j] - c[i] - p[u] @ (q[i] - q[j]))
                for x, row, slope in ((0, u, pull * (q[i] - q[j])), (1, i, pull * p[u]), (1, j, -pull * p[u]), (2, i, pull), (2, j, -pull)):
                    slopes[x][row] += (slope + 2 * 0.001 * values[x][row]) / len(batch)
            for x, total, slope in zip(values, sums, slopes, strict=True):
                total += slope.square()
                x -= 0.05 * slope / (total.sqrt() + 1e-10)
    return q.numpy()


def test_bpr_is_its_equation_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeats are samples of their own, negatives are drawn as often as the log has them, and the bias of an item is learnt but not handed out."""
    assert (coding.BPR_EPOCHS, coding.BPR_RATE) == (20, 0.05)
    monkeypatch.setattr(coding, "BPR_EPOCHS", 3)
    monkeypatch.setattr(coding, "BPR_STEPS", 4)
    matrix_UN = tastes(12, 9)
    assert matrix_UN.max() > 1
    found, wanted = bpr_components(matrix_UN, 2, seed=5), slow_bpr(matrix_UN, 2, seed=5, epochs=3, steps=4)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert np.abs(wanted).max() > 0.3


def test_what_the_log_does_not_say_is_left_to_chance() -> None:
    nothing = csr_matrix((5, 30))
    assert svd_components(nothing, 4, seed=0).shape == bpr_components(nothing, 4, seed=0).shape == (30, 0)
    assert svd_components(tastes(3, 30), 8, seed=0).shape == (30, 3)


@pytest.mark.parametrize("how", [svd_components, bpr_components])
@pytest.mark.parametrize(("users", "items"), [(5, 1), (1, 1), (1, 5), (2, 2)])
def test_codes_of_the_smallest_logs(how: Any, users: int, items: int) -> None:
    """One item, one user: what they have in common with themselves is no more than one component."""
    values_NK = how(csr_matrix(np.ones((users, items))), 2, seed=0)
    assert len(values_NK) == items and np.isfinite(values_NK).all()
    if how is svd_components:
        assert values_NK.shape[1] == min(users, items, 2)
        np.testing.assert_allclose(np.abs(values_NK[:, 0]), items**-0.5)
    assert assign(values_NK, 4, 16, seed=0).codes_NM.shape == (items + 1, 4)


# ---------------------------------------------------------------- from features


@pytest.mark.parametrize("how", ["svd", "bpr", "random"])
def test_codes_of_a_log(features: FeatureSet, how: How) -> None:
    settings = RecJPQItemsSettings(splits=4, codes=16, assignment=how)
    found = assign_codes(features, settings, seed=3)
    assert found.codes_NM.shape == (features.sizes.items + 1, 4) and found.codes_NM.dtype == np.uint8
    assert not found.codes_NM[0].any() and found.codes_NM.max() == 15
    again = assign_codes(features, settings, seed=3)
    assert np.array_equal(found.codes_NM, again.codes_NM) and np.array_equal(found.levels_Mb, again.levels_Mb)
    if how != "svd":  # whose components are the log's, whatever the seed
        assert not np.array_equal(found.codes_NM, assign_codes(features, settings, seed=4).codes_NM)
    if how == "random":
        assert not found.levels_Mb.any()
    else:
        counts_Mb = np.stack([np.bincount(found.codes_NM[1:, k], minlength=16) for k in range(4)])
        assert np.ptp(counts_Mb, axis=1).max() <= 1


@pytest.mark.parametrize("how", ["svd", "bpr"])
def test_what_comes_after_the_training_period_changes_no_code(features: FeatureSet, how: How) -> None:
    """A store whose later events are other items altogether gives the same codes; another training period gives others."""
    settings = RecJPQItemsSettings(splits=2, codes=16, assignment=how)

    class Later:
        def flat(self, users_B: np.ndarray, lengths_B: np.ndarray) -> Any:
            held = features.history.flat(users_B, features.history.lengths(users_B))
            place_E = np.arange(len(held.items)) - np.repeat(held.offsets_B1[:-1], np.diff(held.offsets_B1))
            after_E = place_E >= np.repeat(features.train_lengths[users_B], np.diff(held.offsets_B1))
            assert after_E.any()
            changed = np.where(after_E, held.items % features.sizes.items + 1, held.items)
            keep_E = place_E < np.repeat(lengths_B, np.diff(held.offsets_B1))
            return replace(held, items=changed[keep_E], offsets_B1=np.concatenate([[0], np.cumsum(lengths_B)]))

    other = replace(features, history=Later())  # type: ignore[arg-type]
    codes_NM = assign_codes(features, settings, seed=0).codes_NM
    assert np.array_equal(codes_NM, assign_codes(other, settings, seed=0).codes_NM)
    shorter = replace(features, train_lengths=features.train_lengths // 2)
    assert not np.array_equal(codes_NM, assign_codes(shorter, settings, seed=0).codes_NM)


def test_repeated_interactions_count_each_time_or_once(features: FeatureSet) -> None:
    counts, ones = (interaction_matrix(features, binary=binary) for binary in (False, True))
    assert counts.sum() == features.train_lengths.sum() and counts.max() > 1 and ones.max() == 1
    assert np.array_equal(counts.indices, ones.indices) and counts[:, 0].nnz == 0
    each, once = (assign_codes(features, RecJPQItemsSettings(splits=2, binary=binary), seed=0).codes_NM for binary in (False, True))
    assert not np.array_equal(each, once)


# ---------------------------------------------------------------- later items


def test_later_items_are_the_projection_on_the_frozen_components() -> None:
    """With a code for every old item the levels are the singular vectors themselves: value = uᵀ c / σ, u from the old columns."""
    matrix_UN = tastes(300, 240)
    old = assign(svd_components(matrix_UN[:, :200], 3, seed=0), 3, 256, seed=0)
    padded_UN = csr_matrix(np.concatenate([np.zeros((300, 1)), matrix_UN.toarray()], axis=1))
    found_NM = extend_codes(old.codes_NM, old.levels_Mb, padded_UN, seed=0)
    assert found_NM.shape == (241, 3) and np.array_equal(found_NM[:201], old.codes_NM)
    dense_UN = matrix_UN.toarray()
    left_UK, values_K, right_KN = np.linalg.svd(dense_UN[:, :200], full_matrices=False)
    for k in range(3):
        sign = np.sign(right_KN[k] @ old.levels_Mb[k, old.codes_NM[1:, k]])
        projected = sign * left_UK[:, k] @ dense_UN[:, 200:] / values_K[k]
        cuts = (old.levels_Mb[k, 1:] + old.levels_Mb[k, :-1]) / 2
        assert np.abs(found_NM[201:, k].astype(int) - np.searchsorted(cuts, projected)).max() <= 6


@pytest.mark.parametrize("how", [svd_components, bpr_components])
def test_later_items_land_beside_the_items_of_their_group(how: Any) -> None:
    """The codes they would have had, had they been there at first, are nearer than codes by chance would be."""
    matrix_UN = tastes(400, 300)
    order = np.random.default_rng(0).permutation(300)  # the new ones are popular and rare alike
    matrix_UN = matrix_UN[:, order]
    components_NK = how(matrix_UN, 4, seed=0)
    whole, old = assign(components_NK, 4, 64, seed=0), assign(components_NK[:240], 4, 64, seed=0)
    padded_UN = csr_matrix(np.concatenate([np.zeros((400, 1)), matrix_UN.toarray()], axis=1))
    found_NM = extend_codes(old.codes_NM, old.levels_Mb, padded_UN, seed=0)
    away = np.abs(found_NM[241:].astype(int) - whole.codes_NM[241:].astype(int)).mean()
    assert away < 0.4 * 64 / 3  # two uniform codes are a third of 64 apart on average


@pytest.mark.parametrize("items", [3, 60])
def test_of_fewer_items_than_codes_later_ones_take_only_codes_that_somebody_has(items: int) -> None:
    """The pieces of the other codes have learnt nothing. Touched or not."""
    matrix_UN = csr_matrix(np.concatenate([np.zeros((300, 1)), tastes(300, items + 40).toarray(), np.zeros((300, 5))], axis=1))
    old = assign(svd_components(matrix_UN[:, 1 : items + 1], 2, seed=0), 2, 256, seed=0)
    found_NM = extend_codes(old.codes_NM, old.levels_Mb, matrix_UN, seed=0)
    for k in range(2):
        assert np.isin(found_NM[items + 1 :, k], old.codes_NM[1:, k]).all()


def test_later_items_that_nobody_touched_are_coded_by_chance() -> None:
    matrix_UN = csr_matrix(np.concatenate([np.zeros((50, 1)), tastes(50, 40).toarray(), np.zeros((50, 400))], axis=1))
    old = assign(svd_components(matrix_UN[:, 1:41], 2, seed=0), 2, 16, seed=0)
    found_NM = extend_codes(old.codes_NM, old.levels_Mb, matrix_UN, seed=5)
    assert np.bincount(found_NM[41:, 0], minlength=16).min() > 5
    assert np.array_equal(found_NM, extend_codes(old.codes_NM, old.levels_Mb, matrix_UN, seed=5))
    chance = assign(np.zeros((40, 0)), 2, 16, seed=0)
    assert extend_codes(chance.codes_NM, chance.levels_Mb, matrix_UN, seed=5).max() == 15
    assert np.array_equal(extend_codes(old.codes_NM, old.levels_Mb, matrix_UN[:, :41], seed=5), old.codes_NM)  # nothing new


# ---------------------------------------------------------------- in training


@pytest.mark.parametrize("settings", [SASRecSettings(width=8, blocks=1, heads=1), DINSettings(width=8)], ids=["sasrec", "din"])
def test_a_model_starts_with_its_codes_and_a_ranker_with_its_vectors(features: FeatureSet, settings: Any) -> None:
    settings = settings.model_copy(update={"items": RecJPQItemsSettings(splits=4, codes=16)})
    torch.manual_seed(0)
    module = build_model(settings, features.sizes)
    starts.start(module, features, settings, seed=0)
    (slot,) = item_slots(module)
    until = unlabelled_until(features) if settings.stage == "ranking" else None
    expected = assign_codes(features, settings.items, seed=0, until=until)
    assert np.array_equal(slot.codes.numpy(), expected.codes_NM) and np.array_equal(slot.levels.numpy(), expected.levels_Mb)
    vectors = slot.vectors()[1:].detach()
    assert vectors.std().item() == pytest.approx(0.3 if settings.stage == "ranking" else 0.02, rel=0.25)  # of 128 numbers
    if settings.stage == "ranking":  # items that the same people touched start alike, as their dense start vectors are
        wanted = starts.cooccurrence_vectors(features, 8, seed=0, until=until)[1:]
        assert np.corrcoef((vectors @ vectors.T).numpy().ravel(), (wanted @ wanted.T).ravel())[0, 1] > 0.6


def test_codes_outlive_training_and_a_resumed_run_does_not_ask_for_them(
    features: FeatureSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SASRecSettings(width=8, blocks=1, heads=1, max_history=10, batch_size=64, max_epochs=2, items=RecJPQItemsSettings(splits=4, codes=16))
    whole = fitting.train(features, settings, "whole", ONE_THREAD, data="d")
    expected = assign_codes(features, settings.items, seed=ONE_THREAD.seed)  # type: ignore[arg-type]
    (slot,) = item_slots(whole.module)
    assert np.array_equal(slot.codes.numpy(), expected.codes_NM)

    rows = 0

    def killed_after_the_first(row: dict[str, float]) -> None:
        nonlocal rows
        rows += 1
        if rows == 1:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fitting.train(features, settings, "killed", ONE_THREAD, data="d", checkpoints=tmp_path, report=killed_after_the_first)
    monkeypatch.setattr(coding, "interaction_matrix", None)  # would fail if it were asked for
    resumed = fitting.train(features, settings, "killed", ONE_THREAD, data="d", checkpoints=tmp_path)
    assert resumed.resumed_from == 1
    assert all(torch.equal(a, b) for a, b in zip(whole.module.state_dict().values(), resumed.module.state_dict().values(), strict=True))
