"""How one list is drawn from a ranker's logits, with the exact probability of each place.

C candidates, K places. Propensities are conditional: P(this item at this place | the items above it).
"""

from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from longtrail.offpolicy.policies import best_first, sample_plackett_luce

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class ListPolicy(Protocol):
    """Draws one list. `name` says how, parameters included: it stands in answers and logs."""

    @property
    def name(self) -> str: ...

    def draw(self, logits_C: Floats, places: int, random: np.random.Generator, /) -> tuple[Ints, Floats]:
        """Columns in the order shown and their conditional propensities, each [K], K = min(places, C)."""


@dataclass(frozen=True)
class Best:
    """The highest logits, best first; of equal ones the first candidate. Deterministic: propensities are 1."""

    name: str = "best"

    def draw(self, logits_C: Floats, places: int, random: np.random.Generator, /) -> tuple[Ints, Floats]:
        columns = best_first(logits_C[None, :], np.array([len(logits_C)]), places)[0]
        return columns, np.ones(len(columns))


@dataclass(frozen=True)
class Exploring:
    """Plackett-Luce over logits / `temperature`."""

    temperature: float

    @property
    def name(self) -> str:
        return f"plackett_luce({self.temperature:g})"

    def draw(self, logits_C: Floats, places: int, random: np.random.Generator, /) -> tuple[Ints, Floats]:
        columns, propensities = sample_plackett_luce(logits_C[None, :] / self.temperature, np.array([len(logits_C)]), places, random)
        # A propensity too small for a float is still positive: the item was shown.
        return columns[0], np.maximum(propensities[0], np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class EpsilonGreedy:
    """At each place the best candidate left with probability 1 - `epsilon`, else any of those left alike (the best too)."""

    epsilon: float

    @property
    def name(self) -> str:
        return f"epsilon_greedy({self.epsilon:g})"

    def draw(self, logits_C: Floats, places: int, random: np.random.Generator, /) -> tuple[Ints, Floats]:
        left = best_first(logits_C[None, :], np.array([len(logits_C)]), len(logits_C))[0].tolist()
        left_K = len(left) - np.arange(min(places, len(left)))
        # The rank, among those left, of what each place shows: 0 is the best, so nothing needs to be sorted again.
        rank_K = np.where(random.random(len(left_K)) < self.epsilon, random.integers(0, left_K), 0)
        columns = np.array([left.pop(rank) for rank in rank_K.tolist()], np.int64)
        return columns, self.epsilon / left_K + (1 - self.epsilon) * (rank_K == 0)


class Chance:
    """A random generator that many threads may draw lists with."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = np.random.default_rng(seed)
        self._lock = Lock()

    def draw(self, policy: ListPolicy, logits_C: Floats, places: int) -> tuple[Ints, Floats]:
        with self._lock:
            return policy.draw(logits_C, places, self._random)
