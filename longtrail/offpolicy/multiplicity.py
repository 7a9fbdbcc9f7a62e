"""Many questions of one log: p-values that stay honest. M hypotheses.

Ask twenty segments, or twenty challengers, whether they differ, and one will by chance at 5 %. Adjusted p-values are compared with the same 5 %:

    holm   the chance of *any* false finding is at most 5 %, whatever the dependence (Holm, Scand. J. Statistics 1979); the default
    by     of the findings, at most 5 % are false in expectation, whatever the dependence (Benjamini & Yekutieli, Annals of Statistics 2001)
    bh     the same for independent or positively dependent questions (Benjamini & Hochberg, JRSS B 1995): finds more
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Method = Literal["holm", "by", "bh"]


def adjust(p_M: Floats, method: Method = "holm") -> Floats:
    """[M] adjusted p-values in the order given. NaN (a question that could not be asked) stays NaN and does not count as a question."""
    p_M = np.asarray(p_M, np.float64)
    out = np.full(len(p_M), np.nan)
    asked = np.isfinite(p_M)
    count = int(asked.sum())
    if not count:
        return out
    order = np.argsort(p_M[asked], kind="stable")
    ordered = p_M[asked][order]
    rank = np.arange(1, count + 1)
    if method == "holm":
        adjusted = np.maximum.accumulate((count - rank + 1) * ordered)
    else:
        factor = float((1.0 / rank).sum()) if method == "by" else 1.0
        adjusted = np.minimum.accumulate((factor * count / rank * ordered)[::-1])[::-1]
    back = np.empty(count)
    back[order] = np.minimum(adjusted, 1.0)
    out[asked] = back
    return out


def shared_confidence(confidence: float, questions: int) -> float:
    """The confidence of each of several intervals such that all hold together with `confidence` (Bonferroni): for many challengers on one log."""
    return 1.0 - (1.0 - confidence) / max(questions, 1)
