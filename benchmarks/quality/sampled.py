"""Metrics against sampled negatives, only to compare with papers that report them: not a measure of anything a user sees.

Some papers rank a target among 100 random items instead of the whole catalogue ("uni100"). From a target's exact rank the *expectation* of such a
metric over all draws follows, so nothing has to be drawn: of the 100, as many stand above the target as a binomial with p = (rank - 1) / (others).
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

NEGATIVES = 100


def sampled_metrics(ranks_n: NDArray[np.int64], others_n: NDArray[np.int64], k: int, *, negatives: int = NEGATIVES) -> dict[str, float]:
    """{"uni100_ndcg@k", "uni100_recall@k"}: means over n targets.

    `ranks_n`: exact ranks from 1, 0 for an item the model does not know (a miss). `others_n`: items the target was ranked among, itself not counted.
    """
    share_n = np.where(ranks_n > 0, (ranks_n - 1) / np.maximum(others_n, 1), 1.0)
    above_k = np.arange(k)  # so many of the sampled ones stand above: the target's place is one more
    chance_nk = binom.pmf(above_k[None, :], negatives, np.minimum(share_n, 1.0)[:, None])
    gains_k = 1 / np.log2(above_k + 2)
    return {f"uni{negatives}_ndcg@{k}": float((chance_nk @ gains_k).mean()), f"uni{negatives}_recall@{k}": float(chance_nk.sum(1).mean())}
