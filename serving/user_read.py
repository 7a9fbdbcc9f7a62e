"""What a request reads of one user: what is kept of them where the ranker keeps something, then the history, no longer than is needed."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from longtrail.history import HistoryArrays
from longtrail.models.attention.user_state import UserState
from serving.guard import Guarded
from serving.scoring import Scorer

Ints = NDArray[np.int64]


class Read(Protocol):
    """One read of B users."""

    @property
    def history(self) -> HistoryArrays: ...

    @property
    def totals_B(self) -> Ints: ...  # noqa: N802

    @property
    def statistics(self) -> dict[str, Ints]: ...

    @property
    def seen(self) -> list[Ints]: ...


@dataclass(frozen=True, kw_only=True)
class UserRead:
    """One user. `history` is as long as retriever and ranker look at; with a `state` the ranker looks at its newest events only."""

    history: HistoryArrays
    total: int  # all events of the user
    statistics: dict[str, Ints]
    seen: Ints | None  # items of all stored events, where they were asked for
    state: UserState | None

    @property
    def totals_1(self) -> Ints:
        return np.array([self.total])


def read_user(online: Any, scorer: Scorer, user: int, *, retrieval: bool) -> UserRead:
    """Read what `scorer` needs of a user (dense id) from an Online; with `retrieval` for the retriever too, and all that was seen.

    By way of a guard it is one guarded call. Raises what the store's `read` raises.
    """
    if isinstance(online, Guarded):
        return online.together(_read, scorer, user, retrieval)
    return _read(online, scorer, user, retrieval)


def _read(online: Any, scorer: Scorer, user: int, retrieval: bool) -> UserRead:
    states, whole = scorer.states, scorer.ranker_history
    kept = None if states is None else states.read(user)  # before the history
    length, least = (whole if states is None or kept is None else states.recent), (scorer.retriever_history if retrieval else 0)
    read, state = online.read(np.array([user]), max(length, least), seen=retrieval), None
    if states is not None:
        state = states.state(user, kept, read)
        if state is None and kept is not None and max(length, least) < min(int(read.totals_B[0]), whole):
            read = online.read(np.array([user]), max(whole, least), seen=retrieval)
            state = states.state(user, kept, read)
    return UserRead(
        history=read.history, total=int(read.totals_B[0]), statistics=read.statistics, seen=read.seen[0] if retrieval else None, state=state
    )
