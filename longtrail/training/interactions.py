"""Who had to do with what in the training period: what codes, start vectors and transitions are counted from. U users, N items, E events."""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from longtrail.examples import FeatureSet


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


def interaction_matrix(features: FeatureSet, *, binary: bool) -> csr_matrix:
    """[U, N + 1], float64: how often each user had to do with each item in the training period; with `binary`, 1 for any number of times.

    Column 0 is empty. Nothing of the validation and test periods is in it.
    """
    items_E, offsets_U1 = training_events(features)
    matrix_UN = csr_matrix((np.ones(len(items_E)), items_E, offsets_U1), shape=(features.users, features.sizes.items + 1))
    matrix_UN.sum_duplicates()
    if binary:
        matrix_UN.data[:] = 1.0
    return matrix_UN
