"""Item vectors start from the training period's interactions alone, and items that the same people touched start alike."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from torch import nn

from longtrail.config import DINSettings, MeanPoolingSettings, RecJPQItemsSettings, SAMSettings, SASRecSettings, SplitSettings
from longtrail.errors import ModelError
from longtrail.examples import FeatureSet, RankingBatches
from longtrail.examples.features import column
from longtrail.models.rankers.mean_pooling import MeanPooling
from longtrail.models.registry import build_model
from longtrail.training import interactions
from longtrail.training.codes import assign_codes
from longtrail.training.interactions import before_held_out, interaction_matrix, unlabelled_until
from longtrail.training.starts import cooccurrence_vectors, met_items, start
from tests.toy import toy_features, toy_tables


@pytest.fixture(scope="module")
def features(toy_features_folder: Path) -> FeatureSet:
    return FeatureSet.open(toy_features_folder)


def slow_matrix(features: FeatureSet) -> np.ndarray:
    matrix = np.zeros((features.users, features.sizes.items + 1))
    for user in range(1, features.users + 1):
        length = features.train_lengths[user]
        history = features.history.gather(np.array([user]), np.array([length]), max(1, int(length)))
        matrix[user - 1, history.items_BL[0, :length]] = 1
    return matrix


def test_inner_products_are_those_of_the_exact_decomposition(features: FeatureSet) -> None:
    matrix = slow_matrix(features)
    _, values, right = np.linalg.svd(matrix, full_matrices=False)
    exact = right[:4].T * values[:4]
    found = cooccurrence_vectors(features, 4, seed=0)
    assert found.shape == (features.sizes.items + 1, 4)
    # The randomised solver turns the axes a little where singular values lie close together; what models see are the products.
    assert np.corrcoef((found @ found.T).ravel(), (exact @ exact.T).ravel())[0, 1] > 0.99


def test_events_after_the_training_period_are_not_seen(features: FeatureSet) -> None:
    early = replace(features, train_lengths=features.train_lengths // 20)  # a training period that ends long before most items are met
    seen = np.flatnonzero(slow_matrix(early).any(0))
    later = np.setdiff1d(np.arange(1, features.sizes.items + 1), seen)
    assert len(seen) > 3 and len(later) > 3
    vectors = cooccurrence_vectors(early, 3, seed=0)
    assert np.allclose(vectors[later], 0, atol=1e-6)
    assert np.abs(vectors[seen]).max() > 0.1


# ---------------------------------------------------------------- clicks that are events, and labels


@pytest.fixture(scope="module")
def dealt(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    """A log whose events are clicks, and whose clicks chance deals out among a request's items: nothing there is to be learnt."""
    tables = toy_tables(tmp_path_factory.mktemp("dealt") / "tables", users=300, items=400, shuffled=True)
    return FeatureSet.open(toy_features(tables, tables.parent / "features"))


def by_vectors_alone(features: FeatureSet, vectors_NW: np.ndarray, *, since: int | None = None, split: str = "train") -> tuple[float, int]:
    """AUC within the requests of `split`, from `since` on, of ⟨sum over the history, candidate⟩; of how many pairs of a clicked and another item."""
    right, pairs = 0.0, 0
    for batch in RankingBatches(features, split, max_history=50, batch_size=64, since=since):
        read_BW = vectors_NW[batch.history.items_BL.numpy()].sum(1)
        scores_BC = np.einsum("bw,bcw->bc", read_BW, vectors_NW[batch.candidates.items_BC.numpy()])
        clicked_BC, exposed_BC = batch.clicks_BC.numpy() == 1, batch.exposed.numpy()
        pair_BCC = clicked_BC[:, :, None] & (exposed_BC & ~clicked_BC)[:, None, :]
        ahead_BCC = scores_BC[:, :, None] - scores_BC[:, None, :]
        right += ((ahead_BCC > 0) + 0.5 * (ahead_BCC == 0))[pair_BCC].sum()
        pairs += int(pair_BCC.sum())
    return right / pairs, pairs


