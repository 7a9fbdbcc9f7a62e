"""The lists of the last hour against what the models learned from: a sliding window, cheap enough for the running service.

A request leaves a reference in a queue; a background thread bins it (items' bins are resident), so the request itself pays an append.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtrail.catalogue import Catalogue
from longtrail.config import DriftSettings
from longtrail.drift import GIVEN, ITEM_FEATURES, REQUEST_FEATURES, RETRIEVED, Calibration, Reference, effective, limit, psi
from longtrail.schema import USER_STATISTICS
from longtrail.statistics import smoothed_rate
from serving.lists import UNKNOWN_USER, Shown

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class FeatureDrift:
    """Stability indices of one feature, the index (`psi`, against packaging) from which it has drifted, and the window's histogram [k]."""

    psi: float
    psi_training: float
    limit: float
    counts: list[int]
    observations: float


@dataclass(frozen=True, kw_only=True)
class Drift:
    """One look. `alarms` says in words what has drifted, none while the window is too small."""

    features: dict[str, FeatureDrift]
    measures: dict[str, float]
    calibration: Calibration
    alarms: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """What is kept of a list until it is binned: no history, which may be long."""

    at: float
    known: bool
    retrieved: bool
    statistics: tuple[int, int, int] | None  # history_length, user_impressions, user_clicks; None without a personal list
    candidates: Ints
    items: Ints
    scores: NDArray[np.float64]

    @classmethod
    def of(cls, at: float, shown: Shown) -> "Listed":
        evidence = shown.evidence
        statistics = None if evidence is None else (evidence.total, *(int(evidence.user[name][0]) for name in USER_STATISTICS))
        return cls(
            at=at,
            known=shown.fallback != UNKNOWN_USER,
            retrieved=shown.retrieved,
            statistics=statistics,  # type: ignore[arg-type]
            candidates=shown.candidates,
            items=shown.items,
            scores=shown.scores,
        )


@dataclass(kw_only=True)
class Row:
    """One list, as far as drift is concerned. Without a personal list all but the first three are empty."""

    at: float
    user: int
    new_user: bool
    values: dict[str, float] = field(default_factory=dict)  # REQUEST_FEATURES
    items: dict[str, Ints] = field(default_factory=dict)  # counts [k] by name of the item feature
    candidates: int = 0
    new_items: int = 0
    scores: dict[int, float] = field(default_factory=dict)  # of the items shown
    clicked: set[int] = field(default_factory=set)


class RowMaker:
    """Turns a list into a Row by resident tables."""

    def __init__(self, reference: Reference, catalogue: Catalogue, prior_click_rate: float, trained_users: int) -> None:
        """Users whose dense id is above `trained_users` are new."""
        self.reference = reference
        self._prior = prior_click_rate
        self._trained = trained_users
        rates = smoothed_rate(catalogue.item_clicks, catalogue.item_impressions, prior_click_rate)
        values: dict[str, Any] = dict(zip(ITEM_FEATURES, (catalogue.item_events, rates), strict=True))
        self._bins = {
            f"{name}.{source}": reference.features[f"{name}.{source}"].bins(values[name]) for name in ITEM_FEATURES for source in (GIVEN, RETRIEVED)
        }
        self._new = catalogue.train_events == 0

    def row(self, user: int | None, shown: Listed) -> Row:
        """`user` is a dense id, None for an unknown one."""
        row = Row(at=shown.at, user=user or 0, new_user=user is None or user > self._trained)
        if shown.statistics is None:
            return row
        total, impressions, clicks = shown.statistics
        rate = float(smoothed_rate(np.array(clicks), np.array(impressions), self._prior))
        row.values = dict(zip(REQUEST_FEATURES, (float(total), float(impressions), rate), strict=True))
        source = RETRIEVED if shown.retrieved else GIVEN
        for name in (f"{each}.{source}" for each in ITEM_FEATURES):
            row.items[name] = np.bincount(self._bins[name][shown.candidates], minlength=self.reference.features[name].size)
        row.candidates, row.new_items = len(shown.candidates), int(self._new[shown.candidates].sum())
        row.scores = dict(zip(shown.items.tolist(), shown.scores.tolist(), strict=True))
        return row


