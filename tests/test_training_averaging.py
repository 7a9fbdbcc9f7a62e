"""Running means of weights: the formula by hand, that training does not notice them, and that they are what is judged and kept."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn

from longtrail.config import DINSettings, SASRecSettings, SplitSettings, TrainingSettings
from longtrail.examples import FeatureSet
from longtrail.training import train
from longtrail.training.averaging import WeightAverage
from longtrail.training.checkpoints import Progress
from tests.toy import toy_features, toy_tables

CPU = TrainingSettings(accelerator="cpu", threads=1)
TRAINER: Any = None  # WeightAverage asks it nothing


class Holder(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("toy")
    toy_tables(place / "tables")
    toy_features(place / "tables", place / "features")
    return place / "features"


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_means_are_those_of_the_formula(decay: float, accumulate: int) -> None:
    torch.manual_seed(0)
    model = small()
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    progress = Progress()
    average, holder = WeightAverage(progress, decay, accumulate), Holder(model)
    average.on_train_epoch_start(TRAINER, holder)
    for batch in range(60):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
            model(torch.randn(5, 3, dtype=torch.float64))  # moves the running statistics
        average.on_train_batch_end(TRAINER, holder, None, None, batch)
        step, rest = divmod(batch + 1, accumulate)
        if rest == 0:
            share = max(1 - decay, 9 / (step + 9))
            wanted = {name: (1 - share) * mean + share * model.state_dict()[name] for name, mean in wanted.items()}
    assert progress.averaged == 60 // accumulate
    assert set(progress.average) == {name for name in wanted if "num_batches" not in name}  # counters have no mean
    for name, mean in progress.average.items():
        torch.testing.assert_close(mean, wanted[name], rtol=1e-12, atol=1e-12)


def test_the_means_stand_in_the_models_place_while_it_is_judged() -> None:
    model = small()
    weight = model.state_dict()["0.weight"]
    progress = Progress()
    average, holder = WeightAverage(progress, 0.9), Holder(model)
    average.on_train_epoch_start(TRAINER, holder)
    weight.add_(1)
    raw, mean = weight.clone(), progress.average["0.weight"].clone()
    assert not torch.equal(raw, mean)
    average.on_validation_start(TRAINER, holder)
    assert torch.equal(weight, mean)
    average.on_validation_end(TRAINER, holder)
    assert torch.equal(weight, raw)
    assert torch.equal(progress.average["0.weight"], mean)


@pytest.mark.parametrize(
    "settings",
    [
        DINSettings(width=4, hidden=(8,), max_history=12, batch_size=64, max_epochs=2),
        SASRecSettings(width=8, blocks=1, max_history=12, batch_size=16, max_epochs=2),
    ],
    ids=["ranker", "encoder"],
)
def test_training_goes_its_way_and_the_means_are_kept(settings: Any, folder: Path) -> None:
    features = FeatureSet.open(folder)
    averaged = train(features, settings, "m", CPU, data="d")
    raw = train(features, settings.model_copy(update={"weight_average": 0.0}), "m", CPU, data="d")
    assert [row["train_loss"] for row in averaged.curve] == [row["train_loss"] for row in raw.curve]
    assert averaged.curve != raw.curve  # others were judged
    own, theirs = averaged.module.state_dict(), raw.module.state_dict()
    assert all(torch.isfinite(x).all() for x in own.values() if x.is_floating_point())
    assert any(not torch.equal(own[name], theirs[name]) for name in own)


def test_without_a_validation_split_the_last_means_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy_tables(tmp_path / "tables")
    toy_features(tmp_path / "tables", tmp_path / "features", SplitSettings(valid_share=0.0))
    features = FeatureSet.open(tmp_path / "features")
    assert features.examples("valid").num_rows == 0
    settings = DINSettings(width=4, hidden=(8,), max_history=12, batch_size=64, max_epochs=1)
    trained = train(features, settings, "m", CPU, data="d", checkpoints=tmp_path / "checkpoints")
    assert "the last epoch's weights are kept" in caplog.text
    assert trained.checkpoint is not None
    found = trained.checkpoint.load()
    assert found is not None
    progress, weights, _ = found
    for name, tensor in trained.module.state_dict().items():
        assert torch.equal(tensor, progress.average.get(name, weights[name])), name
    assert any(not torch.equal(mean, weights[name]) for name, mean in progress.average.items())
