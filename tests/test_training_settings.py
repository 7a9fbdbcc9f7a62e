"""No setting is read and then forgotten: whatever is set otherwise, other weights come out of the same log and the same seed."""

import functools
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter

from longtrail import config
from longtrail.config import BlossomSettings, FullAttentionSettings, Model, RecJPQItemsSettings
from longtrail.config.ranking_models import RankerModel
from longtrail.config.retrieval_models import RetrieverModel
from longtrail.examples import FeatureSet
from longtrail.models.registry import build_model
from longtrail.training import train
from tests.contracts.batches import SIZES
from tests.test_training import CPU
from tests.toy import toy_features, toy_tables

MODEL: TypeAdapter[Any] = TypeAdapter(Model)
RANKERS_AND_ENCODERS = [kind for union in (RankerModel, RetrieverModel) for kind in get_args(get_args(union)[0]) if "max_epochs" in kind.model_fields]
SHARED: dict[str, Any] = {"width": 8, "max_history": 20, "learning_rate": 3e-3, "max_epochs": 1, "patience": 1}
RANKER: dict[str, Any] = SHARED | {"stage": "ranking", "hidden": [16], "batch_size": 64}
ENCODER: dict[str, Any] = SHARED | {"stage": "retrieval", "batch_size": 16}
BLOSSOM: dict[str, Any] = {"kind": "blossom", "window": 2, "block": 2, "compression": 2, "stride": 2, "selected": 1}
GBCE: dict[str, Any] = {"loss": "gbce", "negatives": 4}
JPQ: dict[str, Any] = {"kind": "recjpq", "splits": 2, "codes": 4}

# Of each class of settings: what else a model of it has, and the setting with its other value.
OTHERWISE: dict[str, list[tuple[dict[str, Any], str, Any]]] = {
    "WithItems": [({}, "items", JPQ), ({}, "width", 16)],
    "RankerSettings": [
        ({}, "width", 16),
        ({}, "hidden", [8]), ({}, "dropout", 0.3), ({}, "max_history", 5), ({}, "learning_rate", 1e-3), ({}, "weight_decay", 0.5),
        ({}, "weight_average", 0), ({}, "batch_size", 32), ({}, "item_start", "random"), ({}, "listwise", 0.5),
        ({"listwise": 0.5}, "sampled_candidates", 3),
    ],
    "DINSettings": [({}, "attention_hidden", [16]), ({}, "attention_weights", "softmax"), ({}, "attention_init", "similarity")],
    "SAMSettings": [
        ({}, "passes", 2), ({}, "attention_hidden", 4), ({}, "compression", 4), ({}, "feedback", False), ({}, "enhancement", 1),
        ({}, "attention_weights", "scaled_sigmoid"), ({}, "read_scale", "mean"), ({}, "attention_init", "zero"),
    ],
    "IFASettings": [
        ({}, "layers", 2), ({}, "heads", 2), ({}, "exact_heads", 2), ({}, "feature_map", "shares"), ({}, "features", 8), ({}, "prior_events", 3.0),
        ({}, "temperature", 2.0), ({}, "half_life_days", 2.0), ({}, "recent_events", 4), ({}, "relation", "linear"),
        ({}, "relation_dropout", 0.9), ({}, "listwise", 0.5),
    ],
    "DIENSettings": [({}, "attention_hidden", [8]), ({}, "max_history", 5)],
    "TwoStageSettings": [({"top_k": 4}, "top_k", 2), ({}, "heads", 2)],
    "SIMSettings": [({}, "search", "soft")],
    "ETASettings": [({"top_k": 2}, "bits", 4)],
    "SDIMSettings": [({}, "hashes", 4), ({}, "bits", 2)],
    "EncoderSettings": [
        ({}, "dropout", 0.5), ({}, "max_history", 5), ({}, "learning_rate", 1e-3), ({}, "weight_decay", 0.5), ({}, "weight_average", 0),
        ({}, "batch_size", 8), ({}, "loss", "bce"), ({}, "loss", "gbce"), ({}, "loss", "sampled_softmax"), ({}, "loss", "lambdarank"),
        (GBCE, "negatives", 8), (GBCE | {"loss": "sampled_softmax"}, "negatives", 8), (GBCE, "gbce_t", 0.0), (GBCE, "gbce_prior", False),
    ],
    "TransformerSettings": [({}, "attention", BLOSSOM), ({}, "blocks", 1), ({}, "heads", 1)],
    "BERT4RecSettings": [({}, "max_history", 5), ({}, "mask_share", 0.6), ({"mask_share": 0.9}, "max_masked", 1)],
    "GRU4RecSettings": [({}, "layers", 2)],
    "FullAttentionSettings": [({}, "positions", "learned")],
    "BlossomSettings": [
        ({}, name, value)
        for name, value in {"kv_heads": 2, "window": 4, "block": 4, "compression": 4, "stride": 1, "selected": 2, "selector": "compressed"}.items()
    ],
    "RecJPQItemsSettings": [
        ({}, "splits", 4), ({}, "codes", 8), ({}, "assignment", "random"), ({}, "composition", "sum"), ({}, "binary", True),
    ],
}  # fmt: skip
OF = {"WithItems": "DINSettings", "RankerSettings": "DINSettings", "EncoderSettings": "SASRecSettings", "TransformerSettings": "SASRecSettings"}
OF |= {
    "TwoStageSettings": "TWINSettings",
    "FullAttentionSettings": "SASRecSettings",
    "BlossomSettings": "SASRecSettings",
    "RecJPQItemsSettings": "DINSettings",
}
SLOTS = {"FullAttentionSettings": ("attention", {"kind": "full"}), "BlossomSettings": ("attention", BLOSSOM), "RecJPQItemsSettings": ("items", JPQ)}
UNTRIED = {"kind", "stage", "max_epochs", "patience"}  # which model it is, and when it stops (tests/test_training.py)
CASES = [(name, others, setting, value) for name, cases in OTHERWISE.items() for others, setting, value in cases]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], list[torch.Tensor]]:
    """The weights that settings give, from a small log; trained once for all cases that ask for them."""
    place = tmp_path_factory.mktemp("small")
    features = FeatureSet.open(toy_features(toy_tables(place / "tables", users=16, items=40), place / "features"))

    @functools.cache
    def weights(settings: str) -> list[torch.Tensor]:
        return list(train(features, MODEL.validate_json(settings), "one", CPU, data="d").module.state_dict().values())

    return lambda settings: weights(settings.model_dump_json())


