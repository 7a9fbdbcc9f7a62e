"""Requests by user states: what is not to be used is made anew, and whatever fails, lists are those by the history."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from components.package_states import write_states
from features.kept import Kept, Write
from features.online import OnlineFeatures
from features.repository import FeatureStoreError
from longtrail.examples import FeatureSet
from longtrail.models.store import save_model
from serving.artifacts import ARTIFACTS, Artifacts
from serving.engine import Engine
from serving.packed_states import PackedStates
from serving.schemas import Event, EventsRequest, RankRequest
from serving.scoring import Scorer
from serving.state import State, StateSettings
from serving.user_read import read_user
from serving.user_states import UserStates, attach_states
from tests.serving.bento import Outputs
from tests.serving.states import NOW, RECENT, Plain, arrays, assert_close, flat_of, ifa, recomputed, scores, whole
from tests.serving.states import features as features
from tests.serving.states import few_newest_events as few_newest_events
from tests.serving.states import scorer as scorer


@pytest.mark.parametrize("spoilt", ["gone", "short", "not finite", "ahead", "far behind"])
def test_a_state_that_is_not_to_be_used_is_made_anew(
    scorer: Callable[..., Scorer], features: FeatureSet, packaged: Outputs, tmp_path: Path, spoilt: str
) -> None:
    online, chosen, user = OnlineFeatures(packaged.features / "feast", state=tmp_path), scorer(), 9
    (states,) = attach_states([chosen], features.catalogue, online, tmp_path)
    states.refresh([user])
    store = online.kept(chosen.ranker.version())  # type: ignore[attr-defined]
    (kept,) = store.read([user])
    assert kept is not None
    changed = {
        "gone": None,
        "short": kept._replace(content=kept.content[:-8]),
        "not finite": kept._replace(content=np.full_like(flat_of(kept), np.nan).tobytes()),
        "ahead": kept._replace(events=50),
        "far behind": Kept(40 - RECENT - 1, kept.content),
    }[spoilt]
    store.remove([user])
    if changed is not None:
        store.write([Write(user, None, changed)])
    expected = whole(chosen, online, user)
    for _ in range(2):
        read = read_user(online, chosen, user, retrieval=False)
        assert read.state is not None
        if spoilt != "far behind":  # that one lies about what it holds, and only a recomputation could tell
            np.testing.assert_allclose(scores(chosen, read), expected, rtol=0, atol=1e-5)
    if spoilt != "far behind":
        assert_close(flat_of(store.read([user])[0]), flat_of(kept))
    assert store.read([user])[0].events == 40  # type: ignore[union-attr]


def test_a_store_that_fails_costs_nothing_but_time(scorer: Callable[..., Scorer], features: FeatureSet, packaged: Outputs, tmp_path: Path) -> None:
    online, chosen = OnlineFeatures(packaged.features / "feast", state=tmp_path), scorer()
    (states,) = attach_states([chosen], features.catalogue, online, tmp_path)
    noted: list[str] = []
    states.note = noted.append

    def fail(*_: Any) -> Any:
        raise FeatureStoreError("disk is full")

    working, states._store = states._store, SimpleNamespace(read=fail, write=fail, remove=fail, forget_others=fail)
    expected = whole(chosen, online, 3)
    for store in (states._store, SimpleNamespace(read=working.read, write=fail, remove=fail, forget_others=fail)):
        states._store = store
        np.testing.assert_allclose(scores(chosen, read_user(online, chosen, 3, retrieval=False)), expected, rtol=0, atol=1e-5)
        one = np.ones(1, np.int64)
        states.on_events(3 * one, one, one, NOW * one, np.array([1]))
    assert noted.count("failed") >= 3 and "rebuilt" not in noted


def test_the_engine_serves_from_states_that_its_events_change(features: FeatureSet, packaged: Outputs, tmp_path: Path) -> None:
    artifacts = Artifacts.open(packaged.bento / "src" / ARTIFACTS)
    model = ifa(features, max_history=500)
    settings = artifacts.settings.model_copy(update={"explore_temperature": 0.0})
    changed = replace(artifacts, ranker=model, settings=settings)
    online = OnlineFeatures(artifacts.snapshot, state=tmp_path / "online")
    engine = Engine(changed, State(StateSettings(folder=tmp_path), "f" * 64), online)
    store = online.kept(model.module.version())  # type: ignore[operator]
    keys = list(artifacts.catalogue.keys[1:40])
    try:
        engine.rank(RankRequest(user_id="u0007", candidates=keys))
        number = engine.users["u0007"]
        assert store.read([number])[0].events == 40  # type: ignore[union-attr]
        for round_ in range(3):
            events = [Event(user_id=user, item_id=key, action="view") for user in ("u0007", "somebody") for key in keys[round_ : round_ + 3]]
            engine.take_events(EventsRequest(events=events[:5]))
        users = [number, engine.users["somebody"]]
        assert [kept.events for kept in store.read(users) if kept is not None] == [49, 6]
        expected = recomputed(model, features.catalogue, online.read(users, 1_000).history)
        for kept, row in zip(store.read(users), expected, strict=True):
            assert_close(flat_of(kept), row)
        scored = {item.item_id: item.score for item in engine.rank(RankRequest(user_id="u0007", candidates=keys)).items}
        by_history = 1 / (1 + np.exp(-whole(engine.scorer, online, number)[0]))
        np.testing.assert_allclose([scored[artifacts.catalogue.keys[item]] for item in range(1, 40)], by_history, atol=1e-5)
    finally:
        engine.close()


def test_rankers_without_states_keep_none(scorer: Callable[..., Scorer], features: FeatureSet, packaged: Outputs, tmp_path: Path) -> None:
    online = OnlineFeatures(packaged.features / "feast", state=tmp_path / "online")
    exact = scorer(feature_map="softmax")
    assert attach_states([exact], features.catalogue, online, tmp_path) == [] and exact.states is None
    assert read_user(online, exact, 3, retrieval=False).state is None
    assert not list(tmp_path.rglob("*.states.sqlite"))


def test_histories_longer_than_the_store_keeps_come_with_the_bento(features: FeatureSet, packaged: Outputs, tmp_path: Path) -> None:
    """The store keeps 12 of 40 events; the states of all 40, and of more, are those of the whole history."""
    model = ifa(features, max_history=1_000_000)
    for name, ranker in (("ifa", model), ("exact", ifa(features, feature_map="softmax", max_history=1_000))):
        save_model(tmp_path / name, ranker.module, ranker.card, {})
    for name, length in (("ifa", 1_000_000), ("ifa", 40), ("exact", 9)):
        assert write_states(tmp_path / "none", [tmp_path / name], packaged.features, online_history_length=length) == 0
    assert not (tmp_path / "none").exists()
    assert write_states(tmp_path / "states", [tmp_path / "ifa"] * 2, packaged.features, online_history_length=12) == 60
    version = model.module.version()  # type: ignore[operator]
    packed = PackedStates.find(tmp_path, version)
    assert packed is not None and PackedStates.find(tmp_path, "0" * 16) is None and packed.of(61) == [] == packed.of(0)
    plain = Plain(12)
    users = np.arange(1, 61)
    stored = features.history.gather(users, features.history.lengths(users), 100)
    for b, user in enumerate(users.tolist()):
        for column in range(40):
            plain.append(np.array([user]), stored.items_BL[b, [column]], stored.actions_BL[b, [column]], stored.times_BL[b, [column]])
    online = OnlineFeatures(packaged.features / "feast", state=tmp_path / "online")
    states = UserStates(model, features.catalogue, online.kept(version), plain, packed=packed)
    one = np.ones(1, np.int64)
    for user, more in ((1, 0), (2, 1), (3, 12)):
        for _ in range(more):
            plain.append(user * one, 5 * one, one, NOW * one)
        read = plain.read([user], 1_000_000)
        state = states.state(user, states.read(user), read)
        assert state is not None and int(state.events_B) == 40 + more
        states.on_events(user * one, 6 * one, one, NOW * one, plain.append(user * one, 6 * one, one, NOW * one))
    states.refresh(users.tolist())
    expected = recomputed(model, features.catalogue, arrays([plain.events[user] for user in users.tolist()]))
    for kept, row in zip(online.kept(version).read(users.tolist()), expected, strict=True):
        assert_close(flat_of(kept), row)
    for _ in range(13):  # more than the store keeps came while nobody counted them: the best there is are those it keeps
        plain.append(60 * one, 5 * one, one, NOW * one)
    online.kept(version).remove([60])
    state = states.state(60, None, plain.read([60], 1_000_000))
    assert state is not None and int(state.events_B) == 12
