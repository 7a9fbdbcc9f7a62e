"""Has what the service sees moved away from what the models learned from? Histograms, their distance, and how much of it is chance.

k bins of a feature, n effective observations (requests of different users), m of the reference.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri

from longtrail.errors import ModelError
from longtrail.files import write_json

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
BINS = 10
REQUEST_FEATURES = ("history_length", "user_impressions", "user_click_rate")
ITEM_FEATURES = ("item_events", "item_click_rate")
GIVEN, RETRIEVED = "given", "retrieved"  # who chose the candidates; what each chooses is compared with its own past


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One feature's reference. `edges` [k - 1] part the bins, `counts` [k]; `expected` is the index that the newest requests of the log, read as the
    service reads them, already had when the Bento was packaged: drift that was there when the model was judged."""

    edges: list[float]
    counts: list[float]
    observations: float
    expected: float

    def bins(self, values: Floats | Ints) -> Ints:
        """The bin of each value: bin i holds edges[i - 1] <= value < edges[i]."""
        return np.searchsorted(np.asarray(self.edges, np.float64), np.asarray(values, np.float64), side="right").astype(np.int64)

    @property
    def size(self) -> int:
        return len(self.counts)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """`reference.json` of a Bento. Item features are named `item_events.given` and so on. Shares are of requests and of candidates."""

    features: Mapping[str, Feature]
    click_rate: float
    new_item_share: float
    split: str
    requests: int
    format: int = 1

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "Reference":
        """Raises ModelError where the file is missing or damaged."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            features = {name: Feature(**values) for name, values in raw.pop("features").items()}
            return cls(features=features, **raw)
        except FileNotFoundError:
            raise ModelError(f"{path}: no such file; expected the reference histograms of a Bento") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"{path}: damaged: {error}; expected the reference histograms of a Bento") from None


def make_feature(values: Floats | Ints, served: Floats | Ints, *, observations: float, bins: int = BINS) -> Feature:
    """Reference of `values`, in bins of about equal share (fewer where values repeat); `served` are those of the newest requests."""
    edges = np.unique(np.quantile(np.asarray(values, np.float64), np.arange(1, bins) / bins, method="higher"))
    edges = edges[edges > np.min(values)]
    feature = Feature(edges=edges.tolist(), counts=[0.0] * (len(edges) + 1), observations=observations, expected=0.0)
    counts = np.bincount(feature.bins(values), minlength=feature.size)
    expected = psi(counts, np.bincount(feature.bins(served), minlength=feature.size)) if len(served) else 0.0
    return Feature(edges=feature.edges, counts=counts.astype(float).tolist(), observations=observations, expected=expected)


def psi(reference: Floats | Ints, counts: Floats | Ints) -> float:
    """Population stability index of two histograms [k]: the sum over bins of (q - p) · ln(q / p), half an observation added to each bin (our choice).

    Below 0.1 is commonly called stable, above 0.25 shifted.
    """
    p, q = (np.asarray(values, np.float64) + 0.5 for values in (reference, counts))
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())


def chance(size: int, observations: float, reference: float, false_alarms: float) -> float:
    """What the index of two samples of one distribution exceeds with probability `false_alarms`.

    Near equality it is Pearson's statistic times (1/n + 1/m), so it is the quantile of chi² with k - 1 degrees of freedom, times that.
    """
    if size < 2 or observations <= 0 or reference <= 0:
        return float("inf") if size >= 2 else 0.0
    return float(chdtri(size - 1, false_alarms) * (1 / observations + 1 / reference))


def effective(users: Ints) -> float:
    """Kish's effective number of observations, where those of one user are one: (sum of weights)² / sum of squared weights."""
    _, counts = np.unique(users, return_counts=True)
    return float(counts.sum() ** 2 / (counts.astype(np.float64) ** 2).sum()) if len(counts) else 0.0


def limit(feature: Feature, observations: float, *, threshold: float, false_alarms: float) -> float:
    """The index from which a feature has drifted: `threshold` beyond what it was at packaging and what chance alone gives."""
    return threshold + feature.expected + chance(feature.size, observations, feature.observations, false_alarms)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Clicks that the ranker predicted for the items it showed, and clicks there were."""

    shown: int
    predicted: float
    variance: float  # sum of p (1 - p)
    clicked: int

    @property
    def ratio(self) -> float:
        """Predicted over clicked, 1 where both are none; above 1 the ranker promises too much."""
        return (self.predicted + 1) / (self.clicked + 1)

    def drifted(self, *, tolerance: float, sigmas: float = 4.0) -> bool:
        """Off by more than `tolerance` (of the predicted clicks) and by more than chance: `sigmas` of a sum of independent clicks."""
        off = abs(self.clicked - self.predicted)
        return off > tolerance * max(self.predicted, 1.0) and off > sigmas * max(self.variance, 1.0) ** 0.5
