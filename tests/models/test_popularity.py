"""Popularity: the order is that of the counts, the probabilities are calibrated, an item without counts stands where it should."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from longtrail.config import PopularityRankerSettings, PopularityRetrieverSettings
from longtrail.models.contracts import Sizes
from longtrail.models.encoders.popularity import PopularityRetriever
from longtrail.models.rankers.popularity import PopularityRanker
from tests.contracts.batches import make_candidates, make_context, make_history

FOUR = Sizes(items=4, categories=1, actions=1)
COUNTS = {
    "events": np.array([0, 9, 30, 0, 3]),
    "impressions": np.array([0, 20, 40, 0, 4]),
    "clicks": np.array([0, 6, 10, 0, 3]),
}


def logits(by: str) -> list[float]:
    model = PopularityRanker(PopularityRankerSettings.model_validate({"by": by}), FOUR)
    model.fit(**COUNTS, prior_click_rate=0.2)
    candidates = replace(make_candidates(0, (4,), sizes=FOUR), items_BC=torch.tensor([[1, 2, 3, 4]]))
    return model(make_history(0, (2,), sizes=FOUR), candidates, make_context(0, 1))[0].tolist()


def test_click_rate_is_the_smoothed_one() -> None:
    expected = [(6 + 2) / 30, (10 + 2) / 50, 0.2, (3 + 2) / 14]
    assert logits("click_rate") == pytest.approx([math.log(p / (1 - p)) for p in expected], rel=1e-6)


def test_clicks_orders_by_clicks() -> None:
    one, two, three, four = logits("clicks")
    assert two > one > four > three


def test_clicks_is_the_logistic_fit_of_another_library() -> None:
    """Items whose click rate grows with their clicks: slope and intercept as scikit-learn finds them."""
    random = np.random.default_rng(0)
    impressions = random.integers(0, 400, 301)
    impressions[0] = 0
    clicks = random.binomial(impressions, np.clip(impressions / 600, 0.02, 0.9))
    model = PopularityRanker(PopularityRankerSettings(by="clicks"), Sizes(items=300, categories=1, actions=1))
    model.fit(events=impressions, impressions=impressions, clicks=clicks, prior_click_rate=0.3)
    x = np.log1p(clicks)
    features = np.concatenate([x, x])[:, None]
    labels = np.repeat([1, 0], 301)
    peer = LogisticRegression(C=np.inf, tol=1e-10).fit(features, labels, sample_weight=np.concatenate([clicks, impressions - clicks]))
    expected = peer.coef_[0, 0] * x + peer.intercept_[0]
    np.testing.assert_allclose(model.logits.numpy(), expected, atol=2e-3)
    expected_clicks = (impressions / (1 + np.exp(-model.logits.double().numpy()))).sum()
    assert expected_clicks == pytest.approx(clicks.sum(), rel=1e-4)


def test_clicks_keeps_its_order_where_popular_items_are_clicked_less() -> None:
    impressions = np.array([0, 10, 1000, 100_000])
    clicks = np.array([0, 9, 500, 1000])
    model = PopularityRanker(PopularityRankerSettings(by="clicks"), Sizes(items=3, categories=1, actions=1))
    model.fit(events=clicks, impressions=impressions, clicks=clicks, prior_click_rate=0.01)
    assert model.logits.diff().gt(0).all()


def test_without_any_count_all_are_alike_and_finite() -> None:
    nothing = np.zeros(5, dtype=np.int64)
    for by in ("clicks", "click_rate"):
        model = PopularityRanker(PopularityRankerSettings.model_validate({"by": by}), FOUR)
        model.fit(events=nothing, impressions=nothing, clicks=nothing, prior_click_rate=0.2)
        torch.testing.assert_close(model.logits, torch.full((5,), math.log(0.25)), rtol=0, atol=1e-3)


def test_the_retriever_orders_by_events() -> None:
    model = PopularityRetriever(PopularityRetrieverSettings(), FOUR)
    model.fit(**COUNTS, prior_click_rate=0.2)
    scores_BN = model.user_vectors(make_history(0, (0, 3), sizes=FOUR)) @ model.item_vectors()[1:].T
    assert (scores_BN.argsort(dim=1, descending=True)[:, :3] + 1).tolist() == [[2, 1, 4]] * 2
    assert scores_BN[0].tolist() == pytest.approx(np.log1p([9, 30, 0, 3]).tolist())
