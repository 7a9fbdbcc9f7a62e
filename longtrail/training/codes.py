"""Codes of a RecJPQ layer (longtrail/models/items/recjpq.py): given once, before the first step, from the training period's interactions.

U users, N items, M splits, b codes of a split.

The paper's: split k orders items by component k of a factorisation of the users x items matrix, and cuts that order into b equally full bins. "svd"
takes the right singular vectors (its code: not times their values, repeated interactions counted), "bpr" the item factors of a matrix factorisation
learned by Bayesian personalised ranking (its code: LightFM's, item biases dropped), "random" draws codes. Its code's too: values scaled to 0..1 and
a noise of standard deviation 1e-5, so that equal values (a long tail has thousands) spread over their bins. Ours: padding is no item and
takes no part; bins by rank; noise in float64 from a seed; the BPR below; codes of later items (extend_codes).
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from torch.nn import functional

from longtrail.config import RecJPQItemsSettings
from longtrail.examples import FeatureSet
from longtrail.training.interactions import interaction_matrix

NOISE = 1e-5  # of the values after scaling to 0..1
BPR_EPOCHS, BPR_RATE = 20, 0.05  # the paper's code's (the rate is LightFM's default)
BPR_BATCH, BPR_STEPS, BPR_DECAY = 4096, 25, 1e-3  # ours: a small log has smaller batches, for at least 25 steps an epoch

log = logging.getLogger(__name__)

Codes = NDArray[np.uint8]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Codes [N + 1, M], row 0 zeros, and the mean component value of the items of each code [M, b]; zeros where chance gave the codes."""

    codes_NM: Codes
    levels_Mb: NDArray[np.float32]


def assign_codes(features: FeatureSet, settings: RecJPQItemsSettings, *, seed: int, until: int | None = None) -> Assignment:
    """Codes for all N items, from the events before `until` (UTC µs), where it is given. Reproducible from `seed`.

    Items and splits that the log says nothing of get codes by chance.
    """
    log.info("codes: %s, %d splits of %d for %s items", settings.assignment, settings.splits, settings.codes, f"{features.sizes.items:,}")
    if settings.assignment == "random":
        return assign(np.zeros((features.sizes.items, 0)), settings.splits, settings.codes, seed=seed)
    matrix_UN = interaction_matrix(features, binary=settings.binary, until=until)[:, 1:]
    components = bpr_components if settings.assignment == "bpr" else svd_components
    return assign(components(matrix_UN, settings.splits, seed=seed), settings.splits, settings.codes, seed=seed)


def assign(values_NK: Floats, splits: int, codes: int, *, seed: int, noise: float = NOISE) -> Assignment:
    """Split k's codes by column k of the items' component values [N, K]; splits past K by chance."""
    rng = np.random.default_rng(seed)
    N, K = values_NK.shape
    codes_NM, levels_Mb = np.zeros((N + 1, splits), np.uint8), np.zeros((splits, codes), np.float32)
    codes_NM[1:, K:] = rng.integers(codes, size=(N, splits - K))
    for k in range(K):
        low, reach = values_NK[:, k].min(), np.ptp(values_NK[:, k])
        y_N = (values_NK[:, k] - low) / (reach + 1e-10) + rng.normal(0, noise, N)
        codes_NM[1:, k] = equal_bins(y_N, codes)
        levels_Mb[k] = _levels(low + y_N * reach, codes_NM[1:, k], codes)
    return Assignment(codes_NM=codes_NM, levels_Mb=levels_Mb)