def test_vectors_do_not_tell_the_clicks_that_are_learnt_from(dealt: FeatureSet) -> None:
    """Where chance dealt them out, vectors of all events order requests far better than one half; those a ranker starts with do not."""
    until = unlabelled_until(dealt)
    assert until is not None
    telling, _ = by_vectors_alone(dealt, cooccurrence_vectors(dealt, 8, seed=0), since=until)
    clean, pairs = by_vectors_alone(dealt, cooccurrence_vectors(dealt, 8, seed=0, until=until), since=until)
    error = 0.5 / np.sqrt(pairs / 3)  # each click is in up to three pairs
    assert telling > 0.5 + 5 * error
    assert abs(clean - 0.5) < 4 * error


def test_it_is_the_older_half_of_the_events_or_all_before_the_first_request(dealt: FeatureSet) -> None:
    times = dealt.history.flat(np.arange(1, dealt.users + 1), dealt.train_lengths[1:]).times
    until = unlabelled_until(dealt)
    assert until is not None and (times < until).mean() == pytest.approx(0.5, abs=0.01)
    learnt = column(dealt.examples("train"), "timestamp")
    late = int(np.quantile(learnt, 0.9))
    newest = unlabelled_until(dealt, since=late)  # of the newest alone: what is new there is new since then
    assert newest == int(np.median(times[times >= late])) and newest > late
    assert unlabelled_until(dealt, since=int(learnt.max()) + 1) is None  # nothing to learn from
    counts = np.zeros((dealt.users, dealt.sizes.items + 1))
    for user in range(1, dealt.users + 1):
        history = dealt.history.flat(np.array([user]), dealt.train_lengths[[user]])
        np.add.at(counts[user - 1], history.items[history.times < until], 1)  # some were written late: they are no prefix of the history
    for binary, expected in ((False, counts), (True, counts > 0)):
        assert np.array_equal(interaction_matrix(dealt, binary=binary, until=until).toarray(), expected)


