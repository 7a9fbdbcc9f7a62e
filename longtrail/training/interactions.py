"""Who had to do with what in the training period: what codes, start vectors and transitions are counted from. U users, N items, E events."""

import logging
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from longtrail.examples import FeatureSet
from longtrail.examples.features import column
from longtrail.splits import SPLITS
from longtrail.times import iso

TELLING = 0.05  # our choice, see `unlabelled_until`
_ROWS = 1_000_000  # rows of the log that it looks at

log = logging.getLogger(__name__)


def training_events(features: FeatureSet) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(items_E, offsets_U1): the items of every user's training period, oldest first; user u's are items_E[offsets_U1[u - 1] : offsets_U1[u]]."""
    flat = features.history.flat(np.arange(1, features.users + 1), features.train_lengths[1:])
    return flat.items, flat.offsets_B1


def transition_counts(features: FeatureSet) -> csr_matrix:
    """c [N + 1, N + 1]: how often item j came right after item i in somebody's training period. At most an entry an event."""
    items_E, offsets_U1 = training_events(features)
    follows_E = np.ones(len(items_E), bool)
    follows_E[offsets_U1[:-1][offsets_U1[:-1] < len(items_E)]] = False  # the first event of each user follows nothing
    places = np.flatnonzero(follows_E)
    shape = (features.sizes.items + 1, features.sizes.items + 1)
    return csr_matrix((np.ones(len(places)), (items_E[places - 1], items_E[places])), shape=shape)


def interaction_matrix(features: FeatureSet, *, binary: bool, until: int | None = None) -> csr_matrix:
    """[U, N + 1], float64: how often each user had to do with each item in the training period; with `binary`, 1 for any number of times.

    Column 0 is empty. Nothing of the validation and test periods is in it; nor, with `until` (UTC µs), of that time and later.
    """
    flat = features.history.flat(np.arange(1, features.users + 1), features.train_lengths[1:])
    items_E, offsets_U1 = flat.items, flat.offsets_B1
    if until is not None:
        early_E = flat.times < until
        items_E, offsets_U1 = items_E[early_E], np.concatenate([[0], np.cumsum(early_E)])[offsets_U1]
    matrix_UN = csr_matrix((np.ones(len(items_E)), items_E, offsets_U1), shape=(features.users, features.sizes.items + 1))
    matrix_UN.sum_duplicates()
    if binary:
        matrix_UN.data[:] = 1.0
    return matrix_UN


def before_held_out(features: FeatureSet) -> FeatureSet:
    """The features with histories that end, in the training period, before the user's first request held out: what rankers may start from.

    A global split has them so. Leaving out each user's last events does not: a held-out request that has many clicks, or that views follow, has some
    of them among the events before the last two, which next items are learnt from (the papers' protocol).
    """
    lengths_U1 = features.train_lengths.copy()
    for split in SPLITS[1:]:
        held = features.examples(split)
        np.minimum.at(lengths_U1, column(held, "user_id"), column(held, "history_length"))
    return replace(features, train_lengths=lengths_U1)


def unlabelled_until(features: FeatureSet, *, since: int | None = None) -> int | None:
    """UTC µs before which events may say what items have in common, for a ranker that learns from the clicks from `since` on; None: all may.

    Where events are clicks, who had to do with what is the label: vectors made of all events order the training period's candidates far better than
    any later ones, and a ranker learns to lean on that. So the events from before the first request that is learnt from or, where those are
    fewer, the older half of all (with `since`, of those from then on, for what is new is among them). Of requests in that half the labels are
    still in the vectors, more than with all events; to train on newer ones alone is clean, and did worse (docs/training.md).

    Where events say nothing of clicks, as ratings that stand in the log whatever they are, all are good: where the shares of clicked and of other
    rows whose user and item met in the training period differ by less than TELLING. Our choice.
    """
    table = features.examples("train")
    times_E = column(table, "timestamp")
    rows = np.arange(len(times_E)) if since is None else np.flatnonzero(times_E >= since)
    if len(rows) == 0:
        return None
    first = int(times_E[rows].min())
    if len(rows) > _ROWS:  # by chance: every k-th row of lists of k is one place of each list
        rows = np.random.default_rng(0).choice(rows, _ROWS, replace=False)
    users_E, items_E, clicks_E = (column(table, name)[rows] for name in ("user_id", "item_id", "click"))
    met_E = np.asarray(interaction_matrix(features, binary=True)[users_E - 1, items_E]).ravel()
    if len(np.unique(clicks_E)) < 2 or abs(met_E[clicks_E == 1].mean() - met_E[clicks_E == 0].mean()) < TELLING:
        return None
    times = features.history.flat(np.arange(1, features.users + 1), features.train_lengths[1:]).times
    fresh = times if since is None else times[times >= since]
    until = max(first, _older_half(fresh)) if len(fresh) else first
    if not (times < until).any():
        log.warning("no event is from before %s, when the clicks begin that are learnt from: start vectors and codes are drawn by chance", iso(until))
    return until


def _older_half(times: NDArray[np.int64]) -> int:
    """The instant before which about half of `times` lie. Those of one instant stay together."""
    middle = int(np.median(times))
    below, upto = (times < middle).mean(), (times <= middle).mean()
    return middle if 0.5 - below <= upto - 0.5 or upto == 1 else middle + 1
