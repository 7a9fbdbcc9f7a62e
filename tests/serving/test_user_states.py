"""IFA's states beside the histories: equal to a recomputation whatever comes when, and scores from them equal to scores from the history."""

import copy
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
import yaml

from components.package_states import write_states
from features.kept import Kept, Write
from features.online import OnlineFeatures
from features.repository import FeatureStoreError, apply, materialise
from longtrail.catalogue import Catalogue
from longtrail.config import IFASettings, PopularityRetrieverSettings
from longtrail.examples import FeatureSet, history_tensors
from longtrail.history import HistoryArrays
from longtrail.models.registry import build_model
from longtrail.models.store import LoadedModel, ModelCard, save_model
from serving.artifacts import ARTIFACTS, Artifacts
from serving.engine import Engine
from serving.packed_states import PackedStates
from serving.schemas import Event, EventsRequest, RankRequest
from serving.scoring import Scorer
from serving.state import State, StateSettings
from serving.user_read import UserRead, read_user
from serving.user_states import RECENT, Rebuild, UserStates, attach_states
from tests.serving.bento import Outputs

USERS = 300
NOW = 1_800_000_000_000_000  # µs
NO_STOP = threading.Event()


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


@pytest.fixture(scope="module")
def on_redis(packaged: Outputs, redis_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features' Feast repository with Redis in the place of SQLite."""
    feast = tmp_path_factory.mktemp("redis") / "feast"
    shutil.copytree(packaged.features / "feast", feast)
    config = yaml.safe_load((feast / "feature_store.yaml").read_text())
    config["online_store"] = {"type": "redis", "connection_string": redis_address}
    (feast / "feature_store.yaml").write_text(yaml.safe_dump(config))
    apply(feast, 1_000)
    materialise(feast)
    return feast


@pytest.fixture(params=["sqlite", "redis"])
def online(request: pytest.FixtureRequest, packaged: Outputs, tmp_path: Path) -> OnlineFeatures:
    if request.param == "redis":
        return OnlineFeatures(request.getfixturevalue("on_redis"))
    return OnlineFeatures(packaged.features / "feast", state=tmp_path / "online")


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


# ---------------------------------------------------------------- events


def test_states_equal_a_recomputation_whatever_comes_when(features: FeatureSet, online: OnlineFeatures) -> None:
    """10^5 events of 300 users, of any times, in batches that three threads hand over out of order; one batch in thirty is never handed over (the
    service died in between). Meanwhile another process rebuilds. No event may be lost, none may count twice."""
    rng = np.random.default_rng(5)
    half_life = 20.0 if online._redis else None
    model, plain, store = ifa(features, half_life_days=half_life, max_history=10_000), Plain(20_000), online.kept(uuid4().hex)
    states, elsewhere = (UserStates(model, features.catalogue, store, plain) for _ in range(2))
    batches = []
    left = 100_000
    while left:
        many = min(left, int(rng.integers(1, 2_000)))
        left -= many
        users = np.minimum(rng.geometric(0.008, many), USERS)
        batches.append((users, rng.integers(1, 120, many), rng.integers(1, 3, many), NOW - rng.integers(0, 10**13, many)))
    handed = iter(batches)
    lock, stop, errors = threading.Lock(), threading.Event(), []

    def take(seed: int) -> None:
        random, held = np.random.default_rng(seed), []
        try:
            while True:
                with lock:
                    batch = next(handed, None)
                if batch is None:
                    break
                held.append((*batch, plain.append(*batch)))
                if random.random() < 1 / 30:
                    held.pop()
                elif random.random() < 0.7:  # else after the next one
                    while held:
                        states.on_events(*held.pop())
            for late in held:
                states.on_events(*late)
        except BaseException as error:
            errors.append(error)

    def rebuild() -> None:
        while not stop.is_set():
            elsewhere.rebuild(range(1, USERS + 1), stop)

    threads = [threading.Thread(target=take, args=(seed,)) for seed in range(3)]
    rebuilding = threading.Thread(target=rebuild)
    for thread in (*threads, rebuilding):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    rebuilding.join()
    assert not errors
    everybody = sorted(plain.events)
    before = [kept.events for kept in store.read(everybody) if kept is not None]
    assert len(before) > 0.9 * len(everybody), "events or the rebuild made most"
    assert all(kept.events <= len(plain.events[user]) for user, kept in zip(everybody, store.read(everybody), strict=True) if kept is not None)
    states.rebuild(everybody, NO_STOP)
    assert sum(len(events) for events in plain.events.values()) == 100_000
    expected = recomputed(model, features.catalogue, arrays([plain.events[user] for user in everybody]))
    for user, kept, row in zip(everybody, store.read(everybody), expected, strict=True):
        assert kept is not None and kept.events == len(plain.events[user]) == row[0]
        assert_close(flat_of(kept), row)


def test_an_event_brings_a_state_on_without_the_history(features: FeatureSet, packaged: Outputs, tmp_path: Path) -> None:
    model, plain = ifa(features), Plain(1_000)
    online = OnlineFeatures(packaged.features / "feast", state=tmp_path)
    states = UserStates(model, features.catalogue, online.kept("a"), plain)
    one = np.ones(1, np.int64)
    asked: list[Any] = []
    read = plain.read
    plain.read = lambda users, max_length: asked.append(users) or read(users, max_length)  # type: ignore[method-assign, func-returns-value, assignment]
    for place in range(1, 61):
        states.on_events(4 * one, place * one, one, NOW * one, plain.append(4 * one, place * one, one, NOW * one))
    assert not asked
    (kept,) = online.kept("a").read([4])
    assert_close(flat_of(kept), recomputed(model, features.catalogue, arrays([plain.events[4]]))[0])
    states.on_events(4 * one, one, one, NOW * one, np.array([60]))  # again
    states.on_events(4 * one, one, one, NOW * one, np.array([0]))  # what the history had before
    assert online.kept("a").read([4]) == [kept]
    states.on_events(4 * one, one, one, NOW * one, np.array([61]))  # more than the ranker reads: a state would be another history's
    states.on_events(9 * one, one, one, NOW * one, np.array([7]))  # nobody has seen the six before
    assert online.kept("a").read([4, 9]) == [kept, None]


# ---------------------------------------------------------------- requests


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


_fresh = iter(range(700_000, 900_000, 10))  # Redis is shared


def test_scores_by_state_are_scores_by_history(scorer: Callable[..., Scorer], features: FeatureSet, online: OnlineFeatures, tmp_path: Path) -> None:
    """New users' histories grow from nothing to beyond what the ranker reads, by batches that reach the states or do not."""
    chosen = scorer(seed=next(_fresh))
    (states,) = attach_states([chosen, chosen], features.catalogue, online, tmp_path)
    assert chosen.states is states
    rng = np.random.default_rng(1)
    users = next(_fresh) + np.arange(4)
    by_state = by_history = 0
    for _ in range(30):
        for user in users.tolist():
            read = read_user(online, chosen, user, retrieval=bool(rng.integers(2)))
            np.testing.assert_allclose(scores(chosen, read), whole(chosen, online, user), rtol=0, atol=1e-5)
            if read.state is not None:
                by_state += 1
                assert int(read.state.events_B) == read.total <= 60
            else:
                by_history += 1
                assert read.total == 0 or read.total > 60
        many = int(rng.integers(1, 20))
        batch: Any = [rng.choice(users, many), rng.integers(1, 120, many), rng.integers(1, 3, many), NOW - rng.integers(0, 10**13, many)]
        places = online.append_events(*batch)
        if rng.random() < 0.6:
            states.on_events(*batch, places)  # type: ignore[call-arg]
    assert by_state > 40 and by_history > 10
    assert read_user(online, chosen, 4_000_000, retrieval=True).total == 0


def test_a_request_reads_no_more_than_the_newest_events(
    scorer: Callable[..., Scorer], features: FeatureSet, online: OnlineFeatures, tmp_path: Path
) -> None:
    chosen = scorer(seed=next(_fresh))
    attach_states([chosen], features.catalogue, online, tmp_path)
    first, again = (read_user(online, chosen, 7, retrieval=False) for _ in range(2))
    assert first.history.lengths_B.tolist() == [40] and again.history.lengths_B.tolist() == [RECENT]
    assert again.state is not None and int(again.state.events_B) == 40 and again.total == 40
    more = read_user(online, chosen, 7, retrieval=True)
    assert more.seen is not None and len(more.seen) == 40
    np.testing.assert_allclose(scores(chosen, again), scores(chosen, first), rtol=0, atol=1e-6)


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


# ---------------------------------------------------------------- models


def test_another_model_has_states_of_its_own_which_are_rebuilt(
    scorer: Callable[..., Scorer], features: FeatureSet, online: OnlineFeatures, tmp_path: Path
) -> None:
    old, new = scorer(seed=next(_fresh)), scorer(seed=next(_fresh))
    old_states, new_states = attach_states([old, new], features.catalogue, online, tmp_path)
    users = list(range(1, 61))
    for states in (old_states, new_states):
        rebuild = Rebuild([states], lambda: users)
        rebuild.start()
        rebuild._thread.join(30)
        rebuild.close()
    histories = online.read(users, 1_000).history
    for scorer_ in (old, new):
        expected = recomputed(scorer_.model, features.catalogue, histories)
        for kept, row in zip(online.kept(scorer_.ranker.version()).read(users), expected, strict=True):  # type: ignore[attr-defined]
            assert_close(flat_of(kept), row)
    assert old_states.refresh(users) == 0 == new_states.refresh(users), "all current"


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


def test_one_state_follows_a_hundred_thousand_single_updates(features: FeatureSet) -> None:
    """What rounding leaves: float64 sums stay within one event's float32 rounding, where float32 sums drift."""
    model = ifa(features, max_history=1_000_000)
    rng = np.random.default_rng(2)
    many = 20_000
    history = arrays([list(zip(rng.integers(1, 120, many).tolist(), rng.integers(1, 3, many).tolist(), [NOW] * many, strict=True))])
    with torch.inference_mode():
        ranker: Any = model.module
        events = history_tensors(
            HistoryArrays(
                items_BL=history.items_BL.T, actions_BL=history.actions_BL.T, times_BL=history.times_BL.T, lengths_B=np.ones(many, np.int64)
            ),
            features.catalogue,
        )
        singles = ranker.state(events)
        drift = {}
        for dtype in (torch.float32, torch.float64):
            sums = torch.zeros_like(singles.sums_BGFE[0], dtype=dtype)
            for row in singles.sums_BGFE:
                sums += row
            drift[dtype] = sums.double().numpy()
    truth = recomputed(model, features.catalogue, history)[0, 5 : 5 + drift[torch.float64].size]
    errors = {dtype: np.abs(sums.ravel() - truth).max() / np.abs(truth).max() for dtype, sums in drift.items()}
    assert errors[torch.float64] < 1e-7 < errors[torch.float32] < 1e-4, errors
