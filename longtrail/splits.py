"""Which rows are for training, which for choosing (valid) and which for judging (test). Pure functions of arrays: the definitions.

The bounds of the temporal split are taken from the timestamps of the impressions, or of the interactions where a log has no
impressions; the same two instants then divide both tables. A log larger than memory is divided by longtrail/division.py, to the same result.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from longtrail.config import SplitSettings
from longtrail.errors import EvaluationError
from longtrail.times import iso

TRAIN, VALID, TEST = 0, 1, 2
SPLITS = ("train", "valid", "test")  # names of the codes above

Ints = NDArray[np.int64]
Codes = NDArray[np.uint8]


class Instants(Protocol):
    """What the bounds must know of the times of n rows (µs), wherever they are."""

    def count(self) -> int:
        """n."""
        ...

    def at(self, place: int) -> tuple[int, int, int]:
        """When the rows stand in order of time: the instant of the one at `place`, from 0; how many are earlier; how many are of that instant."""
        ...


class ArrayInstants:
    """`Instants` of an array [n]."""

    def __init__(self, times_n: Ints) -> None:
        self._times = np.asarray(times_n)

    def count(self) -> int:
        return len(self._times)

    def at(self, place: int) -> tuple[int, int, int]:
        at = int(np.partition(self._times, place)[place])
        return at, int((self._times < at).sum()), int((self._times == at).sum())


def split_bounds(times: Ints | Instants, settings: SplitSettings) -> tuple[int, int]:
    """(t1, t2) in µs such that train < t1 <= valid < t2 <= test, and valid and test hold about their shares of `times` (µs, of n rows).

    Rows of one instant are never divided, so a share is met only as nearly as ties allow; each split whose share is above 0 holds at
    least one row. Raises EvaluationError where the log has too few distinct timestamps for that.
    """
    instants = ArrayInstants(times) if isinstance(times, np.ndarray) else times
    n = instants.count()
    if n == 0:
        raise EvaluationError("split: the log has no rows; expected at least one for each of train, valid and test")
    if settings.valid_share + settings.test_share >= 1:
        raise EvaluationError(
            f"split: valid_share {settings.valid_share} + test_share {settings.test_share} leave nothing to train on; expected a sum below 1"
        )
    t2, before = _newest(instants, settings.test_share * n, n)
    if before == 0:
        raise EvaluationError(
            f"split: nothing stands before the test period, which starts at {iso(t2)}; expected more distinct timestamps in the log"
        )
    t1, training = _newest(instants, settings.valid_share * n, before)
    if training == 0:
        raise EvaluationError(f"split: nothing stands before the validation period, which starts at {iso(t1)}; expected more distinct timestamps")
    return t1, t2


def _newest(instants: Instants, wanted: float, n: int) -> tuple[int, int]:
    """The instant from which on about `wanted` of the first `n` rows lie, and how many are earlier.

    At least one lies there where `wanted` is above 0, and none where it is 0. `n` parts no two rows of one instant.
    """
    if wanted == 0:
        return instants.at(n - 1)[0] + 1, n
    at, earlier, same = instants.at(min(max(n - round(wanted), 0), n - 1))
    held, later = n - earlier, n - earlier - same
    if later == 0 or abs(held - wanted) <= abs(later - wanted):
        return at, earlier
    return instants.at(n - later)[:2]


def temporal_split(timestamps_n: Ints, bounds: tuple[int, int]) -> Codes:
    """uint8 [n]: TRAIN, VALID or TEST of each row by its timestamp (µs)."""
    return np.searchsorted(np.asarray(bounds, dtype=np.int64), timestamps_n, side="right").astype(np.uint8)


def leave_one_out(users_n: Ints, times_n: Ints, then_n: Ints | None = None, *, requests_n: NDArray | None = None) -> Codes:
    """uint8 [n]: each user's last row is TEST, the last but one VALID, all others TRAIN; a user with fewer than 3 is all TRAIN.

    Rows of a user are ordered by `times_n`, then `then_n`, then as they stand. For interactions give `available_at` and `timestamp`, which
    is the order of the history store. For impressions give `timestamp` and `requests_n` (integer codes or strings): the rows of one request
    stay together, and it is the last request that is TEST. The protocol of Kang & McAuley (SASRec, ICDM 2018), section IV-A.
    """
    n = len(users_n)
    if n == 0:
        return np.zeros(0, dtype=np.uint8)
    requests = None if requests_n is None else np.unique(requests_n, return_inverse=True)[1]
    inner = [key for key in (requests, then_n) if key is not None]
    order = np.lexsort((*inner, times_n, users_n))
    users = users_n[order]
    new_user = np.concatenate(([True], users[1:] != users[:-1]))
    new_group = np.ones(n, dtype=bool)
    if requests is not None:
        times, codes = times_n[order], requests[order]
        new_group = new_user | np.concatenate(([True], (codes[1:] != codes[:-1]) | (times[1:] != times[:-1])))
    group = np.cumsum(new_group) - 1
    user = np.cumsum(new_user) - 1
    last = np.concatenate((group[np.flatnonzero(new_user)[1:] - 1], group[-1:]))  # each user's last group
    first = group[new_user]
    from_end = last[user] - group
    enough = (last - first + 1)[user] >= 3
    codes_sorted = np.where(enough & (from_end == 0), TEST, np.where(enough & (from_end == 1), VALID, TRAIN)).astype(np.uint8)
    codes_n = np.empty(n, dtype=np.uint8)
    codes_n[order] = codes_sorted
    return codes_n


def train_lengths(users_n: Ints, available_at_n: Ints, *, users: int, bounds: tuple[int, int] | None) -> Ints:
    """int64 [users + 1]: how long a prefix of each user's history lies in the training period; index 0 is unused.

    Temporal split (`bounds` given): the interactions available before t1. Leave-one-out (`bounds` None): all but the last two of a user
    with at least 3. Rows are interactions, in any order.
    """
    if bounds is not None:
        return np.bincount(users_n[available_at_n < bounds[0]], minlength=users + 1).astype(np.int64)
    total = np.bincount(users_n, minlength=users + 1).astype(np.int64)
    return np.where(total >= 3, total - 2, total)
