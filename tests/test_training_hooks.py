"""What a ranker may offer to training beside its logits: how it is, and logits of parts that its own do not train."""

from pathlib import Path

import pytest
import torch

from longtrail.config import SAMSettings, SIMSettings, TrainingSettings
from longtrail.examples import FeatureSet, RankingBatches
from longtrail.losses import ranking_loss
from longtrail.models.registry import build_model
from longtrail.training import train
from longtrail.training.learners import RankerLearner
from longtrail.training.memory import freed_memory_is_kept
from tests.toy import toy_features, toy_tables

CPU = TrainingSettings(accelerator="cpu", threads=1)
SMALL = {"width": 4, "hidden": (8,), "max_history": 20, "batch_size": 64, "max_epochs": 1}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    place: Path = tmp_path_factory.mktemp("toy")
    toy_tables(place / "tables")
    toy_features(place / "tables", place / "features")
    return FeatureSet.open(place / "features")


def test_health_is_in_the_learning_curve(features: FeatureSet) -> None:
    settings = SAMSettings(**SMALL, passes=2)
    trained = train(features, settings, "sam", CPU, data="d")
    names = [f"valid_attention_{kind}_{i}" for i in (1, 2) for kind in ("entropy", "mass")]
    assert [name for name in trained.curve[0] if "attention" in name] == names
    batch = next(iter(RankingBatches(features, "valid", max_history=20, batch_size=64)))
    assert {f"valid_{k}": v for k, v in trained.module.health(batch.history, batch.candidates, batch.context).items()} == pytest.approx(  # type: ignore[operator]
        {name: trained.curve[0][name] for name in names}
    )


def test_auxiliary_logits_are_judged_by_the_same_loss_and_added(features: FeatureSet) -> None:
    settings = SIMSettings(**SMALL, search="soft", top_k=3)
    torch.manual_seed(0)
    model = build_model(settings, features.sizes)
    batch = next(iter(RankingBatches(features, "train", max_history=20, batch_size=64, seed=0)))
    loss = RankerLearner(model, settings).training_step(batch, 0)
    own, auxiliary = model.training_logits(batch.history, batch.candidates, batch.context)  # type: ignore[operator]
    both = sum(ranking_loss(x, batch.clicks_BC, batch.candidates.lengths_B) for x in (own, auxiliary))
    torch.testing.assert_close(loss, both)
    loss.backward()
    assert model.soft.query.grad.abs().max() > 0  # type: ignore[union-attr]


def test_keeping_freed_memory_changes_no_number() -> None:
    def sums() -> list[float]:
        x = torch.arange(3_000_000, dtype=torch.float64)
        return [float((x * i).sum()) for i in range(5)]

    plain = sums()
    with freed_memory_is_kept():
        assert sums() == plain
    assert sums() == plain
