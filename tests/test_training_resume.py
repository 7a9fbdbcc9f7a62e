"""Every trained model, whatever stands in its slots, ends with the same bits where it was interrupted and started again."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from longtrail.config import (
    BERT4RecSettings,
    BlossomSettings,
    DIENSettings,
    DINSettings,
    ETASettings,
    FullAttentionSettings,
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
from longtrail.training import Trained, train
from longtrail.training.loop import EpochKeeper
from tests.contracts.slots import ATTENTIONS, TABLES, slots_of
from tests.toy import toy_features, toy_tables

CPU = TrainingSettings(accelerator="cpu", threads=1, validation_targets_per_user=1, checkpoint_steps=1)
SHARED: dict[str, Any] = {"max_history": 12, "max_epochs": 2, "patience": 4, "dropout": 0.2}
RANKER: dict[str, Any] = {**SHARED, "batch_size": 96, "width": 4, "hidden": (8,)}
ENCODER: dict[str, Any] = {**SHARED, "batch_size": 12, "width": 8}
RECJPQ: dict[str, Any] = {"items": RecJPQItemsSettings(splits=2, codes=16)}
ADDED: dict[str, Any] = {"items": RecJPQItemsSettings(splits=3, codes=16, composition="sum")}
BLOSSOM: dict[str, Any] = {"window": 2, "block": 4, "stride": 4, "compression": 4, "selected": 1}
FROZEN, TRAINED, COMPRESSED = ({"attention": BlossomSettings(**BLOSSOM, selector=name)} for name in ("frozen", "straight_through", "compressed"))  # type: ignore[arg-type]
LEARNED: dict[str, Any] = {"attention": FullAttentionSettings(positions="learned")}
NETWORKS: dict[str, Any] = {
    "mean pooling": MeanPoolingSettings(**RANKER),
    "mean pooling recjpq added": MeanPoolingSettings(**RANKER, **ADDED),
    "din": DINSettings(**RANKER),
    "din recjpq": DINSettings(**RANKER, **RECJPQ),
    "dien": DIENSettings(**RANKER, attention_hidden=(6,)),
    "dien recjpq": DIENSettings(**RANKER, **RECJPQ, attention_hidden=(6,)),
    "sim soft": SIMSettings(**RANKER, search="soft", top_k=3, heads=2),
    "sim hard recjpq": SIMSettings(**RANKER, **RECJPQ, top_k=3, heads=2),
    "eta": ETASettings(**RANKER, top_k=3, heads=2),  # random planes that are not trained
    "eta recjpq": ETASettings(**RANKER, **RECJPQ, top_k=3, heads=2),
    "twin": TWINSettings(**RANKER, top_k=3, heads=2),
    "twin recjpq": TWINSettings(**RANKER, **RECJPQ, top_k=3, heads=2),
    "sdim": SDIMSettings(**RANKER, hashes=4, bits=2),
    "sdim recjpq": SDIMSettings(**RANKER, **RECJPQ, hashes=4, bits=2),
    "sam": SAMSettings(**RANKER, passes=2),
    "sam 3p+ recjpq": SAMSettings(**RANKER, **RECJPQ, enhancement=2),
    "ifa": IFASettings(**RANKER, heads=2, relation_dropout=0.5, sampled_candidates=2, half_life_days=3.0),  # draws requests and candidates
    "ifa recjpq": IFASettings(**RANKER, **RECJPQ, heads=2),
    "sasrec": SASRecSettings(**ENCODER, blocks=1),
    "sasrec recjpq added": SASRecSettings(**ENCODER, **ADDED, blocks=1),
    "sasrec blossom": SASRecSettings(**ENCODER, **COMPRESSED, blocks=1),
    "sasrec blossom recjpq": SASRecSettings(**ENCODER, **TRAINED, **RECJPQ, blocks=1),
    "sasrec learned": SASRecSettings(**ENCODER, **LEARNED, blocks=1),
    "sasrec learned recjpq": SASRecSettings(**ENCODER, **LEARNED, **RECJPQ, blocks=1),
    "bert4rec": BERT4RecSettings(**ENCODER, blocks=1),
    "bert4rec learned": BERT4RecSettings(**ENCODER, **LEARNED, blocks=1),
    "bert4rec learned recjpq": BERT4RecSettings(**ENCODER, **LEARNED, **ADDED, blocks=1),
    "bert4rec blossom": BERT4RecSettings(**ENCODER, **FROZEN, blocks=1),
    "bert4rec recjpq": BERT4RecSettings(**ENCODER, **RECJPQ, blocks=1),
    "bert4rec blossom recjpq": BERT4RecSettings(**ENCODER, **COMPRESSED, **RECJPQ, blocks=1),
    "gru4rec": GRU4RecSettings(**ENCODER),
    "gru4rec recjpq": GRU4RecSettings(**ENCODER, **RECJPQ),
}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    """Two or three steps an epoch."""
    place = tmp_path_factory.mktemp("small")
    return FeatureSet.open(toy_features(toy_tables(place / "tables", users=20, items=60), place / "features"))


class StoppedError(Exception):
    """Stands for whatever ends a process."""


def stop(row: dict[str, float]) -> None:
    raise StoppedError


def assert_same_training(one: Trained, other: Trained) -> None:
    assert one.curve == other.curve and len(one.curve) == 2 and (one.value, one.best_epoch) == (other.value, other.best_epoch)
    held, found = one.module.state_dict(), other.module.state_dict()
    assert held.keys() == found.keys()
    assert not [key for key in held if held[key].numpy().tobytes() != found[key].numpy().tobytes()]


@pytest.mark.parametrize("name", NETWORKS)
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
    name: str, features: FeatureSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first epoch; and after the second's first step, with all that is drawn there."""
    settings = NETWORKS[name]
    whole = train(features, settings, name, CPU, data="d")
    with pytest.raises(StoppedError):
        train(features, settings, name, CPU, data="d", checkpoints=tmp_path, report=stop)
    save = EpochKeeper._save

    def cut(keeper: EpochKeeper, *arguments: Any) -> None:
        save(keeper, *arguments)
        if (keeper.progress.epochs, keeper.progress.step) == (1, 1):
            raise StoppedError

    with monkeypatch.context() as patched, pytest.raises(StoppedError):
        patched.setattr(EpochKeeper, "_save", cut)
        train(features, settings, name, CPU, data="d", checkpoints=tmp_path)
    torch.rand(3)  # whatever the process did in between
    resumed = train(features, settings, name, CPU, data="d", checkpoints=tmp_path)
    assert resumed.resumed_from == 1
    assert_same_training(resumed, whole)


def test_every_trained_kind_is_tried_with_all_that_may_stand_in_its_slots() -> None:
    """Kinds × tables of items × attentions; and what else of a slot trains otherwise: a selector, a composition, a search."""
    tried = {(s.stage, s.kind, *slots_of(s)) for s in NETWORKS.values()}
    wanted = set()
    for stage, kind in set(MODELS) - {("retrieval", "popularity"), ("retrieval", "markov"), ("ranking", "popularity")}:  # which are counted
        attentions = ATTENTIONS if kind in ("sasrec", "bert4rec") else (None,)
        for table, attention in itertools.product(TABLES, attentions):
            wanted.add((stage, kind, ("items", table), *([("attention", attention)] if attention else [])))
    assert tried == wanted, f"expected a line of NETWORKS for each: {sorted(wanted - tried)}; and none for {sorted(tried - wanted)}"
    slots = [slot for s in NETWORKS.values() for slot in (s.items, getattr(s, "attention", None), s)]
    assert {"concat", "sum"} <= {getattr(slot, "composition", None) for slot in slots}
    assert {"frozen", "straight_through", "compressed"} <= {getattr(slot, "selector", None) for slot in slots}
    assert {"hard", "soft"} <= {getattr(slot, "search", None) for slot in slots}