def shapes(settings: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in build_model(settings, SIZES).state_dict().items()}


def test_every_setting_has_a_line() -> None:
    """A new setting gets one, or this fails."""
    classes = {base for kind in RANKERS_AND_ENCODERS for base in kind.__mro__ if base.__module__.startswith("longtrail.config.")}
    classes |= {FullAttentionSettings, BlossomSettings, RecJPQItemsSettings}
    own = {cls.__name__: set(cls.__annotations__) - UNTRIED for cls in classes if set(cls.__annotations__) - UNTRIED}
    untried = sorted(f"{name}.{setting}" for name in own for setting in own[name] - {setting for _, setting, _ in OTHERWISE.get(name, [])})
    assert not untried, f"{untried}: expected a line in OTHERWISE, with another value than the default"
    assert own == {name: {setting for _, setting, _ in cases} for name, cases in OTHERWISE.items()}


@pytest.mark.parametrize(("name", "others", "setting", "value"), CASES, ids=lambda part: str(part)[:40])
def test_a_setting_changes_what_is_learnt(name: str, others: Any, setting: str, value: Any, learnt: Any) -> None:
    cls = getattr(config, OF.get(name, name))
    common = RANKER if cls.model_fields["stage"].default == "ranking" else ENCODER
    slot, given = SLOTS.get(name, ("", {}))
    before = common | ({slot: given | others} if slot else others)
    after = before | ({slot: given | others | {setting: value}} if slot else {setting: value})
    one, other = cls(**before), cls(**after)
    if shapes(one) == shapes(other):  # else they are not the same model to begin with
        assert any(not torch.equal(here, there) for here, there in zip(learnt(one), learnt(other), strict=True))
