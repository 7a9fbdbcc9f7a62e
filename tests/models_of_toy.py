"""Small model folders for tests of what comes after training: popularity models, and untrained networks with a fixed seed."""

from pathlib import Path
from typing import Any

import torch

from longtrail.config import DINSettings, PopularityRankerSettings, PopularityRetrieverSettings, SASRecSettings
from longtrail.examples import FeatureSet
from longtrail.models.contracts import Sizes
from longtrail.models.registry import build_model
from longtrail.models.store import LoadedModel, ModelCard, save_model

SETTINGS: dict[str, Any] = {
    "popular_items": PopularityRetrieverSettings(),
    "sasrec": SASRecSettings(width=8, blocks=1, heads=1, max_history=12),
    "popularity": PopularityRankerSettings(),
    "din": DINSettings(width=4, hidden=(8,), max_history=12),
}


def toy_model(features: FeatureSet, name: str, *, items: int | None = None) -> LoadedModel:
    """`items` makes a model of an older, smaller catalogue."""
    sizes = features.sizes if items is None else Sizes(items=items, categories=features.sizes.categories, actions=features.sizes.actions)
    torch.manual_seed(0)
    module = build_model(SETTINGS[name], sizes)
    if hasattr(module, "fit"):
        rows = slice(0, sizes.items + 1)
        catalogue = features.catalogue
        module.fit(
            events=catalogue.train_events[rows],
            impressions=catalogue.train_impressions[rows],
            clicks=catalogue.train_clicks[rows],
            prior_click_rate=features.prior_click_rate,
        )
    card = ModelCard(name=name, settings=SETTINGS[name], sizes=sizes, actions=features.actions, prior_click_rate=features.prior_click_rate)
    return LoadedModel(module=module.eval(), card=card)


def save_toy_model(folder: Path, model: LoadedModel) -> Path:
    save_model(folder, model.module, model.card, {"features": "f" * 64, "code": None, "params": "p" * 64})
    return folder
