"""Every trained model, whatever stands in its slots, ends with the same bits where it was interrupted and started again."""

from pathlib import Path
from typing import Any

import pytest

from longtrail.config import (
    BERT4RecSettings,
    BlossomSettings,
    DIENSettings,
    DINSettings,
    ETASettings,
    GRU4RecSettings,
    IFASettings,
    MeanPoolingSettings,
    RecJPQItemsSettings,
    SAMSettings,
    SASRecSettings,
    SDIMSettings,
    SIMSettings,
    TrainingSettings,
    TWINSettings,
)
from longtrail.examples import FeatureSet
from longtrail.models.registry import MODELS
from longtrail.training import train

CPU = TrainingSettings(accelerator="cpu", threads=1, validation_targets_per_user=1)
SHARED: dict[str, Any] = {"max_history": 12, "batch_size": 256, "max_epochs": 2, "patience": 4, "dropout": 0.2}
RANKER: dict[str, Any] = {**SHARED, "width": 4, "hidden": (8,)}
ENCODER: dict[str, Any] = {**SHARED, "width": 8}
RECJPQ: dict[str, Any] = {"items": RecJPQItemsSettings(splits=2, codes=16)}
BLOSSOM: dict[str, Any] = {"window": 2, "block": 4, "stride": 4, "compression": 4, "selected": 1}
NETWORKS: dict[str, Any] = {
    "mean pooling": MeanPoolingSettings(**RANKER),
    "din recjpq": DINSettings(**RANKER, **RECJPQ),
    "dien": DIENSettings(**RANKER, attention_hidden=(6,)),
    "sim soft": SIMSettings(**RANKER, search="soft", top_k=3, heads=2),
    "eta recjpq": ETASettings(**RANKER, **RECJPQ, top_k=3, heads=2),  # random planes that are not trained
    "twin": TWINSettings(**RANKER, top_k=3, heads=2),
    "sdim": SDIMSettings(**RANKER, hashes=4, bits=2),
    "sam 3p+ recjpq": SAMSettings(**RANKER, **RECJPQ, enhancement=2),
    "ifa": IFASettings(**RANKER, heads=2, relation_dropout=0.5, sampled_candidates=2, half_life_days=3.0),  # draws requests and candidates
    "ifa recjpq": IFASettings(**RANKER, **RECJPQ, heads=2),
    "sasrec blossom recjpq": SASRecSettings(**ENCODER, blocks=1, attention=BlossomSettings(**BLOSSOM, selector="straight_through"), **RECJPQ),
    "bert4rec blossom": BERT4RecSettings(**ENCODER, blocks=1, attention=BlossomSettings(**BLOSSOM)),
    "bert4rec recjpq": BERT4RecSettings(**ENCODER, blocks=1, **RECJPQ),
    "gru4rec recjpq": GRU4RecSettings(**ENCODER, **RECJPQ),
}


class StoppedError(Exception):
    """Stands for whatever ends a process."""


def stop(row: dict[str, float]) -> None:
    raise StoppedError


@pytest.mark.parametrize("name", NETWORKS)
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(name: str, toy_features_folder: Path, tmp_path: Path) -> None:
    features, settings = FeatureSet.open(toy_features_folder), NETWORKS[name]
    whole = train(features, settings, name, CPU, data="d")
    with pytest.raises(StoppedError):
        train(features, settings, name, CPU, data="d", checkpoints=tmp_path, report=stop)
    resumed = train(features, settings, name, CPU, data="d", checkpoints=tmp_path)
    assert resumed.resumed_from == 1 and resumed.curve == whole.curve and len(whole.curve) == 2
    held, found = whole.module.state_dict(), resumed.module.state_dict()
    assert held.keys() == found.keys()
    assert not [key for key in held if held[key].numpy().tobytes() != found[key].numpy().tobytes()]


def test_every_trained_kind_is_tried_here_or_in_test_training() -> None:
    from tests.test_training import NETWORKS as OTHERS

    counted = {("retrieval", "popularity"), ("retrieval", "markov"), ("ranking", "popularity")}
    assert {(s.stage, s.kind) for s in (NETWORKS | OTHERS).values()} == set(MODELS) - counted
