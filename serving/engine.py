"""Recommend, rank, take events: what the endpoints do, without BentoML. The engine finds the user and the arm, and puts parts together:

lists.PopularLists      what is shown without a user, or where a part is unavailable
personal.PersonalLists  history, candidates, one pass of the arm's ranker, its policy's draw
intake.Intake           events
"""

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.answer_log import LoggedAnswer
from serving.applying import Store
from serving.arms import Arm, Arms, load_arms
from serving.artifacts import Artifacts
from serving.clock import now
from serving.errors import RequestError, Unavailable
from serving.event_records import LoggedEvent
from serving.evidence import Sampler, build_name
from serving.experiment import Observer, open_experiment
from serving.intake import Intake, Listener
from serving.lists import FALLBACK_ARM, UNKNOWN_USER, PopularLists, Shown
from serving.parity import ELSEWHERE, check_parity
from serving.personal import Online, PersonalLists, Timer
from serving.policies import Best, Chance
from serving.schemas import Answer, EventsAnswer, EventsRequest, RankRequest, RecommendRequest, ShownItem
from serving.scoring import Scorer
from serving.shadow import Asked
from serving.state import State
from serving.user_states import Rebuild, attach_states
from serving.users import Users

Ints = NDArray[np.int64]

ARM_FAILED = "arm failed"  # why a list is not personal: the arm's model raised something
logger = logging.getLogger("longtrail.engine")


class OnlineStore(Online, Store, Protocol):
    """What lists read and events change."""


