"""Where item vectors start: near those of the items that the same people had to do with.

A log of 100,000 rows is over-fitted in two epochs, too few for random item vectors to find out which items are alike: rankers that start there
order a request's candidates no better than the items' click rates do (docs/training.md). Our choice, not the papers'.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD

from longtrail.examples import FeatureSet


def cooccurrence_vectors(features: FeatureSet, width: int, *, seed: int) -> NDArray[np.float32]:
    """[N + 1, width]: right singular vectors, times their values, of the binary user x item matrix of the training period's interactions.

    Who had to do with what, not what they thought of it: clicks are labels, and vectors that hold them would be over-fitted from the first step.
    Columns past the matrix's rank are drawn from a normal distribution of the same spread.
    """
    lengths_U = features.train_lengths[1:]
    items_E = features.history.flat(np.arange(1, features.users + 1), lengths_U).items
    shape = (features.users, features.sizes.items + 1)
    matrix_UN = csr_matrix((np.ones(len(items_E)), items_E, np.concatenate([[0], np.cumsum(lengths_U)])), shape=shape)
    matrix_UN.sum_duplicates()
    matrix_UN.data[:] = 1.0
    rank = min(width, *(size - 1 for size in shape), matrix_UN.nnz)
    vectors_NW = np.random.default_rng(seed).normal(size=(shape[1], width))
    if rank > 0:
        svd = TruncatedSVD(n_components=rank, random_state=seed).fit(matrix_UN)
        found_NR = svd.components_.T * svd.singular_values_
        vectors_NW *= found_NR.std() or 1.0
        vectors_NW[:, :rank] = found_NR
    vectors_NW[0] = 0
    return vectors_NW.astype(np.float32)
