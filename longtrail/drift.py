"""Has what the service sees moved away from what the models learned from? Histograms, their distance, and how much of it is chance.

k bins of a feature, n effective observations (requests of different users), m of the reference.
"""

import json
from collections.abc import Mapping, Sequence
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
    """One feature's reference. `edges` [k - 1] part the bins; `training` and `newest` [k] count values in the training requests, and in
    the newest requests of the log read as the service reads them. Counts grow, so these two differ already: what has changed since packaging is told
    by `newest`.
    """

    edges: list[float]
    training: list[float]
    newest: list[float]
    training_observations: float
    newest_observations: float

    def bins(self, values: Floats | Ints) -> Ints:
        """The bin of each value: bin i holds edges[i - 1] <= value < edges[i]."""
        return np.searchsorted(np.asarray(self.edges, np.float64), np.asarray(values, np.float64), side="right").astype(np.int64)

    @property
    def size(self) -> int:
        return len(self.newest)


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


def make_feature(
    training: Floats | Ints, newest: Floats | Ints, *, training_observations: float, newest_observations: float, bins: int = BINS
) -> Feature:
    """Reference of both, neither empty, in bins parted by the quantiles of each, half of the bins' edges from either (fewer where values repeat)."""
    half = np.arange(1, bins // 2 + 1) / (bins // 2 + 1)
    values = [np.asarray(each, np.float64) for each in (training, newest)]
    edges = np.unique(np.concatenate([np.quantile(each, half, method="higher") for each in values]))
    edges = edges[edges > min(each.min() for each in values)]
    counts = [np.bincount(np.searchsorted(edges, each, side="right"), minlength=len(edges) + 1).astype(float).tolist() for each in values]
    return Feature(
        edges=edges.tolist(),
        training=counts[0],
        newest=counts[1],
        training_observations=training_observations,
        newest_observations=newest_observations,
    )


def psi(reference: Sequence[float] | Floats | Ints, counts: Sequence[float] | Floats | Ints) -> float:
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
    """The index against `newest` from which a feature has drifted: `threshold` beyond what chance alone gives."""
    return threshold + chance(feature.size, observations, feature.newest_observations, false_alarms)


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
