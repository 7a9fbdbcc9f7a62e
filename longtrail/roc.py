"""A ranker as a yes-or-no classifier of shown items: its operating curve, and what it gets right and wrong at one threshold."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

POINTS = 100  # of a curve that is looked at; our choice


def roc_curve(clicks_n: NDArray, probabilities_n: NDArray, *, points: int = POINTS) -> list[dict[str, float]]:
    """[{threshold, false_positive_rate, true_positive_rate}] of "clicked, if predicted >= threshold", from the strictest threshold down.

    Rows of equal prediction are one point (Fawcett 2006, section 5). More than `points` are thinned to about as many, evenly along the curve; both
    ends stay. The first threshold, above every prediction, is 1. Empty where all rows were clicked, or none, or a prediction is NaN.
    """
    clicks_n = np.asarray(clicks_n) > 0
    positive, negative = int(clicks_n.sum()), int((~clicks_n).sum())
    if not positive or not negative or np.isnan(probabilities_n).any():
        return []
    order = np.argsort(-np.asarray(probabilities_n, np.float64), kind="stable")
    predicted_n, clicks_n = np.asarray(probabilities_n, np.float64)[order], clicks_n[order]
    last_P = np.append(np.flatnonzero(np.diff(predicted_n)), len(predicted_n) - 1)  # of each distinct prediction
    true_P, all_P = np.cumsum(clicks_n)[last_P], last_P + 1
    tpr_P = np.concatenate([[0.0], true_P / positive])
    fpr_P = np.concatenate([[0.0], (all_P - true_P) / negative])
    threshold_P = np.concatenate([[1.0], predicted_n[last_P]])
    if len(tpr_P) > points:
        along_P = tpr_P + fpr_P  # from 0 to 2, never back
        after = np.searchsorted(along_P, np.linspace(0, 2, points // 2)).clip(max=len(along_P) - 1)
        kept = np.unique(np.concatenate([after, after - 1]).clip(min=0))  # both sides of each place: a curve of ties jumps
        tpr_P, fpr_P, threshold_P = tpr_P[kept], fpr_P[kept], threshold_P[kept]
    rows = zip(threshold_P.tolist(), fpr_P.tolist(), tpr_P.tolist(), strict=True)
    return [{"threshold": threshold, "false_positive_rate": fpr, "true_positive_rate": tpr} for threshold, fpr, tpr in rows]


def confusion(clicks_n: NDArray, probabilities_n: NDArray) -> dict[str, Any]:
    """{threshold, matrix}: rows were not clicked, clicked; columns were predicted so. Empty without rows, or where a
    prediction is NaN.

    The threshold is the prediction at which as many rows are called clicked as were (ties may add more): our choice, since click rates are far below
    one half and a threshold there would call nothing clicked.
    """
    clicks_n, predicted_n = np.asarray(clicks_n) > 0, np.asarray(probabilities_n, np.float64)
    if not len(clicks_n) or np.isnan(predicted_n).any():
        return {}
    wanted = max(int(clicks_n.sum()), 1)
    threshold = float(np.partition(predicted_n, len(predicted_n) - wanted)[len(predicted_n) - wanted])
    called_n = predicted_n >= threshold
    return {"threshold": threshold, "matrix": np.bincount(2 * clicks_n + called_n, minlength=4).reshape(2, 2).tolist()}