def equal_bins(values_N: Floats, codes: int) -> Codes:
    """Equally full bins: (b (rank + 1) - 1) // N with rank the number of smaller values, so that equal values share a bin.

    What scikit-learn's KBinsDiscretizer(strategy="quantile", quantile_method="averaged_inverted_cdf", subsample=None) gives. Distinct values fill
    bins that differ by one item at most.
    """
    rank_N = np.searchsorted(np.sort(values_N), values_N, side="left")
    return ((codes * (rank_N + 1) - 1) // len(values_N)).astype(np.uint8)


def svd_components(matrix_UN: csr_matrix, components: int, *, seed: int) -> Floats:
    """[N, K]: right singular vectors of the K largest singular values; K is `components`, or less where the matrix has no more."""
    K = min(components, *matrix_UN.shape, matrix_UN.nnz)
    if K == 0:
        return np.zeros((matrix_UN.shape[1], 0))
    if matrix_UN.shape[1] == 1:  # scikit-learn asks for two columns; the one singular vector of one column is 1
        return np.ones((1, 1))
    with np.errstate(invalid="ignore"):  # of the variance explained, which nobody asks for
        return TruncatedSVD(n_components=K, random_state=seed).fit(matrix_UN).components_.T.astype(np.float64)


def bpr_components(matrix_UN: csr_matrix, components: int, *, seed: int) -> Floats:
    """[N, K]: item factors q of a matrix factorisation by BPR: -log σ(⟨p_u, q_i - q_j⟩ + c_i - c_j), j the item of another interaction.

    A small one of our own: batches, Adagrad, repeats that count each time, a negative that may be one of the user's own. The item bias c takes up
    popularity and is dropped, as in the paper's code. K is 0 where there is no interaction.
    """
    users, items = matrix_UN.shape
    pairs = matrix_UN.tocoo()
    if pairs.nnz == 0:
        return np.zeros((items, 0))
    draws = torch.Generator().manual_seed(seed)
    users_E, items_E = torch.from_numpy(pairs.row.astype(np.int64)), torch.from_numpy(pairs.col.astype(np.int64))
    users_E, items_E = (ids.repeat_interleave(torch.from_numpy(pairs.data.astype(np.int64))) for ids in (users_E, items_E))
    p_UK = ((torch.rand(users, components, generator=draws) - 0.5) / components).requires_grad_()
    q_NK = torch.cat([(torch.rand(items, components, generator=draws) - 0.5) / components, torch.zeros(items, 1)], dim=1).requires_grad_()
    optimiser: Any = torch.optim.Adagrad([p_UK, q_NK], lr=BPR_RATE)
    size = min(BPR_BATCH, max(1, len(users_E) // BPR_STEPS))
    for epoch in range(BPR_EPOCHS):
        total = 0.0
        for batch in torch.randperm(len(users_E), generator=draws).split(size):
            negatives = items_E[torch.randint(len(items_E), (len(batch),), generator=draws)]
            p_TK = functional.embedding(users_E[batch], p_UK, sparse=True)
            positive_TK, negative_TK = (functional.embedding(ids, q_NK, sparse=True) for ids in (items_E[batch], negatives))
            difference_TK = positive_TK - negative_TK
            margin_T = (p_TK * difference_TK[:, :-1]).sum(1) + difference_TK[:, -1]
            decay = BPR_DECAY * (p_TK.square().sum() + positive_TK.square().sum() + negative_TK.square().sum())
            loss = functional.softplus(-margin_T).sum()
            optimiser.zero_grad()
            ((loss + decay) / len(batch)).backward()
            with torch.sparse.check_sparse_tensor_invariants(enable=False):  # torch warns where neither is chosen
                optimiser.step()
            total += loss.item()
        log.info("codes: BPR epoch %d/%d, loss %.4f", epoch + 1, BPR_EPOCHS, total / len(users_E))
    return q_NK.detach()[:, :-1].double().numpy()


def extend_codes(codes_NM: Codes, levels_Mb: NDArray[np.float32], matrix_UN: csr_matrix, *, seed: int) -> Codes:
    """Codes for items that came later, those of the older ones as they are: [N' + 1, M] of codes [N + 1, M] and interactions [U, N' + 1].

    Ours. A user's component is the sum over the older items they touched (each read from its code: `levels_Mb`), a new item's is told by its users':
    a line through their sum and their mean, as fits the older items best. For a singular vector v that is the projection Mᵀ M v / σ² by which it is
    continued to a new column (the mean then has no say); factors of BPR lie in the mean. The item takes the code whose level is nearest, among those
    that an older item has. An item that no user of older items touched is coded by chance.
    """
    rng = np.random.default_rng(seed)
    old, new = len(codes_NM), matrix_UN.shape[1] - len(codes_NM)
    M = len(levels_Mb)
    values_NM = np.zeros((matrix_UN.shape[1], M))
    values_NM[1:old] = levels_Mb[np.arange(M), codes_NM[1:]]
    known_U = np.asarray(matrix_UN[:, :old].sum(1)).ravel()
    users_UM = matrix_UN @ values_NM
    sums_NM, reach_N = matrix_UN.T @ users_UM, matrix_UN.T @ (known_U > 0)
    means_NM = (matrix_UN.T @ (users_UM / np.maximum(known_U, 1)[:, None])) / np.maximum(reach_N, 1)[:, None]
    held = [np.unique(codes_NM[1:, k]) for k in range(M)]  # fewer items than codes leave codes whose pieces nothing has trained
    codes_nM = np.stack([rng.choice(held_h, new) for held_h in held], axis=1)
    touched_o, touched_n = np.flatnonzero(reach_N[:old] > 0), np.flatnonzero(reach_N[old:] > 0)
    for k in np.flatnonzero(np.ptp(levels_Mb, axis=1) > 0):
        known_N3 = np.stack([sums_NM[:, k], means_NM[:, k], np.ones(len(reach_N))], axis=1)
        scale_3 = np.maximum(np.abs(known_N3[touched_o]).max(0, initial=0), 1e-30)
        line_3 = np.linalg.lstsq(known_N3[touched_o] / scale_3, values_NM[touched_o, k], rcond=None)[0]
        value_n = known_N3[old + touched_n] / scale_3 @ line_3
        value_n = value_n + rng.normal(0, NOISE * np.ptp(levels_Mb[k]), len(value_n))
        levels_h = levels_Mb[k, held[k]]
        codes_nM[touched_n, k] = held[k][np.searchsorted((levels_h[1:] + levels_h[:-1]) / 2, value_n)]
    return np.concatenate([codes_NM, codes_nM])


def _levels(values_N: Floats, codes_N: Codes, codes: int) -> NDArray[np.float32]:
    """[b], ascending: the mean value of each code's items; where a code has none (fewer items than codes), between its neighbours."""
    counts_b = np.bincount(codes_N, minlength=codes)
    means_b = np.bincount(codes_N, weights=values_N, minlength=codes) / np.maximum(counts_b, 1)
    held = np.flatnonzero(counts_b)
    return np.maximum.accumulate(np.interp(np.arange(codes), held, means_b[held]).astype(np.float32))
