"""Recommend, rank, take events: what the endpoints do, without BentoML. The engine finds the user and the arm, and puts parts together:

lists.PopularLists      what is shown without a user, or where a part is unavailable
personal.PersonalLists  history, candidates, one pass of the arm's ranker, its policy's draw
intake.Intake           events
"""

import uuid
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray

from serving.answer_log import LoggedAnswer
from serving.arms import Arm
from serving.artifacts import Artifacts
from serving.clock import now
from serving.errors import RequestError, Unavailable
from serving.evidence import Sampler, build_name
from serving.intake import Intake, Listener
from serving.lists import FALLBACK_ARM, UNKNOWN_USER, PopularLists, Shown
from serving.parity import ELSEWHERE, FILE, check_parity
from serving.personal import Online, PersonalLists, Timer
from serving.policies import Best, Chance, Exploring
from serving.schemas import Answer, EventsAnswer, EventsRequest, RankRequest, RecommendRequest, ShownItem
from serving.scoring import Scorer
from serving.state import State
from serving.users import Users

Ints = NDArray[np.int64]


class Engine:
    """Thread-safe. One process serves a state folder; requests of many threads may run at once, events are taken one batch after another."""

    def __init__(
        self,
        artifacts: Artifacts,
        state: State,
        online: Online,
        *,
        timer: Timer | None = None,
        seed: int | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        """`timer(stage)` is entered around each stage of a request; `seed` makes exploration repeatable (tests); `listeners`: serving.intake."""
        self._artifacts = artifacts
        self._state = state
        self._timer = timer or (lambda stage: nullcontext())
        self._settings = artifacts.settings
        self._catalogue = artifacts.catalogue
        self.users = Users(artifacts.users, state)
        self.scorer = Scorer(
            retriever=artifacts.retriever,
            ranker=artifacts.ranker,
            catalogue=artifacts.catalogue,
            prior_click_rate=artifacts.manifest.prior_click_rate,
            index=artifacts.index,
        )
        temperature = self._settings.explore_temperature
        policy = Exploring(temperature) if temperature > 0 else Best()
        self._arm = Arm(name=artifacts.manifest.arm, model=artifacts.manifest.ranker, scorer=self.scorer, policy=policy)
        self.popular = PopularLists(artifacts.catalogue, artifacts.manifest.prior_click_rate)
        self.personal = PersonalLists(online, self._timer, Chance(seed), retrieve=self._settings.retrieve)
        self._evidence = Sampler(self._settings.evidence, build_name(artifacts.folder))
        self.intake = Intake(
            users=self.users,
            catalogue=artifacts.catalogue,
            actions=artifacts.manifest.actions,
            state=state,
            online=online,
            timer=self._timer,
            max_events=self._settings.max_events,
            listeners=listeners,
        )

    def warm_up(self) -> float:
        """Repeat the offline scores, then run whole requests, unlogged. Returns the largest difference; raises ModelError beyond tolerance."""
        difference = check_parity(self.scorer, self._artifacts.folder / FILE, ELSEWHERE)
        for _ in range(3):
            self.personal.shown(self._arm, self.users.any(), None, places=10)
        return difference

    def recommend(self, request: RecommendRequest) -> Answer:
        """The k best of the candidates, or of the whole catalogue less what the user has seen. Raises RequestError."""
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

    def _list(self, user_key: str, candidates: Ints | None, places: int) -> Answer:
        """A personal list where the user is known and everything it needs answers, else a flagged popular one."""
        arm, user = self._arm, self.users.get(user_key)
        if user is None:
            return self._answer(user_key, arm, self.popular.fallback(UNKNOWN_USER, candidates, places))
        try:
            shown = self.personal.shown(arm, user, candidates, places)
        except Unavailable as error:
            shown = self.popular.fallback(error.reason, candidates, places)
        return self._answer(user_key, arm, shown)

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
                    propensities=shown.propensities.tolist(),
                    candidates=[keys[item] for item in shown.candidates.tolist()],
                    evidence=self._evidence.entry(answer.request_id, shown.evidence),
                )
            )
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
