"""Rankers in training: how they are, logits of parts that their own do not train, and that the baselines learn at all."""

import math
import re
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longtrail.config import (
    DIENSettings,
    DINSettings,
    ETASettings,
    MeanPoolingSettings,
    PopularityRankerSettings,
    SAMSettings,
    SDIMSettings,
    SIMSettings,
    TrainingSettings,
    TWINSettings,
)
from longtrail.examples import FeatureSet, RankingBatches
from longtrail.losses import ranking_loss
from longtrail.models.contracts import Candidates, Context, History
from longtrail.models.rankers.sam import SAM
from longtrail.models.registry import build_model
from longtrail.training import train
from longtrail.training.learners import RankerLearner
from longtrail.training.loop import Lines
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
    settings = SAMSettings(**SMALL | {"batch_size": 16}, passes=2)
    trained = train(features, settings, "sam", CPU, data="d")
    names = [f"valid_attention_{kind}_{i}" for i in (1, 2) for kind in ("entropy", "mass")]
    assert [name for name in trained.curve[0] if "attention" in name] == names
    # Of all candidates of the split, as one batch would have it: the batches of training are sorted by length, each unlike the whole.
    (batch,) = RankingBatches(features, "valid", max_history=20, batch_size=100_000)
    assert {f"valid_{k}": v for k, v in trained.module.health(batch.history, batch.candidates, batch.context).items()} == pytest.approx(  # type: ignore[operator]
        {name: trained.curve[0][name] for name in names}, rel=1e-4
    )


def test_health_is_of_batches_from_all_over_a_long_pass(features: FeatureSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtrail.training.learners._WATCHED_BATCHES", 3)
    seen, health = [], SAM.health

    def watched(self: SAM, history: History, candidates: Candidates, context: Context) -> dict[str, float]:
        seen.append(history.lengths_B.tolist())
        return health(self, history, candidates, context)

    monkeypatch.setattr(SAM, "health", watched)
    settings = SAMSettings(**SMALL | {"batch_size": 8}, passes=1)
    train(features, settings, "sam", CPU, data="d")
    batches = list(RankingBatches(features, "valid", max_history=20, batch_size=8))
    every = math.ceil(len(batches) / 3)
    assert every > 2 and seen == [batch.history.lengths_B.tolist() for batch in batches[every // 2 :: every]]


def test_auxiliary_logits_are_judged_by_the_same_loss_and_added(features: FeatureSet) -> None:
    settings = SIMSettings(**SMALL, search="soft", top_k=3)
    torch.manual_seed(0)
    model = build_model(settings, features.sizes)
    batch = next(iter(RankingBatches(features, "train", max_history=20, batch_size=64, seed=0)))
    twin = deepcopy(model)  # a pass moves the running statistics
    loss = RankerLearner(model, settings).training_step(batch, 0)
    own, auxiliary = twin.training_logits(batch.history, batch.candidates, batch.context)  # type: ignore[operator]
    both = sum(ranking_loss(x, batch.clicks_BC, batch.candidates.lengths_B) for x in (own, auxiliary))
    torch.testing.assert_close(loss, both)
    loss.backward()
    assert model.soft.query.grad.abs().max() > 0  # type: ignore[union-attr]


LEARNS = {"width": 8, "hidden": (16,), "max_history": 40, "batch_size": 64, "max_epochs": 12, "patience": 12, "learning_rate": 3e-3}
BASELINES = {
    "mean_pooling": MeanPoolingSettings(**LEARNS),
    "sim_hard": SIMSettings(**LEARNS, top_k=10),
    "sim_soft": SIMSettings(**LEARNS, top_k=10, search="soft"),
    "eta": ETASettings(**LEARNS, top_k=10),
    "twin": TWINSettings(**LEARNS, top_k=10),
    "sdim": SDIMSettings(**LEARNS),
    "dien": DIENSettings(**LEARNS | {"max_history": 20, "max_epochs": 8}, attention_hidden=(8,)),
    "sam_3p_plus": SAMSettings(**LEARNS, enhancement=3),
}


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_finds_the_planted_tastes_that_popularity_cannot_see(name: str, features: FeatureSet) -> None:
    """Two categories of six are clicked six times as often as the others, and which two differs by user.

    GAUC .57 of the click rate; .82 of what counts a user's categories (mean pooling, SDIM); .66-.67 of softmax over a searched few (SIM, TWIN).
    """
    popularity = train(features, PopularityRankerSettings(by="click_rate"), "popularity", CPU, data="d", ranking_metric="gauc")
    trained = train(features, BASELINES[name], name, CPU, data="d", ranking_metric="gauc")
    assert popularity.value is not None and trained.value is not None
    assert trained.value > popularity.value + 0.05


def test_keeping_freed_memory_changes_no_number() -> None:
    def sums() -> list[float]:
        x = torch.arange(3_000_000, dtype=torch.float64)
        return [float((x * i).sum()) for i in range(5)]

    plain = sums()
    with freed_memory_is_kept():
        assert sums() == plain
    assert sums() == plain


def test_what_is_kept_through_a_pass_is_a_copy(features: FeatureSet) -> None:
    """Tensors kept among a batch's large blocks break the heap into pieces, and the process grows with every batch."""
    settings = MeanPoolingSettings(**SMALL)
    learner = RankerLearner(build_model(settings, features.sizes), settings)
    learner.on_validation_epoch_start()
    with torch.no_grad():
        learner.validation_step(next(iter(RankingBatches(features, "valid", max_history=20, batch_size=64))), 0)
    assert all(column.flags.owndata for row in learner._rows for column in row)


class _NoWaiting(TorchDispatchMode):
    """Fails where a number of a tensor is asked for, or a shape that depends on numbers: what a GPU must finish all earlier work for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [SAMSettings(**SMALL, listwise=0.3), DINSettings(**SMALL)], ids=lambda s: s.kind)
def test_a_step_asks_for_no_number(settings: Any, features: FeatureSet) -> None:
    """Losses are read in bundles; that is worth nothing where each step reads something else."""
    learner = RankerLearner(build_model(settings, features.sizes), settings)
    batches = RankingBatches(features, "train", max_history=20, batch_size=64, seed=0, sampled=2)
    for batch in (batches[0], batches.piece(0, 1, 3)):
        with _NoWaiting():
            learner.training_step(batch, 0).backward()
        assert (batch.exposures, batch.clicks) == (int(batch.exposed.sum()), int((batch.clicks_BC[batch.exposed] > 0).sum()))
        assert 0 < batch.clicks < batch.exposures < int(batch.candidates.lengths_B.sum())


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_long_epoch_says_how_far_it_is(
    pieces: int, features: FeatureSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A line for every step and every judged batch here; by default one a minute, and none of an epoch that is shorter."""
    settings, training = DINSettings(**SMALL | {"batch_size": 16}), CPU.model_copy(update={"accumulate": pieces})
    with caplog.at_level("INFO", "longtrail.training"):
        train(features, settings, "din", training, data="d")
        assert "to go" not in caplog.text
        monkeypatch.setattr("longtrail.training.loop.Lines", partial(Lines, seconds=0.0))
        train(features, settings, "din", training, data="d")
    for what, split in (("steps", "train"), ("batches judged", "valid")):
        total = len(RankingBatches(features, split, max_history=20, batch_size=16))
        told = re.findall(rf"epoch 1: (\d+) of (\d+) {what}, \d+ s, about \d+ s to go", caplog.text)
        assert total > 1 and sorted({(int(done), int(of)) for done, of in told}) == [(done, total) for done in range(1, total + 1)]
