"""The operating curve and the confusion matrix against counting by hand."""

import numpy as np
import pytest

from longtrail.metrics import auc
from longtrail.roc import confusion, roc_curve


def area(curve: list[dict[str, float]]) -> float:
    return float(np.trapezoid([p["true_positive_rate"] for p in curve], [p["false_positive_rate"] for p in curve]))


def test_by_hand() -> None:
    clicks, predicted = [1, 0, 1, 0], [0.9, 0.5, 0.5, 0.1]  # a tie at 0.5 is one point
    points = [(p["threshold"], p["false_positive_rate"], p["true_positive_rate"]) for p in roc_curve(np.array(clicks), np.array(predicted))]
    assert points == [(1.0, 0.0, 0.0), (0.9, 0.0, 0.5), (0.5, 0.5, 1.0), (0.1, 1.0, 1.0)]
    assert confusion(np.array(clicks), np.array(predicted)) == {"threshold": 0.5, "matrix": [[1, 1], [0, 2]]}


@pytest.mark.parametrize("levels", [3, 50, 10**6])
def test_each_point_counts_the_rows_above_it_and_the_area_is_the_auc(levels: int) -> None:
    rng = np.random.default_rng(levels)
    clicks = rng.random(3000) < 0.2
    predicted = rng.integers(1, levels, 3000) / (2 * levels) + 0.3 * clicks * rng.random(3000)
    whole = roc_curve(clicks, predicted, points=10**6)
    for point in whole[1 :: max(len(whole) // 20, 1)]:
        called = predicted >= point["threshold"]
        assert point["true_positive_rate"] == pytest.approx(called[clicks].mean())
        assert point["false_positive_rate"] == pytest.approx(called[~clicks].mean())
    assert area(whole) == pytest.approx(auc(clicks.astype(int), predicted), abs=1e-12)
    thin = roc_curve(clicks, predicted)
    assert len(thin) <= 101 and thin[0] == whole[0] and thin[-1] == whole[-1]
    assert area(thin) == pytest.approx(area(whole), abs=2e-3)
    found = confusion(clicks, predicted)
    assert np.sum(found["matrix"]) == 3000 and np.sum(found["matrix"], axis=1).tolist() == [(~clicks).sum(), clicks.sum()]
    assert np.sum(found["matrix"], axis=0)[1] == (predicted >= found["threshold"]).sum() >= clicks.sum()


def test_one_class_has_no_curve() -> None:
    assert roc_curve(np.zeros(3), np.ones(3)) == [] == roc_curve(np.ones(3), np.ones(3))
    assert confusion(np.zeros(3), np.array([0.1, 0.2, 0.3]))["matrix"] == [[2, 1], [0, 0]]
    assert confusion(np.zeros(0), np.zeros(0)) == {}


def test_predictions_that_are_no_numbers_have_no_curve() -> None:
    clicks, predicted = np.array([0, 1, 1]), np.array([0.1, np.nan, 0.3])
    assert (roc_curve(clicks, predicted), confusion(clicks, predicted)) == ([], {})