class Engine:
    """Thread-safe. One process serves a state folder; requests of many threads may run at once, events are taken one batch after another."""

    def __init__(
        self,
        artifacts: Artifacts,
        state: State,
        online: OnlineStore,
        *,
        timer: Timer | None = None,
        seed: int | None = None,
        listeners: Sequence[Listener] = (),
        arms: Arms | None = None,
        observer: Observer | None = None,
    ) -> None:
        """`timer(stage)` is entered around each stage of a request; `seed` makes exploration repeatable (tests); `listeners`: serving.intake.

        `arms` are those of `artifacts`, where they are loaded already; `observer` hears of the canary and the shadow.
        Raises StateError where the state folder is damaged.
        """
        self._artifacts = artifacts
        self._state = state
        self._timer = timer or (lambda stage: nullcontext())
        self._settings = artifacts.settings
        self._catalogue = artifacts.catalogue
        self.users = Users(artifacts.users, state)
        loaded = arms or load_arms(artifacts)
        self.arms = loaded.all
        # Called with (request_id, user_key, Shown) after each list, and with the events just logged; they must not wait.
        self.on_list: list[Callable[[str, str, Shown], None]] = []
        self.on_logged: list[Callable[[Sequence[LoggedEvent]], None]] = []
        self.experiment = open_experiment(artifacts, loaded, state.folder, online, observer)
        if self.experiment.canary is not None:
            self.on_logged.append(self.experiment.canary.on_logged)
        self.states = attach_states([arm.scorer for arm in self.arms], artifacts.catalogue, online, artifacts.folder)
        self._rebuild = Rebuild(self.states, self.users.ids)
        self.popular = PopularLists(artifacts.catalogue, artifacts.manifest.prior_click_rate)
        self.personal = PersonalLists(online, self._timer, Chance(seed), retrieve=self._settings.retrieve)
        self._evidence = Sampler(self._settings.evidence, build_name(artifacts.folder))
        self.intake = Intake(
            users=self.users,
            catalogue=artifacts.catalogue,
            actions=artifacts.manifest.actions,
            log=state.events,
            online=online,
            timer=self._timer,
            max_events=self._settings.max_events,
            max_backlog=self._settings.event_log.max_backlog,
            apply_seconds=self._settings.event_log.apply_seconds,
            listeners=[*listeners, *(states.on_events for states in self.states)],
            on_logged=self._events_logged,
        )

    def warm_up(self) -> float:
        """Repeat the offline scores, run whole requests, unlogged, and start what works in the background.

        Returns the largest difference of a score; raises ModelError beyond tolerance.
        """
        scorers = {arm.model: arm.scorer for arm in self.arms}
        files = self._artifacts.parity_files()
        difference = max(check_parity(scorer, files[model], ELSEWHERE) for model, scorer in scorers.items())
        for arm in self.arms:
            for _ in range(3):
                self.personal.shown(arm, self.users.any(), None, places=10)
        self.experiment.start()
        self._rebuild.start()
        return difference

    def release(self) -> None:
        """Stop everything that changes shared state: events are refused from here on. Lists are answered, and logged, until `close`."""
        self.intake.close()
        self._rebuild.close()
        self.experiment.release()

    def close(self) -> None:
        """Also the answer log. Nothing may be asked afterwards."""
        self.release()
        self._state.answers.close()

    @property
    def scorer(self) -> Scorer:
        """Of the first arm."""
        return self.arms[0].scorer

    def recommend(self, request: RecommendRequest) -> Answer:
        """The k best of the candidates, or of the whole catalogue (`retrieval.exclude_seen`: less what the user has seen). Raises RequestError."""
        if request.k > self._settings.max_k:
            raise RequestError("k", f"{request.k} items; expected at most {self._settings.max_k}")
        candidates = None if request.candidates is None else self._items(request.candidates)
        return self._list(request.user_id, candidates, request.k)

    def rank(self, request: RankRequest) -> Answer:
        """All the candidates, in order. Raises RequestError."""
        candidates = self._items(request.candidates)
        return self._list(request.user_id, candidates, len(candidates))

    def take_events(self, request: EventsRequest) -> EventsAnswer:
        """See serving.intake. Raises RequestError."""
        return self.intake.take(request)

    def _events_logged(self, events: Sequence[LoggedEvent]) -> None:
        for hear in self.on_logged:
            hear(events)

    def _list(self, user_key: str, candidates: Ints | None, places: int) -> Answer:
        """A personal list where the user is known and everything it needs answers, else a flagged popular one."""
        arm, user = self.experiment.arms.of(user_key), self.users.get(user_key)
        if user is None:
            return self._answer(user_key, arm, self.popular.fallback(UNKNOWN_USER, candidates, places))
        start = time.perf_counter()
        with self.experiment.working():
            try:
                shown = self.personal.shown(arm, user, candidates, places)
            except Unavailable as error:
                shown = self.popular.fallback(error.reason, candidates, places)
            except Exception:  # whatever an arm's model does, its users get a list
                logger.exception("arm %s failed", arm.name)
                shown = self.popular.fallback(ARM_FAILED, candidates, places)
            answer = self._answer(user_key, arm, shown)
        asked = Asked(request_id=answer.request_id, user_key=user_key, user=user, arm=arm.name, shown=shown)
        self.experiment.answered(asked, time.perf_counter() - start, self._catalogue.keys.__getitem__)
        return answer

    def _answer(self, user_key: str, arm: Arm, shown: Shown) -> Answer:
        keys, titles = self._catalogue.keys, self._catalogue.titles
        personal = shown.fallback is None
        columns = zip(shown.items.tolist(), shown.scores.tolist(), shown.propensities.tolist(), strict=True)
        answer = Answer(
            request_id=uuid.uuid4().hex,
            user_id=user_key,
            arm=arm.name if personal else FALLBACK_ARM,
            policy=arm.policy.name if personal else Best.name,
            model=arm.model if personal else None,
            retriever=self._artifacts.manifest.retriever if shown.retrieved else None,
            fallback=shown.fallback,
            items=[ShownItem(keys[item], place, score, propensity, titles[item]) for place, (item, score, propensity) in enumerate(columns, start=1)],
        )
        with self._timer("log"):
            self._state.answers.append(
                LoggedAnswer(
                    request_id=answer.request_id,
                    user=user_key,
                    timestamp=now(),
                    arm=answer.arm,
                    assigned=arm.name,
                    policy=answer.policy,
                    model=answer.model,
                    fallback=answer.fallback,
                    items=[keys[item] for item in shown.items.tolist()],
                    scores=shown.scores.tolist(),
                    propensities=shown.propensities.tolist(),
                    candidates=[keys[item] for item in shown.candidates.tolist()],
                    evidence=self._evidence.entry(answer.request_id, shown.evidence),
                )
            )
        for hear in self.on_list:
            hear(answer.request_id, user_key, shown)
        return answer

    def _items(self, keys: Sequence[str]) -> Ints:
        """Dense ids of candidate keys. Raises RequestError for too many, an unknown one, or one that stands twice."""
        if len(keys) > self._settings.max_candidates:
            raise RequestError("candidates", f"{len(keys)} items; expected at most {self._settings.max_candidates}")
        ids = [self._catalogue.id_of(key) for key in keys]
        if None in ids:
            place = ids.index(None)
            raise RequestError(f"candidates[{place}]", f"unknown item {keys[place]!r}; expected an item_id of the catalogue")
        if len(set(ids)) < len(ids):
            place = next(i for i, item in enumerate(ids) if ids.index(item) < i)
            raise RequestError(f"candidates[{place}]", f"{keys[place]!r} stands here for the second time; expected each item once")
        return np.array(ids, np.int64)