def measure(rows: Sequence[Row], reference: Reference, settings: DriftSettings, *, at: float) -> Drift:
    """One look at `rows`; lists younger than `click_minutes` at `at` are left out of the calibration."""
    personal = [row for row in rows if row.values]
    features, alarms = {}, []
    for name, expected in reference.features.items():
        if name in REQUEST_FEATURES:
            chosen = personal
            counts = np.bincount(expected.bins(np.array([row.values[name] for row in chosen])), minlength=expected.size)
        else:
            chosen = [row for row in personal if name in row.items]
            counts = np.sum([row.items[name] for row in chosen], axis=0, dtype=np.int64) if chosen else np.zeros(expected.size, np.int64)
        if not chosen:
            continue
        observations = effective(np.array([row.user for row in chosen]))
        allowed = limit(expected, observations, threshold=settings.threshold, false_alarms=settings.false_alarms / len(reference.features))
        index = psi(expected.newest, counts)
        features[name] = FeatureDrift(
            psi=index, psi_training=psi(expected.training, counts), limit=allowed, counts=counts.tolist(), observations=observations
        )
        if index > allowed and len(chosen) >= settings.min_requests:
            alarms.append(f"{name}: stability index {index:.3f} against packaging; expected at most {allowed:.3f}")
    calibration = calibrate([row for row in personal if at - row.at >= 60 * settings.click_minutes])
    measures = {
        "window_requests": float(len(rows)),
        "new_user_share": sum(row.new_user for row in rows) / max(len(rows), 1),
        "new_item_share": sum(row.new_items for row in personal) / max(sum(row.candidates for row in personal), 1),
        "calibration_ratio": calibration.ratio,
        "predicted_clicks": calibration.predicted,
        "clicks": float(calibration.clicked),
    }
    if len(rows) >= settings.min_requests:
        for name, most in (("new_user_share", settings.max_new_user_share), ("new_item_share", settings.max_new_item_share)):
            if measures[name] > most:
                alarms.append(f"{name}: {measures[name]:.3f}; expected at most {most:g}")
        if calibration.drifted(tolerance=settings.calibration):
            alarms.append(f"calibration: {calibration.predicted:.1f} clicks predicted on {calibration.shown} items shown, {calibration.clicked} seen")
    measures["alarms"] = float(len(alarms))
    return Drift(features=features, measures=measures, calibration=calibration, alarms=alarms)


def calibrate(rows: Sequence[Row]) -> Calibration:
    scores = np.array([score for row in rows for score in row.scores.values()])
    return Calibration(
        shown=len(scores),
        predicted=float(scores.sum()),
        variance=float((scores * (1 - scores)).sum()),
        clicked=sum(len(row.clicked & row.scores.keys()) for row in rows),
    )


class DriftWindow:
    """The window of a running service. `listed` and `logged` are called by requests and only append; `look` by one background thread."""

    def __init__(
        self,
        maker: RowMaker,
        settings: DriftSettings,
        *,
        users: Callable[[str], int | None],
        items: Callable[[str], int | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`users`, `items`: raw key to dense id, None where unknown."""
        self._maker = maker
        self._settings = settings
        self._users, self._items, self._clock = users, items, clock
        self._fresh: deque[tuple[str, str, Listed]] = deque(maxlen=settings.window_requests)
        self._clicks: deque[tuple[str, str]] = deque(maxlen=4 * settings.window_requests)
        self._rows: OrderedDict[str, Row] = OrderedDict()

    def listed(self, request_id: str, user_key: str, shown: Shown) -> None:
        self._fresh.append((request_id, user_key, Listed.of(self._clock(), shown)))

    def logged(self, events: Sequence[Any]) -> None:
        """Events (serving.event_records.LoggedEvent) that were accepted: those with a request are its clicks."""
        self._clicks.extend((event.request, event.item) for event in events if event.request is not None)

    def look(self) -> Drift:
        while self._fresh:
            request_id, user_key, shown = self._fresh.popleft()
            self._rows[request_id] = self._maker.row(self._users(user_key) if shown.known else None, shown)
        while self._clicks:
            request_id, key = self._clicks.popleft()
            row, item = self._rows.get(request_id), self._items(key)
            if row is not None and item is not None:
                row.clicked.add(item)
        oldest = self._clock() - 60 * self._settings.window_minutes
        while self._rows and (len(self._rows) > self._settings.window_requests or next(iter(self._rows.values())).at < oldest):
            self._rows.popitem(last=False)
        return measure(list(self._rows.values()), self._maker.reference, self._settings, at=self._clock())
