"""Sums by user: what every interval and diagnostic is made of. Blocks of a log give sums that merge, so a log of any size is one pass.

U clusters (users, or groups of users), M columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longtrail.errors import EvaluationError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MAX_CLUSTERS = 4096  # our choice: more users are put into this many groups by a hash; groups of independent users are independent too
EXACT_USERS = 16_384  # our choice: sums are kept by user up to here, and by group beyond


@dataclass(frozen=True)
class UserSums:
    """`sums_UM[u, m]`: column `columns[m]` summed over the rows of cluster `users_U[u]` (sorted).

    `groups` None: clusters are users. Else clusters are the groups 0..groups-1 that a hash puts users into.
    """

    users_U: Ints
    columns: tuple[str, ...]
    sums_UM: Floats
    groups: int | None = None

    @classmethod
    def build(cls, users_N: Ints, columns: Mapping[str, Floats], *, groups: int | None = None) -> "UserSums":
        """Sum each [N] column by user, or straight by group of users. More than EXACT_USERS users are grouped anyway."""
        if groups is not None:
            return cls(np.arange(groups), tuple(columns), _summed(user_groups(users_N, groups), columns, groups), groups)
        users, cluster = np.unique(users_N, return_inverse=True)
        if len(users) > EXACT_USERS:
            return cls.build(users_N, columns, groups=MAX_CLUSTERS)
        return cls(users, tuple(columns), _summed(cluster, columns, len(users)))

    def merge(self, other: "UserSums") -> "UserSums":
        """Sums of both logs together; grouped where either is, or where users are many. Raises EvaluationError when their columns differ."""
        if self.columns != other.columns:
            only = sorted(set(self.columns) ^ set(other.columns)) or ["another order"]
            raise EvaluationError(f"user sums: the columns of two blocks differ ({len(only)}, first {only[0]}); expected the same")
        if self.groups is None and other.groups is None:
            users, cluster = np.unique(np.concatenate([self.users_U, other.users_U]), return_inverse=True)
            if len(users) <= EXACT_USERS:
                sums = np.zeros((len(users), len(self.columns)))
                sums[cluster[: len(self.users_U)]] = self.sums_UM  # users are distinct within each, so these are plain assignments
                sums[cluster[len(self.users_U) :]] += other.sums_UM
                return UserSums(users, self.columns, sums)
        groups = self.groups or other.groups or MAX_CLUSTERS
        one, two = self.grouped(groups, always=True), other.grouped(groups, always=True)
        return UserSums(one.users_U, self.columns, one.sums_UM + two.sums_UM, groups)

    def grouped(self, groups: int = MAX_CLUSTERS, *, always: bool = False) -> "UserSums":
        """Users put into at most `groups` clusters by a hash of their id; unchanged where there are no more users than that, unless `always`.

        Raises EvaluationError where they are in another number of groups already.
        """
        if self.groups is not None:
            if always and self.groups != groups:
                raise EvaluationError(f"user sums: {self.groups} groups of users cannot be made {groups}")
            return self
        if len(self.users_U) <= groups and not always:
            return self
        made = UserSums.build(self.users_U, dict(zip(self.columns, self.sums_UM.T, strict=True)), groups=groups)
        if always:
            return made
        filled = np.unique(user_groups(self.users_U, groups))
        return UserSums(filled, self.columns, made.sums_UM[filled], groups)

    def __getitem__(self, column: str) -> Floats:
        """[U] one column."""
        return self.sums_UM[:, self.columns.index(column)]

    def __contains__(self, column: str) -> bool:
        return column in self.columns


def user_groups(users_N: Ints, groups: int = MAX_CLUSTERS) -> Ints:
    """[N] the group of each user, 0..groups-1: a hash of the id, the same in every log."""
    word = np.asarray(users_N).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing (Knuth, TAOCP 3, 6.4), then the high bits
    return (((word ^ (word >> np.uint64(32))) >> np.uint64(16)) % np.uint64(groups)).astype(np.int64)


def _summed(cluster_N: Ints, columns: Mapping[str, Floats], clusters: int) -> Floats:
    """[clusters, M]"""
    sums = np.empty((len(columns), clusters))
    for row, values in enumerate(columns.values()):
        sums[row] = np.bincount(cluster_N, weights=values, minlength=clusters)
    return sums.T
