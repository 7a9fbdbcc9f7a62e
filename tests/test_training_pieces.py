"""A step that is computed in pieces is the step of the whole batch: by gradients in float64, by examples, and by resuming between the pieces."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from longtrail.config import (
    BERT4RecSettings,
    DINSettings,
    GRU4RecSettings,
    IFASettings,
    RecJPQItemsSettings,
    SASRecSettings,
    SIMSettings,
    TWINSettings,
)
from longtrail.examples import FeatureSet, RankingBatches, SequenceBatches
from longtrail.models.head import MaskedBatchNorm
from longtrail.models.registry import build_model
from longtrail.training.learners import RankerLearner, RetrieverLearner
from longtrail.training.pieces import Pieces
from tests.training_runs import run

ENCODER: dict[str, Any] = {"width": 8, "max_history": 20, "dropout": 0.0}
RANKER: dict[str, Any] = {"width": 4, "hidden": (8,), "max_history": 20, "dropout": 0.0}
MODELS: dict[str, Any] = {
    "sasrec": SASRecSettings(**ENCODER, blocks=1, heads=1),
    "sasrec recjpq": SASRecSettings(**ENCODER, blocks=1, heads=1, items=RecJPQItemsSettings(splits=2, codes=16)),
    "gru4rec": GRU4RecSettings(**ENCODER),
    "bert4rec": BERT4RecSettings(**ENCODER, blocks=1, heads=1, mask_share=1.0, max_masked=100),  # all is masked, so that nothing is drawn
    "ifa, listwise": IFASettings(**RANKER, listwise=0.7, relation_dropout=0.0),
    "sim, auxiliary": SIMSettings(**RANKER, search="soft", top_k=3),
}


@pytest.fixture(scope="module")
def features(toy_features_folder: Path) -> FeatureSet:
    return FeatureSet.open(toy_features_folder)


def batches_of(features: FeatureSet, settings: Any, batch_size: int = 17) -> Any:
    if settings.stage == "ranking":
        return RankingBatches(features, "train", max_history=20, batch_size=batch_size, seed=0)
    return SequenceBatches(features, max_history=20, batch_size=batch_size, seed=0)


def learner_of(features: FeatureSet, settings: Any) -> Any:
    torch.manual_seed(0)
    model = build_model(settings, features.sizes).double()
    if settings.stage != "ranking":
        return RetrieverLearner(model, settings, lambda batch: None)  # type: ignore[arg-type,return-value]
    for part in model.modules():
        if isinstance(part, MaskedBatchNorm):
            part.eval()  # batch statistics are those of a piece: the one thing that pieces change
    return RankerLearner(model, settings)


def gradients(learner: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    """As Lightning makes them: the mean over the pieces of what `training_step` gives, then the hook before the optimiser's step."""
    learner.zero_grad()
    learner._trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=len(batches))
    learner.on_train_epoch_start()
    for i, batch in enumerate(batches):
        (learner.training_step(batch, i) / len(batches)).backward()
    learner.on_before_optimizer_step(None)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in learner.named_parameters()}


