"""IFA's states beside the histories: equal to a recomputation whatever comes when, and scores from them equal to scores from the history."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
import yaml

from features.online import OnlineFeatures
from features.repository import apply, materialise
from longtrail.examples import FeatureSet, history_tensors
from longtrail.history import HistoryArrays
from serving.scoring import Scorer
from serving.user_read import read_user
from serving.user_states import Rebuild, UserStates, attach_states
from tests.serving.bento import Outputs
from tests.serving.states import NOW, RECENT, Plain, arrays, assert_close, flat_of, ifa, recomputed, scores, whole
from tests.serving.states import features as features
from tests.serving.states import few_newest_events as few_newest_events
from tests.serving.states import scorer as scorer

USERS = 300
NO_STOP = threading.Event()


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


_fresh = iter(range(700_000, 900_000, 10))  # Redis is shared


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
