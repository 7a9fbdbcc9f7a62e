"""Training: exact resume, best weights, honest stops. Networks here are tiny; that they learn at all is asserted on planted tastes."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from longtrail.config import (
    BERT4RecSettings,
    BlossomSettings,
    DINSettings,
    GRU4RecSettings,
    PopularityRetrieverSettings,
    SAMSettings,
    SASRecSettings,
    TrainingSettings,
    at_most,
)
from longtrail.errors import ConfigError
from longtrail.examples import FeatureSet, RankingBatches, TargetBatches, seen_items
from longtrail.metrics import gauc, row_ndcg
from longtrail.models import registry as models
from longtrail.training import DivergedError, train
from longtrail.training.checkpoints import Checkpoint, Progress, fingerprint
from longtrail.training.learners import Learner
from longtrail.training.loop import accelerator_of, torchrun_shape
from tests.toy import toy_features, toy_tables

CPU = TrainingSettings(accelerator="cpu", threads=1)
DIN = DINSettings(width=8, hidden=(16,), max_history=20, batch_size=64, max_epochs=4, patience=4, learning_rate=3e-3, dropout=0.1)
SAM = SAMSettings(width=8, hidden=(16,), max_history=20, batch_size=64, max_epochs=4, patience=4, learning_rate=3e-3, passes=2)
SASREC = SASRecSettings(width=16, blocks=1, heads=2, max_history=20, batch_size=16, max_epochs=4, patience=4, learning_rate=3e-3)
RETRIEVER: dict[str, Any] = {"width": 16, "max_history": 20, "batch_size": 16, "max_epochs": 4, "patience": 4, "learning_rate": 3e-3}
NETWORKS = {
    "din": DIN,
    "sam": SAM,
    "sasrec": SASREC,
    "sasrec_gbce": SASREC.model_copy(update={"loss": "gbce", "negatives": 8}),
    "bert4rec": BERT4RecSettings(**RETRIEVER, blocks=1),
    "gru4rec_lambdarank": GRU4RecSettings(**RETRIEVER, loss="lambdarank"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("toy")
    toy_tables(place / "tables")
    toy_features(place / "tables", place / "features")
    return place / "features"


@pytest.fixture(scope="module")
def features(folder: Path) -> FeatureSet:
    return FeatureSet.open(folder)


class StopError(Exception):
    """What an interruption looks like to the code around training."""


def stop_after(epoch: int):
    def report(row: dict[str, float]) -> None:
        if row["epoch"] == epoch:
            raise StopError

    return report


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if one[name].numpy().tobytes() != other[name].numpy().tobytes()]
    assert not different


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("name", ["din", "sasrec_gbce", "gru4rec_lambdarank"])  # the others: test_training_resume.py
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(name: str, features: FeatureSet, tmp_path: Path) -> None:
    settings = NETWORKS[name]
    whole = train(features, settings, name, CPU, data="d")
    with pytest.raises(StopError):
        train(features, settings, name, CPU, data="d", checkpoints=tmp_path, report=stop_after(2))
    torch.rand(3)  # whatever the process did in between
    rows: list[dict[str, float]] = []
    resumed = train(features, settings, name, CPU, data="d", checkpoints=tmp_path, report=rows.append)
    assert resumed.resumed_from == 2
    assert_same_bits(whole.module.state_dict(), resumed.module.state_dict())
    assert resumed.curve == whole.curve == rows
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert (whole.value, whole.best_epoch) == (resumed.value, resumed.best_epoch)


def test_a_killed_process_is_resumed_bit_for_bit(folder: Path, features: FeatureSet, tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch, as an out-of-memory killer or a pre-empted node does it."""
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from longtrail.config import DINSettings, TrainingSettings
        from longtrail.examples import FeatureSet
        from longtrail.training import train
        settings = DINSettings.model_validate_json(sys.argv[1])
        training = TrainingSettings.model_validate_json(sys.argv[2])
        train(FeatureSet.open(Path(sys.argv[3])), settings, "din", training, data="d", checkpoints=Path(sys.argv[4]),
              report=lambda row: print(int(row["epoch"]), flush=True))
    """)
    settings = DIN.model_copy(update={"max_epochs": 16, "patience": 16})
    arguments = [settings.model_dump_json(), CPU.model_dump_json(), str(folder), str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 3:
            break
    time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed: raise max_epochs"
    process.stdout.close()
    resumed = train(features, settings, "din", CPU, data="d", checkpoints=tmp_path)
    assert 3 <= resumed.resumed_from < 16
    whole = train(features, settings, "din", CPU, data="d")
    assert resumed.curve == whole.curve
    assert_same_bits(whole.module.state_dict(), resumed.module.state_dict())


def test_a_finished_run_whose_model_was_not_saved_is_not_trained_again(features: FeatureSet, tmp_path: Path) -> None:
    first = train(features, DIN, "din", CPU, data="d", checkpoints=tmp_path)
    again = train(features, DIN, "din", CPU, data="d", checkpoints=tmp_path)
    assert again.resumed_from == len(first.curve) == len(again.curve)
    assert_same_bits(first.module.state_dict(), again.module.state_dict())
    assert again.checkpoint is not None
    again.checkpoint.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_of_other_settings_or_data_is_never_picked_up(features: FeatureSet, tmp_path: Path) -> None:
    def resumed_from(name: str = "din", data: str = "d", training: TrainingSettings = CPU, metric: str = "auc", **changes: object) -> int:
        settings = DIN.model_copy(update={"max_epochs": 1, **changes})
        return train(features, settings, name, training, data=data, checkpoints=tmp_path, ranking_metric=metric).resumed_from

    assert resumed_from() == 0
    assert resumed_from() == 1
    assert resumed_from(data="other") == 0
    assert resumed_from(name="din2") == 0
    assert resumed_from(learning_rate=1e-3) == 0
    assert resumed_from(max_epochs=2) == 0
    assert resumed_from(metric="gauc") == 0
    assert resumed_from(training=CPU.model_copy(update={"seed": 1})) == 0
    assert resumed_from(training=CPU.model_copy(update={"gradient_clip": 0.5})) == 0


def test_checkpoint_holds_all_it_was_given_and_no_pickle(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    progress = Progress(
        epochs=3, waited=1, best_value=0.1 + 0.2, best_epoch=2, best=dict(model.state_dict()), curve=[{"epoch": 1, "train_loss": 1 / 3}]
    )
    checkpoint = Checkpoint(tmp_path, "m", fingerprint(x=1))
    assert checkpoint.load() is None
    checkpoint.save(progress, model.state_dict(), optimiser.state_dict())
    found = checkpoint.load()
    assert found is not None
    assert found[0].facts() == progress.facts()
    assert_same_bits(found[0].best, dict(model.state_dict()))
    assert_same_bits(found[1], dict(model.state_dict()))
    for index, state in optimiser.state_dict()["state"].items():
        assert_same_bits(found[2][index], state)
    assert load_file(checkpoint.file)  # safetensors, by its own reader
    assert [path.name for path in checkpoint.folder.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign"])
def test_a_damaged_checkpoint_is_a_warning_and_a_fresh_start(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = Checkpoint(tmp_path, "m", fingerprint(x=1))
    checkpoint.save(Progress(epochs=1), {"w": torch.ones(50)}, {"state": {}})
    content = checkpoint.file.read_bytes()
    checkpoint.file.write_bytes({"truncated": content[:-20], "empty": b"", "foreign": b"PK\x03\x04" + content}[damage])
    assert checkpoint.load() is None
    assert "starts from scratch" in caplog.text


def test_an_interrupted_write_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path, "m", fingerprint(x=1))
    checkpoint.save(Progress(epochs=1), {"w": torch.ones(3)}, {"state": {}})

    def half_written(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("longtrail.training.checkpoints.save_file", half_written)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(Progress(epochs=2), {"w": torch.zeros(3)}, {"state": {}})
    found = checkpoint.load()
    assert found is not None
    assert found[0].epochs == 1
    assert torch.equal(found[1]["w"], torch.ones(3))


# ---------------------------------------------------------------- early stopping and best weights


@pytest.mark.parametrize("name", ["din", "sasrec"])
def test_the_weights_given_back_are_those_of_the_best_epoch(name: str, features: FeatureSet) -> None:
    """The validation metric is computed again here from the returned module, by plain code, and must be the curve's maximum."""
    settings = NETWORKS[name].model_copy(update={"max_epochs": 6, "learning_rate": 2e-2})
    trained = train(features, settings, name, CPU, data="d", ranking_metric="gauc")
    values = [row[f"valid_{trained.metric}"] for row in trained.curve]
    assert trained.value == max(values)
    assert trained.best_epoch == 1 + int(np.argmax(values))
    again = _valid_gauc(trained.module, features) if name == "din" else _valid_ndcg(trained.module, features)
    assert again == pytest.approx(trained.value, abs=1e-6)
    assert not trained.module.training


