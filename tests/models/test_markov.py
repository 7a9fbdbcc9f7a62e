"""The Markov chain: counts of what really followed, smoothed towards popularity, searched exactly, as small on disk as its pairs."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import nn

from longtrail.config import EvaluationSettings, MarkovSettings, TrainingSettings
from longtrail.evaluation import evaluate
from longtrail.examples import FeatureSet
from longtrail.models.contracts import History, ScoreRows, Sizes
from longtrail.models.encoders.markov import Markov
from longtrail.models.store import LoadedModel, ModelCard, load_model, save_model
from longtrail.retrieval.exact import exact_index
from longtrail.retrieval.sparse import SparseIndex
from longtrail.training import train
from longtrail.training.interactions import transition_counts
from tests.contracts.batches import make_history

FOUR = Sizes(items=4, categories=1, actions=1)
COUNTS = np.array([[0, 0, 0, 0, 0], [0, 0, 3, 1, 0], [0, 2, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]])
EVENTS = np.array([0, 2, 5, 2, 1])
CPU = TrainingSettings(accelerator="cpu", threads=1)


@pytest.fixture(scope="module")
def features(toy_features_folder: Path) -> FeatureSet:
    return FeatureSet.open(toy_features_folder)


def small(smoothing: float = 2.0) -> Markov:
    model = Markov(MarkovSettings(smoothing=smoothing), FOUR)
    model.count(transitions_NN=csr_matrix(COUNTS), events=EVENTS)
    return model


def test_scores_are_smoothed_transition_shares() -> None:
    model = small()
    index = exact_index(model)
    assert isinstance(index, SparseIndex)
    ids_BK, scores_BK = index.topk(torch.tensor([[0], [1], [3]]), 4)
    p = EVENTS / 10
    expected = [p, (COUNTS[1] + 2 * p) / (4 + 2), p]  # nobody; after item 1; after item 3, which nothing followed
    for ids, scores, wanted in zip(ids_BK.tolist(), scores_BK.tolist(), expected, strict=True):
        order = sorted(range(1, 5), key=lambda i: (-round(wanted[i], 9), i))
        assert ids == order and scores == pytest.approx([wanted[i] for i in order], rel=1e-6)
        assert sum(scores) == pytest.approx(1)


def test_the_user_is_the_last_item() -> None:
    history = replace(make_history(0, (0, 2, 3), sizes=FOUR), items_BL=torch.tensor([[4, 4, 4], [1, 3, 4], [1, 2, 9]]))
    assert small().user_vectors(history).tolist() == [[0], [3], [0]]


def test_counts_are_what_follows_what_within_a_training_period(features: FeatureSet) -> None:
    slow = np.zeros((features.sizes.items + 1, features.sizes.items + 1))
    for user in range(1, features.users + 1):
        length = int(features.train_lengths[user])
        items = features.history.gather(np.array([user]), np.array([length]), max(1, length)).items_BL[0, :length]
        for first, second in pairwise(items):
            slow[first, second] += 1
    assert slow.sum() > 100 and np.array_equal(transition_counts(features).toarray(), slow)
    lengths = features.train_lengths.copy()
    lengths[[1, 2, features.users]] = [0, 1, 0]  # users without a pair, the last among them
    shorter = transition_counts(replace(features, train_lengths=lengths))
    assert shorter.sum() == np.maximum(lengths - 1, 0).sum()
    assert transition_counts(replace(features, train_lengths=np.zeros_like(lengths))).nnz == 0


def test_it_is_fitted_saved_and_judged_like_any_model(features: FeatureSet, tmp_path: Path) -> None:
    settings = MarkovSettings()
    trained = train(features, settings, "markov", CPU, data="d")
    assert trained.best_epoch == 0 and trained.metric == "ndcg@10" and trained.value is not None and "epoch" not in trained.summary()
    card = ModelCard(name="markov", settings=settings, sizes=features.sizes, actions=features.actions, prior_click_rate=features.prior_click_rate)
    save_model(tmp_path / "markov", trained.module, card, {})
    loaded = load_model(tmp_path / "markov")
    held, found = trained.module.state_dict(), loaded.module.state_dict()
    assert held.keys() == found.keys() and all(torch.equal(held[name], found[name]) for name in held)
    pairs = transition_counts(features).nnz
    assert (tmp_path / "markov" / "model.safetensors").stat().st_size == pytest.approx(8 * pairs + 16 * features.sizes.items, abs=1500)


class Dense(nn.Module):
    """The same chain with all scores written out: a user is a one-hot row, an item a column."""

    def __init__(self, rows: ScoreRows) -> None:
        super().__init__()
        self.rows_RN = (rows.weights_R[:, None] * rows.base_N1).double()
        places = torch.arange(len(rows.weights_R)).repeat_interleave(rows.offsets_R1.diff())
        self.rows_RN[places, rows.items_n.long()] += rows.scores_n

    def user_vectors(self, history: History) -> torch.Tensor:
        last_B = history.items_BL[torch.arange(len(history.lengths_B)), (history.lengths_B - 1).clamp(min=0)]
        return nn.functional.one_hot(last_B * (history.lengths_B > 0), len(self.rows_RN)).float()

    def item_vectors(self) -> torch.Tensor:
        return self.rows_RN.T.float()


def test_an_evaluation_is_that_of_all_scores_written_out(features: FeatureSet) -> None:
    settings = MarkovSettings(smoothing=1.5)
    module = train(features, settings, "markov", CPU, data="d").module
    card = ModelCard(name="markov", settings=settings, sizes=features.sizes, actions=features.actions, prior_click_rate=features.prior_click_rate)
    cut = EvaluationSettings(k=(10,), replicates=50)
    judged, dense = (evaluate(LoadedModel(module=m, card=card), features, "test", cut) for m in (module, Dense(module.score_rows())))  # type: ignore[operator]
    assert judged.counts == dense.counts
    assert judged.metrics["ndcg@10"].value == pytest.approx(dense.metrics["ndcg@10"].value, rel=1e-6)
    assert judged.metrics["mrr"].value == pytest.approx(dense.metrics["mrr"].value, rel=1e-6)
