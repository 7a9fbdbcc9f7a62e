"""A personal list: the user is read, candidates are retrieved, one pass of the arm's ranker scores them, its policy draws."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.arms import Arm
from serving.clock import now
from serving.evidence import Evidence
from serving.lists import Shown
from serving.policies import Chance
from serving.user_read import Read, read_user

Ints = NDArray[np.int64]
Timer = Callable[[str], AbstractContextManager[object]]


class Online(Protocol):
    """The online store (features.online.OnlineFeatures): thread-safe; an unknown user has no events. May raise serving.errors.Unavailable."""

    def read(self, user_ids: Any, max_length: int, /, *, seen: bool = False) -> Read: ...


class PersonalLists:
    """Thread-safe. Raises what the online store's `read` raises."""

    def __init__(self, online: Online, timer: Timer, chance: Chance, *, retrieve: int) -> None:
        """`retrieve` is how many candidates the retriever gives; `timer(stage)` is entered around features, retrieve and rank."""
        self._online = online
        self._timer = timer
        self._chance = chance
        self._retrieve = retrieve

    def shown(self, arm: Arm, user_id: int, candidates: Ints | None, places: int) -> Shown:
        """`places` of `candidates` for a user (dense id); None: of the retriever's choice.

        With `retrieval.exclude_seen` that is less all that the store knows they have seen.
        """
        retrieved, scorer = candidates is None, arm.scorer
        with self._timer("features"):
            user = read_user(self._online, scorer, user_id, retrieval=retrieved)
        if candidates is None:
            assert user.seen is not None
            with self._timer("retrieve"):
                candidates, _ = scorer.retrieve(user.history, self._retrieve, user.seen)
        if not len(candidates):
            return Shown.nothing(retrieved=retrieved)
        with self._timer("rank"):
            items_1C, time = candidates[None, :], now()
            item_statistics = scorer.item_statistics(items_1C)
            logits_C = scorer.logits(user.history, user.totals_1, user.statistics, items_1C, item_statistics, np.array([time]), state=user.state)[0]
        columns, propensities = self._chance.draw(arm.policy, logits_C, places)
        return Shown(
            items=candidates[columns],
            scores=1 / (1 + np.exp(-logits_C[columns])),
            propensities=propensities,
            candidates=candidates,
            retrieved=retrieved,
            evidence=Evidence(
                time=time, history=user.history, total=user.total, user=user.statistics, items=item_statistics, logits_C=logits_C, retrieved=retrieved
            ),
        )