def _valid_gauc(module: torch.nn.Module, features: FeatureSet) -> float | None:
    users, clicks, scores = [], [], []
    for batch in RankingBatches(features, "valid", max_history=20, batch_size=7):
        with torch.no_grad():
            logits = module(batch.history, batch.candidates, batch.context)
        for row, count in enumerate(batch.candidates.lengths_B.tolist()):
            users += [int(batch.users_B[row])] * count
            clicks += batch.clicks_BC[row, :count].tolist()
            scores += logits[row, :count].tolist()
    return gauc(np.array(users), np.array(clicks), np.array(scores))


def _valid_ndcg(module: torch.nn.Module, features: FeatureSet) -> float:
    gains = []
    for batch in TargetBatches(features, "valid", max_history=20, batch_size=5, max_per_user=at_most(CPU.validation_targets_per_user)):
        with torch.no_grad():
            scores = (module.user_vectors(batch.history) @ module.item_vectors().T).numpy()
        offsets, items = seen_items(features, batch.users_B.numpy(), batch.history_length_B.numpy())
        for row, target in enumerate(batch.targets_B.tolist()):
            barred = {0, *items[offsets[row] : offsets[row + 1]].tolist()}
            order = sorted((item for item in range(scores.shape[1]) if item not in barred), key=lambda item: (-scores[row, item], item))
            gains.append(float(row_ndcg(np.array([order.index(target) + 1 if target in order else 0]), 10)[0]))
    return float(np.mean(gains))


