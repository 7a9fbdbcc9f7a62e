"""Who is known: raw user key to the dense id under which their history is stored."""

from collections.abc import Mapping, Sequence

from serving.state import State


class Users:
    """Users of the Bento and those met since. Reading is free for all threads; `add` belongs to whoever takes events, one batch after another."""

    def __init__(self, known: Mapping[str, int], state: State) -> None:
        self._state = state
        self._ids = {**known, **state.new_users()}
        self._next = max(self._ids.values(), default=0) + 1

    def __getitem__(self, key: str) -> int:
        return self._ids[key]

    def __contains__(self, key: str) -> bool:
        return key in self._ids

    def get(self, key: str) -> int | None:
        return self._ids.get(key)

    def any(self) -> int:
        """The id of somebody, to warm up with; 1 where there is nobody."""
        return next(iter(self._ids.values()), 1)

    def ids(self) -> list[int]:
        """Of all users."""
        return list(self._ids.values())

    def add(self, keys: Sequence[str]) -> None:
        """Ids after all known ones, on disk first, for this online store alone: the next build of the features gives its own."""
        if keys:
            added = list(zip(keys, range(self._next, self._next + len(keys)), strict=True))
            self._state.add_users(added)
            self._next += len(added)
            self._ids.update(added)
