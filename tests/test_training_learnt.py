"""What tiny networks learn from planted tastes, and what is counted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longtrail.config import BERT4RecSettings, PopularityRankerSettings, PopularityRetrieverSettings
from longtrail.examples import FeatureSet
from longtrail.training import train
from tests.test_training import CPU, DIN, NETWORKS, RETRIEVER, SASREC


@pytest.fixture(scope="module")
def features(toy_features_folder: Path) -> FeatureSet:
    return FeatureSet.open(toy_features_folder)


@pytest.mark.parametrize("name", ["din", "sam"])
def test_rankers_find_the_planted_tastes_that_popularity_cannot_see(name: str, features: FeatureSet) -> None:
    """Two categories of six are clicked six times as often as the others, and which two differs by user."""
    start = {"attention_init": "similarity"} if name == "sam" else {}  # over four seeds a GAUC of .70 to .79, popularity's is .57
    settings = NETWORKS[name].model_copy(update={"max_epochs": 30, "patience": 30, "max_history": 40, "learning_rate": 1e-2} | start)
    popularity = train(features, PopularityRankerSettings(by="click_rate"), "popularity", CPU, data="d", ranking_metric="gauc")
    trained = train(features, settings, name, CPU, data="d", ranking_metric="gauc")
    assert popularity.value is not None and trained.value is not None
    assert trained.value > popularity.value + 0.1


@pytest.mark.parametrize("settings", [SASREC, BERT4RecSettings(**RETRIEVER)], ids=lambda s: s.kind)
def test_retrievers_find_the_planted_tastes_that_popularity_cannot_see(settings: Any, features: FeatureSet) -> None:
    popularity = train(features, PopularityRetrieverSettings(), "popular_items", CPU, data="d")
    quick = settings.model_copy(
        update={"max_epochs": 60, "patience": 20, "learning_rate": 1e-2}
    )  # a toy's tastes: over five seeds 1.1 to 1.4 times as good
    trained = train(features, quick, settings.kind, CPU, data="d")
    assert popularity.value is not None and trained.value is not None
    assert trained.value > 1.2 * popularity.value


def test_popularity_is_fitted_from_the_training_period_alone(features: FeatureSet) -> None:
    clicks, catalogue = features.catalogue.train_clicks, features.catalogue
    ranker = train(features, PopularityRankerSettings(by="clicks"), "p", CPU, data="d").module.state_dict()["logits"].numpy()
    assert (np.argsort(ranker[1:], kind="stable") == np.argsort(clicks[1:], kind="stable")).all()
    retriever = train(features, PopularityRetrieverSettings(), "p", CPU, data="d").module.state_dict()["scores"].numpy()[:, 0]
    np.testing.assert_allclose(retriever[1:], np.log1p(catalogue.train_events[1:]), rtol=1e-6)


def test_bf16_trains_to_about_the_same_loss(features: FeatureSet) -> None:
    full, half = (train(features, DIN, "din", CPU.model_copy(update={"precision": precision}), data="d") for precision in ("fp32", "bf16"))
    assert half.curve != full.curve
    for one, other in zip(full.curve, half.curve, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=0.02)