def test_frozen_parameters_are_counted_apart(features: FeatureSet, caplog: pytest.LogCaptureFixture) -> None:
    frozen = BlossomSettings(window=2, block=4, stride=4, compression=4, selected=1, selector="frozen")
    with caplog.at_level("INFO", "longtrail.training"):
        trained = train(features, NETWORKS["sasrec"].model_copy(update={"attention": frozen, "max_epochs": 1}), "blossom", CPU, data="d")
    counts = {learns: sum(p.numel() for p in trained.module.parameters() if p.requires_grad is learns) for learns in (True, False)}
    assert (trained.parameters.trained, trained.parameters.frozen) == (counts[True], counts[False]) and counts[False] > 0
    assert f"blossom: {counts[True]:,} parameters and {counts[False]:,} frozen ones, " in caplog.text


def test_training_stops_when_patience_is_out(features: FeatureSet) -> None:
    settings = DIN.model_copy(update={"max_epochs": 40, "patience": 2, "learning_rate": 3e-2})
    trained = train(features, settings, "din", CPU, data="d")
    assert len(trained.curve) == trained.best_epoch + 2 < 40


@pytest.mark.parametrize("metric", ["auc", "gauc"])
def test_a_ranker_is_stopped_by_the_metric_it_is_selected_by(metric: str, features: FeatureSet) -> None:
    trained = train(features, DIN, "din", CPU, data="d", ranking_metric=metric)
    assert trained.metric == metric
    assert trained.value == max(row[f"valid_{metric}"] for row in trained.curve)


def test_a_ranker_selected_by_what_training_does_not_watch_is_stopped_by_auc(features: FeatureSet) -> None:
    assert train(features, DIN.model_copy(update={"max_epochs": 1}), "din", CPU, data="d", ranking_metric="log_loss").metric == "auc"


