"""Sums by user: what every interval and diagnostic is made of. Blocks of a log give sums that merge, so a log of any size is one pass.

U clusters (users, or groups of users), M columns.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longtrail.errors import EvaluationError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MAX_CLUSTERS = 4096  # our choice: more users are put into this many groups by a hash; groups of independent users are independent too


@dataclass(frozen=True)
class UserSums:
    """`sums_UM[u, m]`: column `columns[m]` summed over the rows of cluster `users_U[u]` (sorted)."""

    users_U: Ints
    columns: tuple[str, ...]
    sums_UM: Floats

    @classmethod
    def build(cls, users_N: Ints, columns: dict[str, Floats]) -> "UserSums":
        """Sum each [N] column by user."""
        users, cluster = np.unique(users_N, return_inverse=True)
        sums = [np.bincount(cluster, weights=values, minlength=len(users)) for values in columns.values()]
        return cls(users, tuple(columns), np.stack(sums, axis=1))

    def merge(self, other: "UserSums") -> "UserSums":
        """Sums of both logs together. Raises EvaluationError when their columns differ."""
        if self.columns != other.columns:
            raise EvaluationError(f"user sums: columns {other.columns} cannot be added to {self.columns}")
        users, cluster = np.unique(np.concatenate([self.users_U, other.users_U]), return_inverse=True)
        sums = np.zeros((len(users), len(self.columns)))
        np.add.at(sums, cluster, np.concatenate([self.sums_UM, other.sums_UM]))
        return UserSums(users, self.columns, sums)

    def grouped(self, groups: int = MAX_CLUSTERS) -> "UserSums":
        """Users put into at most `groups` clusters by a hash of their id; unchanged where there are no more users than that."""
        if len(self.users_U) <= groups:
            return self
        word = self.users_U.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing (Knuth, TAOCP 3, 6.4), then the high bits
        group = ((word ^ (word >> np.uint64(32))) >> np.uint64(16)) % np.uint64(groups)
        return UserSums.build(group.astype(np.int64), dict(zip(self.columns, self.sums_UM.T, strict=True)))

    def __getitem__(self, column: str) -> Floats:
        """[U] one column."""
        return self.sums_UM[:, self.columns.index(column)]