def test_all_that_came_before_the_first_request_is_good(dealt: FeatureSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log of events that is older than that of impressions: more than its half."""
    table = dealt.examples("train")
    late = int(np.quantile(column(table, "timestamp"), 0.8))
    shown = table.filter(pa.array(column(table, "timestamp") >= late))
    monkeypatch.setattr(FeatureSet, "examples", lambda features, split: shown)
    assert unlabelled_until(dealt) == column(shown, "timestamp").min()


def with_times(features: FeatureSet, change: Callable[[np.ndarray], np.ndarray]) -> FeatureSet:
    """The features with other times of events."""
    store = features.history

    class Changed:
        def flat(self, *asked: Any) -> Any:
            flat = store.flat(*asked)
            return replace(flat, times=change(flat.times))

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

    return replace(features, history=Changed())  # type: ignore[arg-type]


@pytest.mark.parametrize("days", [3, 7, 11, 25])
def test_events_of_one_instant_stay_together(days: int, dealt: FeatureSet) -> None:
    """Times that are dates: the boundary that is nearest to the half."""
    span = days * 86_400_000_000
    coarse = with_times(dealt, lambda times: times // span * span)
    times = coarse.history.flat(np.arange(1, dealt.users + 1), dealt.train_lengths[1:]).times
    until = unlabelled_until(coarse)
    assert until is not None
    shares = [0.0, *(np.cumsum(np.unique(times, return_counts=True)[1]) / len(times))]
    assert (times < until).mean() == pytest.approx(min(shares, key=lambda share: abs(share - 0.5)))


def test_where_no_event_is_left_that_is_said(dealt: FeatureSet, caplog: pytest.LogCaptureFixture) -> None:
    first = int(column(dealt.examples("train"), "timestamp").min())
    assert unlabelled_until(with_times(dealt, lambda times: np.full_like(times, first))) == first
    assert "start vectors and codes are drawn by chance" in caplog.text


def test_a_log_of_a_million_rows_is_looked_at_by_chance(dealt: FeatureSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of four whose first item is the one clicked: every fourth row is of one class, and would tell nothing."""
    table = dealt.examples("train")
    requests = np.unique(table["request_id"].to_pylist(), return_inverse=True)[1]
    clicks = column(table, "click")
    order = np.lexsort((-clicks, requests))
    table = table.take(pa.array(order[(np.bincount(requests, clicks) == 1)[requests[order]]]))
    assert column(table, "click").reshape(-1, 4).sum(0).tolist() == [table.num_rows // 4, 0, 0, 0]
    monkeypatch.setattr(FeatureSet, "examples", lambda features, split: table)
    expected = unlabelled_until(dealt)
    monkeypatch.setattr(interactions, "_ROWS", table.num_rows // 4)
    assert expected is not None and unlabelled_until(dealt) == expected


def test_events_that_say_nothing_of_clicks_are_all_good(dealt: FeatureSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ratings: what was shown is an event, whatever became of it."""
    table = dealt.examples("train")
    clicked = table.filter(pc.equal(table["click"], 1))
    halves = pa.array((np.arange(clicked.num_rows) % 2).astype(np.int8))
    shown = clicked.set_column(clicked.schema.get_field_index("click"), "click", halves)
    monkeypatch.setattr(FeatureSet, "examples", lambda features, split: shown)
    assert unlabelled_until(dealt) is None
    monkeypatch.setattr(FeatureSet, "examples", lambda features, split: clicked)  # one kind of label alone: nothing to tell
    assert unlabelled_until(dealt) is None


@pytest.fixture(scope="module")
def left_out(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    """Such a log under leave-one-out."""
    tables = toy_tables(tmp_path_factory.mktemp("left") / "tables", users=300, items=1500, events_per_user=24, seed=1, shuffled=True)
    return FeatureSet.open(toy_features(tables, tables.parent / "features", SplitSettings(kind="leave_one_out")))


def directions(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors)


@pytest.mark.parametrize("since_share", [None, 0.7])
def test_a_ranker_s_vectors_and_codes_are_those(dealt: FeatureSet, since_share: float | None) -> None:
    since = None if since_share is None else int(np.quantile(column(dealt.examples("train"), "timestamp"), since_share))
    until = unlabelled_until(dealt, since=since)
    items = RecJPQItemsSettings(splits=2, codes=16)
    dense, coded = DINSettings(width=4), DINSettings(width=4, items=items)
    module: Any = build_model(dense, dealt.sizes)
    start(module, dealt, dense, seed=0, since=since)
    wanted = cooccurrence_vectors(dealt, 4, seed=0, until=until)
    assert np.allclose(directions(module.embedding.items.table.detach().numpy()), directions(wanted), atol=1e-6)
    module = build_model(coded, dealt.sizes)
    start(module, dealt, coded, seed=0, since=since)
    codes = assign_codes(dealt, items, seed=0, until=until).codes_NM
    assert np.array_equal(module.embedding.items.codes.numpy(), codes)
    assert not np.array_equal(codes, assign_codes(dealt, items, seed=0).codes_NM)


def test_a_ranker_starts_before_what_is_held_out_and_next_items_do_not(left_out: FeatureSet) -> None:
    cut = before_held_out(left_out)
    settings = DINSettings(width=4)
    module: Any = build_model(settings, left_out.sizes)
    start(module, left_out, settings, seed=0)
    wanted = cooccurrence_vectors(cut, 4, seed=0, until=unlabelled_until(cut))
    assert np.allclose(directions(module.embedding.items.table.detach().numpy()), directions(wanted), atol=1e-6)
    items = RecJPQItemsSettings(splits=2, codes=16)
    encoder = SASRecSettings(width=4, blocks=1, heads=1, items=items)
    module = build_model(encoder, left_out.sizes)
    start(module, left_out, encoder, seed=0)
    assert np.array_equal(module.items.codes.numpy(), assign_codes(left_out, items, seed=0).codes_NM)


def test_nothing_is_read_for_a_random_start(dealt: FeatureSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeatureSet, "examples", None)
    settings = DINSettings(width=4, item_start="random")
    start(build_model(settings, dealt.sizes), dealt, settings, seed=0)


@pytest.mark.parametrize("kind", ["temporal", "leave_one_out"])
def test_events_of_requests_held_out_are_not_seen(kind: str, request: pytest.FixtureRequest) -> None:
    """Leaving out a user's last two events leaves the clicks of held-out requests among the others; where chance deals them out, they would show."""
    features = request.getfixturevalue({"temporal": "dealt", "leave_one_out": "left_out"}[kind])
    cut = before_held_out(features)
    if kind == "temporal":
        assert np.array_equal(cut.train_lengths, features.train_lengths)
        return
    first = {}
    for split in ("valid", "test"):
        held = features.examples(split)
        for user, length in zip(column(held, "user_id"), column(held, "history_length"), strict=True):
            first[user] = min(length, first.get(user, length))
    assert all(cut.train_lengths[user] == min(length, features.train_lengths[user]) for user, length in first.items()) and len(first) == 300
    told, _ = by_vectors_alone(features, cooccurrence_vectors(features, 16, seed=0), split="valid")
    clean, pairs = by_vectors_alone(features, cooccurrence_vectors(cut, 16, seed=0), split="valid")
    error = 0.5 / np.sqrt(pairs / 3)
    assert told > 0.5 + 5 * error
    assert abs(clean - 0.5) < 4 * error


def test_it_is_reproducible_and_wider_than_the_log_has_rank(features: FeatureSet) -> None:
    wide = cooccurrence_vectors(features, features.users + 10, seed=1)
    assert np.array_equal(wide, cooccurrence_vectors(features, features.users + 10, seed=1))
    assert np.isfinite(wide).all() and wide[1:].std(0).min() > 0 and not wide[0].any()


def test_a_model_starts_from_them_at_a_fixed_scale(features: FeatureSet) -> None:
    module = build_model(DINSettings(width=4), features.sizes)
    vectors = torch.from_numpy(cooccurrence_vectors(features, 4, seed=0))
    module.embedding.start_items(1000 * vectors)
    table = module.embedding.items.table.detach()
    assert table[1:].std().item() == pytest.approx(0.3, rel=1e-3) and not table[0].any()
    assert torch.allclose(table / table.norm(), vectors / vectors.norm(), atol=1e-6)


def test_items_are_drawn_as_often_as_they_are_met(features: FeatureSet) -> None:
    events = features.catalogue.train_events
    drawn = np.bincount(met_items(features, seed=0), minlength=len(events))
    assert drawn.sum() == 10_000 and drawn[0] == 0 and not drawn[events == 0].any()
    assert np.corrcoef(drawn[1:], events[1:])[0, 1] > 0.95
    silent = replace(features, catalogue=replace(features.catalogue, train_events=np.zeros_like(events)))
    assert np.bincount(met_items(silent, seed=0), minlength=len(events))[1:].min() > 0


def test_sam_starts_by_similarity_of_the_vectors_it_was_given(features: FeatureSet) -> None:
    """Items that the same people touched weigh more from the first step on; a paper's start cannot tell them from others."""
    shares = {}
    for init in ("similarity", "zero"):
        settings = SAMSettings(width=4, attention_init=init, max_history=8)
        torch.manual_seed(0)
        module: Any = build_model(settings, features.sizes)
        start(module, features, settings, seed=0)
        items = torch.from_numpy(np.flatnonzero(features.catalogue.train_events)[:200])
        categories = torch.from_numpy(features.catalogue.categories)[items]
        with torch.no_grad():
            x = module.embedding.things(items, categories, items > 0).unsqueeze(0)
            a = module.passes[0](x, torch.ones(1, len(items), dtype=torch.bool), x, x)[0][0]
        shares[init] = np.corrcoef((x[0] @ x[0].T).ravel().numpy(), a.ravel().numpy())[0, 1]
    assert shares["similarity"] > 0.6 and abs(shares["zero"]) < shares["similarity"] - 0.2


def test_a_ranker_of_any_kind_that_asks_for_a_start_is_given_one(features: FeatureSet) -> None:
    """After its item vectors have theirs, and with the categories of the items it is told of."""

    class Curious(MeanPooling):
        def start_attention(self, items_n: torch.Tensor, categories_n: torch.Tensor) -> None:
            self.told = items_n, categories_n, self.embedding.items.table.detach()[1:].std().item()

    settings = MeanPoolingSettings(width=4)
    module: Any = Curious(settings, features.sizes)
    start(module, features, settings, seed=5)
    items_n, categories_n, spread = module.told
    assert np.array_equal(items_n.numpy(), met_items(features, seed=5))
    assert np.array_equal(categories_n.numpy(), features.catalogue.categories[items_n.numpy()])
    assert spread == pytest.approx(0.3, rel=1e-3)  # that of start_items


def test_a_ranker_with_nothing_to_start_is_named(features: FeatureSet) -> None:
    with pytest.raises(ModelError, match=r"Linear has no embedding\.start_items; expected a BehaviourEmbedding there, or item_start: random"):
        start(nn.Linear(2, 2), features, MeanPoolingSettings(width=4), seed=0)