@pytest.mark.parametrize("name", ["din", "sasrec"])
def test_without_validation_rows_the_last_weights_are_kept_and_said_so(
    name: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = shutil.copytree(folder, tmp_path / "features")
    for file in (bare / "examples/valid.parquet", bare / "targets/valid.parquet"):
        pq.write_table(pq.read_table(file).slice(0, 0), file)
    settings = NETWORKS[name].model_copy(update={"max_epochs": 2})
    trained = train(FeatureSet.open(bare), settings, name, CPU, data="d")
    assert (trained.value, trained.best_epoch, len(trained.curve)) == (None, 2, 2)
    assert "the last epoch's weights are kept" in caplog.text
    assert trained.summary().endswith("unknown at epoch 2 of 2")


# ---------------------------------------------------------------- determinism and the process around


def test_same_seed_same_bits_other_seed_other_weights(features: FeatureSet) -> None:
    settings = SASREC.model_copy(update={"max_epochs": 1})
    runs = [train(features, settings, "s", CPU.model_copy(update={"seed": seed}), data="d").module.state_dict() for seed in (0, 0, 1)]
    assert_same_bits(runs[0], runs[1])
    assert not torch.equal(runs[0]["items.table"], runs[2]["items.table"])


def test_the_processs_own_state_is_put_back(features: FeatureSet) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    train(features, DIN.model_copy(update={"max_epochs": 1}), "din", CPU.model_copy(update={"threads": before[1] + 1}), data="d")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before[1:]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["din", "sam", "sasrec"])
def test_a_loss_that_is_no_number_stops_and_says_where_and_what_to_try(name: str, features: FeatureSet) -> None:
    settings = NETWORKS[name].model_copy(update={"learning_rate": 1e30})
    with pytest.raises(DivergedError, match=r"epoch \d+, step \d+: the loss is (nan|inf).*smaller learning_rate \(now 1e\+30\)"):
        train(features, settings, name, CPU, data="d")


@pytest.mark.parametrize("name", ["din", "sasrec"])
def test_a_model_of_nans_is_never_judged(name: str, features: FeatureSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training loss is a number, and what the validation split is judged by is not: sorted, NaNs would have an AUC like any other scores."""
    asked = {"din": (models.DIN, "forward", "scores of the validation split"), "sasrec": (models.SASRec, "user_vectors", "user vectors")}
    model, ask, wrong = asked[name]
    real = getattr(model, ask)

    def spoilt(self: torch.nn.Module, *arguments: Any) -> torch.Tensor:
        answer = real(self, *arguments)
        return answer if self.training else torch.where(torch.arange(len(answer))[:, None] == 1, torch.nan, answer)

    monkeypatch.setattr(model, ask, spoilt)
    settings = NETWORKS[name].model_copy(update={"max_epochs": 2})
    with pytest.raises(DivergedError, match=rf"^epoch 1: \d+ of \d+ {wrong}.* not finite.*; try a smaller learning_rate \(now"):
        train(features, settings, name, CPU, data="d")


def test_a_loss_that_is_no_number_has_the_step_of_the_epoch_after_a_resume_too(
    features: FeatureSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 and 2 are kept, the fourth goes wrong in its second piece: in the first run, and in the one that goes on from step 3."""
    training, real = CPU.model_copy(update={"checkpoint_steps": 2, "accumulate": 2}), Learner.account
    told = {}
    for first in (0, 2):
        pieces = itertools.count(2 * first)

        def account(self: Learner, loss: torch.Tensor, examples: int) -> torch.Tensor:
            return real(self, loss * (torch.nan if next(pieces) == 7 else 1), examples)  # noqa: B023

        with monkeypatch.context() as patched, pytest.raises(DivergedError) as found:
            patched.setattr(Learner, "account", account)
            train(features, DIN, "din", training, data="d", checkpoints=tmp_path)
        told[first] = str(found.value)
    assert told[0] == told[2] and told[0].startswith("epoch 1, step 4: the loss is nan")


def test_a_gpu_that_is_not_there_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=r"training\.accelerator: gpu, but torch sees no GPU"):
        accelerator_of(TrainingSettings(accelerator="gpu"))
    assert accelerator_of(TrainingSettings(devices=4)) == ("cpu", 1, "32-true")
    assert accelerator_of(TrainingSettings(precision="bf16"))[2] == "bf16-mixed"


# ---------------------------------------------------------------- several processes


def test_torchrun_says_how_many_devices_and_machines_there_are(monkeypatch: pytest.MonkeyPatch, features: FeatureSet) -> None:
    assert torchrun_shape({}) is None
    started = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}
    assert torchrun_shape(started) == (4, 2)
    with pytest.raises(ConfigError, match="6 processes, 4 of them here"):
        torchrun_shape(started | {"WORLD_SIZE": "6"})
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    assert accelerator_of(TrainingSettings(accelerator="cpu", devices=1)) == ("cpu", 4, "32-true")
    with pytest.raises(ConfigError, match="popular: counts need no training on several processes"):
        train(features, PopularityRetrieverSettings(), "popular", CPU, data="d")