@pytest.mark.parametrize(
    ("settings", "spared"),
    [
        (DINSettings(width=4, attention_hidden=(5, 3), weight_decay=0.1), "model.attention.middle_bias.0"),
        (TWINSettings(width=4, weight_decay=0.1), "model.bias.gaps"),
    ],
)
def test_weight_decay_spares_biases_of_any_shape(features: FeatureSet, settings: Any, spared: str) -> None:
    learner = learner_of(features, settings)
    rates = {id(p): group["weight_decay"] for group in learner.configure_optimizers().param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in learner.named_parameters()}
    assert found[spared] == 0 and found["model.embedding.items.table"] == 0.1
    assert all(
        rate == (0.1 if p.ndim > 1 and "bias" not in name else 0) for (name, p), rate in zip(learner.named_parameters(), found.values(), strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_loss_of_a_step_in_pieces_are_those_of_the_whole_batch(name: str, features: FeatureSet) -> None:
    """Of full and of ragged batches, in 2, 3 and more pieces than there are examples; candidates, clicks and targets differ by piece."""
    learner, batches = learner_of(features, MODELS[name]), batches_of(features, MODELS[name])
    sizes = [len(batches[i].users_B) for i in range(len(batches))]
    for index in (int(np.argmax(sizes)), int(np.argmin(sizes))):
        whole = gradients(learner, [batches[index]])
        learner.totals = (0.0, 0.0)
        loss = learner.train_loss()
        assert max(float(g.abs().max()) for g in whole.values()) > 1e-4
        for pieces in (2, 3, sizes[index] + 2):
            cut = gradients(learner, [batches.piece(index, piece, pieces) for piece in range(pieces)])
            for parameter, gradient in whole.items():
                torch.testing.assert_close(cut[parameter], gradient, rtol=1e-7, atol=1e-11)
            learner.totals = (0.0, 0.0)
            assert learner.train_loss() == pytest.approx(loss, rel=1e-6)  # losses are kept in float32


def test_without_the_weights_a_ragged_step_would_be_another(features: FeatureSet) -> None:
    """The mean of the pieces' means, which is what Lightning does by itself, is off: so the test above can fail."""
    learner, batches = learner_of(features, MODELS["sasrec"]), batches_of(features, MODELS["sasrec"])
    pieces = [batches.piece(0, piece, 3) for piece in range(3)]
    exact = gradients(learner, [batches[0]])["model.items.table"]
    learner.zero_grad()
    learner._trainer = None
    for batch in pieces:
        (learner.training_step(batch, 0) / 3).backward()
    naive = dict(learner.named_parameters())["model.items.table"].grad
    assert naive is not None
    assert float((naive - exact).abs().max()) > 1e-3 * float(exact.abs().max())


def test_a_blank_ranking_piece_changes_no_statistics(features: FeatureSet) -> None:
    learner = learner_of(features, MODELS["ifa, listwise"]).train()
    learner.model.head.norm.train()
    blank = batches_of(features, MODELS["ifa, listwise"]).make(np.array([3])).blank()
    before = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    assert float(learner.training_step(blank, 0).detach()) == 0
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in learner.named_buffers())


@pytest.mark.parametrize("name", ["sasrec", "ifa, listwise"])
def test_every_example_of_a_step_is_in_one_piece_of_one_process(name: str, features: FeatureSet) -> None:
    batches = batches_of(features, MODELS[name], batch_size=5)
    batches.set_epoch(4)

    def ids(batch: Any) -> list[tuple[int, ...]]:
        if name == "sasrec":
            real_B = (batch.targets_BL > 0).any(1) | (batch.first_targets_B > 0)
            return [tuple(row) for row in torch.stack([batch.users_B, batch.lengths_B, batch.history.times_BL[:, 0]], 1)[real_B].tolist()]
        return [(request,) for request in batch.requests_B[batch.candidates.lengths_B > 0].tolist()]

    whole = [ids(batch) for batch in batches]
    for world, accumulate, first in ((1, 1, 0), (2, 1, 3), (3, 2, 1), (2, 4, 0)):
        own = [list(Pieces(batches, accumulate=accumulate, first_step=first).of(rank, world)) for rank in range(world)]
        assert {len(pieces) for pieces in own} == {(len(whole) - first) * accumulate}
        for step, expected in enumerate(whole[first:]):
            rows = slice(step * accumulate, (step + 1) * accumulate)
            assert sorted(found for pieces in own for batch in pieces[rows] for found in ids(batch)) == sorted(expected)


def test_an_epoch_that_was_entered_in_its_middle_is_followed_by_whole_ones(features: FeatureSet) -> None:
    pieces = Pieces(batches_of(features, MODELS["sasrec"]), accumulate=2, first_step=1)
    assert len(pieces) == len(list(pieces)) == 2 * (pieces.steps - 1)
    pieces.set_epoch(1)
    assert len(pieces) == len(list(pieces)) == 2 * pieces.steps


def test_interrupted_in_the_middle_of_an_epoch_and_resumed_is_uninterrupted_bit_for_bit(toy_features_folder: Path, tmp_path: Path) -> None:
    """With dropout: what is drawn after a resume file is a function of where it stands."""
    whole = run(toy_features_folder, "din dropout", tmp_path / "whole")
    first = run(toy_features_folder, "din dropout", tmp_path / "cut", stop=(1, 4))
    again = run(toy_features_folder, "din dropout", tmp_path / "cut")
    assert "curve" not in first and again["resumed_from"] == 1
    assert again["curve"] == whole["curve"]
    assert first["seen"] + again["seen"] == whole["seen"]
    weights = again["module"].state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in whole["module"].state_dict().items())


def test_accumulation_keeps_the_learning_curve(toy_features_folder: Path, tmp_path: Path) -> None:
    """Through Lightning's own loop; and a run may change its pieces where it was interrupted."""
    whole = run(toy_features_folder, "sasrec", tmp_path / "whole")
    run(toy_features_folder, "sasrec", tmp_path / "cut", accumulate=3, stop=(1, 2))
    cut = run(toy_features_folder, "sasrec", tmp_path / "cut", accumulate=2)
    assert cut["resumed_from"] == 1
    for one, other in zip(cut["curve"], whole["curve"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
