"""Histories in lists, IFA rankers and recomputed states: what tests of user states share."""

import copy
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from features.kept import Kept
from features.online import OnlineFeatures
from longtrail.catalogue import Catalogue
from longtrail.config import IFASettings, PopularityRetrieverSettings
from longtrail.examples import FeatureSet, history_tensors
from longtrail.history import HistoryArrays
from longtrail.models.registry import build_model
from longtrail.models.store import LoadedModel, ModelCard
from serving.scoring import Scorer
from serving.user_read import UserRead
from tests.serving.bento import Outputs

NOW = 1_800_000_000_000_000  # µs
RECENT = 16  # fewer than the histories here are long


@pytest.fixture(autouse=True)
def few_newest_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are told of, and so requests by state read, the newest RECENT events: histories of 40 are then longer than that."""
    monkeypatch.setattr("longtrail.models.embedding.RECENT_EVENTS", RECENT)


class Plain:
    """Histories in lists: what the states are held to."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.events: dict[int, list[tuple[int, int, int]]] = {}
        self._lock = threading.Lock()

    def append(self, users: Any, *columns: Any) -> np.ndarray:
        """The history_length of each user right after the event."""
        with self._lock:
            places = []
            for user, *event in zip(users.tolist(), *(column.tolist() for column in columns), strict=True):
                self.events.setdefault(user, []).append(tuple(event))
                places.append(len(self.events[user]))
            return np.array(places)

    def read(self, users: Any, max_length: int) -> Any:
        with self._lock:
            rows = [list(self.events.get(int(user), ())) for user in users]
        kept = [row[-min(self.length, max_length) :] if max_length else [] for row in rows]
        return SimpleNamespace(history=arrays(kept), totals_B=np.array([len(row) for row in rows]))


def arrays(rows: list[list[tuple[int, int, int]]]) -> HistoryArrays:
    lengths = np.array([len(row) for row in rows])
    values = np.zeros((3, len(rows), max(1, lengths.max(initial=0))), np.int64)
    for b, row in enumerate(rows):
        if row:
            values[:, b, : len(row)] = np.array(row).T
    return HistoryArrays(items_BL=values[0], actions_BL=values[1], times_BL=values[2], lengths_B=lengths)


def ifa(features: FeatureSet, seed: int = 0, **settings: Any) -> LoadedModel:
    settings = {"width": 4, "heads": 2, "features": 4, "hidden": (8,), "max_history": 60, "recent_events": 5, "relation": "none"} | settings
    chosen = IFASettings(**settings)
    torch.manual_seed(seed)
    module = build_model(chosen, features.sizes).eval()
    card = ModelCard(name="ifa", settings=chosen, sizes=features.sizes, actions=features.actions, prior_click_rate=features.prior_click_rate)
    return LoadedModel(module=module, card=card)


@pytest.fixture(scope="module")
def features(packaged: Outputs) -> FeatureSet:
    return FeatureSet.open(packaged.features)


@pytest.fixture
def scorer(features: FeatureSet) -> Callable[..., Scorer]:
    def make(**settings: Any) -> Scorer:
        module = build_model(PopularityRetrieverSettings(), features.sizes)
        counts = features.catalogue
        module.fit(  # type: ignore[operator]
            events=counts.train_events, impressions=counts.train_impressions, clicks=counts.train_clicks, prior_click_rate=features.prior_click_rate
        )
        card = ModelCard(name="popular", settings=PopularityRetrieverSettings(), sizes=features.sizes, actions=features.actions, prior_click_rate=0.1)
        return Scorer(
            retriever=LoadedModel(module=module, card=card), ranker=ifa(features, **settings), catalogue=features.catalogue, prior_click_rate=0.1
        )

    return make


def scores(scorer: Scorer, read: UserRead) -> np.ndarray:
    items_1C = np.arange(1, 40)[None]
    return scorer.logits(read.history, read.totals_1, read.statistics, items_1C, scorer.item_statistics(items_1C), np.array([NOW]), state=read.state)


def whole(scorer: Scorer, online: OnlineFeatures, user: int) -> np.ndarray:
    """Scores by the history, as offline."""
    read = online.read([user], scorer.ranker_history)
    return scores(scorer, UserRead(history=read.history, total=int(read.totals_B[0]), statistics=read.statistics, seen=None, state=None))


def flat_of(kept: Kept | None) -> np.ndarray:
    assert kept is not None
    return np.frombuffer(kept.content, "<f8")


def recomputed(model: LoadedModel, catalogue: Catalogue, history: HistoryArrays) -> np.ndarray:
    """[B, S] in float64 throughout."""
    with torch.inference_mode():
        return copy.deepcopy(model.module).double().state(history_tensors(history, catalogue)).flat(torch.float64).numpy()  # type: ignore[operator]


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    """Of one state: counts and times exactly, sums to `tolerance` of the largest: float32's rounding of a single event's features."""
    np.testing.assert_array_equal(found[:5], expected[:5])
    np.testing.assert_allclose(found[5:], expected[5:], rtol=0, atol=tolerance * np.abs(expected[5:]).max())
