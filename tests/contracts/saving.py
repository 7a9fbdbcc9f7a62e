"""What every model must hold on disk."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from longtrail.files import hash_path
from longtrail.models.registry import build_model
from longtrail.models.store import ModelCard, load_model, save_model
from tests.contracts.batches import SIZES

ACTIONS = ("rated_1", "rated_2", "rated_3", "rated_4", "rated_5")


def card_of(settings: Any, name: str = "a model") -> ModelCard:
    return ModelCard(name=name, settings=settings, sizes=SIZES, actions=ACTIONS, prior_click_rate=0.3)


def assert_settings_survive(settings: Any) -> None:
    """Settings → JSON → settings is the identity, and the two build models with the same tensors."""
    again = type(settings).model_validate_json(settings.model_dump_json())
    assert again == settings
    shapes = [{name: tensor.shape for name, tensor in build_model(s, SIZES).state_dict().items()} for s in (settings, again)]
    assert shapes[0] == shapes[1]


def assert_saved_is_loaded(model: nn.Module, settings: Any, folder: Path) -> nn.Module:
    """Bit-equal tensors, equal card, eval mode; saved twice, the bytes are equal. The loaded model is returned."""
    save_model(folder, model, card_of(settings), {"features": "abc"})
    first = hash_path(folder)
    save_model(folder, model, card_of(settings), {"features": "abc"})
    assert hash_path(folder) == first
    loaded = load_model(folder)
    assert loaded.card == card_of(settings)
    assert not any(module.training for module in loaded.module.modules())
    held, found = model.state_dict(), loaded.module.state_dict()
    assert held.keys() == found.keys()
    assert all(torch.equal(held[name], found[name]) for name in held)
    return loaded.module
