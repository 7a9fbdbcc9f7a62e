"""How good a model is on a split: unsampled metrics and their slices, each with an interval clustered by user.

n rows (ranking: one shown item; retrieval: one target), U users of the split, K list length, N items. A model is asked only what was known at
the request: histories and statistics come point-in-time from the feature set, and retrieval leaves out what the user had already seen.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from torch import nn
from tqdm import tqdm

from longtrail import metrics
from longtrail.bootstrap import Estimate, intervals
from longtrail.config import EvaluationSettings, RetrievalSettings
from longtrail.errors import ModelError
from longtrail.examples import FeatureSet, RankingBatches, TargetBatches, seen_items
from longtrail.examples.features import column
from longtrail.models.contracts import Retriever, RowRetriever
from longtrail.models.store import LoadedModel, check_fits
from longtrail.retrieval.exact import exact_index
from longtrail.retrieval.index import Exclusion, Index
from longtrail.roc import confusion, roc_curve
from longtrail.slices import Slice, by_history_length, by_item_age, by_position, by_train_events

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SEED = 0  # of the resampling: models judged with one seed are judged on the same resampled users
_CURVE_TO = 1000  # the hit-rate curve's largest k


@dataclass(frozen=True, kw_only=True)
class RankingRows:
    """What a ranker said of every shown item of a split."""

    users_n: Ints  # dense user ids
    requests_n: Ints  # index of the row's request in the split
    items_n: Ints
    times_n: Ints  # UTC µs
    lengths_n: Ints  # events available at the request
    positions_n: Ints
    clicks_n: Ints
    logits_n: Floats
    requests: int


@dataclass(frozen=True, kw_only=True)
class RetrievalRows:
    """Where a retriever put every target of a split, and the lists it gave."""

    users_n: Ints  # dense user ids
    items_n: Ints  # the targets
    times_n: Ints  # UTC µs
    lengths_n: Ints  # events available at the request
    seen_n: Ints  # distinct items of them that are left out
    ranks_n: Ints  # from 1 over the whole catalogue less what is left out; 0: the model does not know the item
    lists_nK: Ints
    seen_before: int  # targets left out, because what the user had seen is never recommended
    catalogue: int  # N


@dataclass(frozen=True, kw_only=True)
class SplitResult:
    """A model's figures on one split. `curve` is calibration (ranking) or hit rate (retrieval), as plain rows."""

    counts: dict[str, int]
    metrics: dict[str, Estimate]
    slices: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    classification: dict[str, Any] = field(default_factory=dict)  # ranking: `roc` and `confusion` (longtrail/roc.py)

    def json(self) -> dict[str, Any]:
        plain = [{**s, "metrics": {name: e.json() for name, e in s["metrics"].items()}} for s in self.slices]
        return {**self.counts, "metrics": {name: e.json() for name, e in self.metrics.items()}, "slices": plain}


def evaluate(
    model: LoadedModel,
    features: FeatureSet,
    split: str,
    settings: EvaluationSettings,
    *,
    retrieval: RetrievalSettings | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> SplitResult:
    """Judge `model` on `split` ("valid" or "test"). `retrieval` is how its catalogue is searched.

    Raises HistoryError where the split is empty, ModelError where model and data do not fit.
    """
    check_fits(model.card, features.sizes, features.actions)
    module = model.module.to(device)
    if model.card.stage == "ranking":
        ranking = predict_ranking(module, features, split, device=device, batch_size=batch_size)
        return judge_ranking(ranking, features, settings)
    rows = predict_retrieval(
        module,
        features,
        split,
        k=max(settings.k),
        max_per_user=settings.max_targets_per_user,
        index=exact_index(module, retrieval, threads=settings.threads),
        exclude_seen=retrieval is None or retrieval.exclude_seen,
        device=device,
        batch_size=batch_size,
    )
    return judge_retrieval(rows, features, settings)


# ---------------------------------------------------------------- asking the model


def max_history(module: nn.Module) -> int:
    """Events the model reads; 1 for one that reads none."""
    return getattr(getattr(module, "settings", None), "max_history", 1)


@torch.inference_mode()
def predict_ranking(module: nn.Module, features: FeatureSet, split: str, *, device: torch.device | str = "cpu", batch_size: int = 256) -> RankingRows:
    """Score every shown item of `split` within its request.

    Raises HistoryError where there is none, ModelError where a score is not a number or the module is no ranker.
    """
    if isinstance(module, Retriever | RowRetriever):
        raise ModelError(f"{type(module).__name__} is a retriever; expected a ranker, or predict_retrieval")
    table = features.examples(split)
    batches = RankingBatches(features, split, max_history=max_history(module), batch_size=batch_size)
    logits_n, requests_n = np.full(table.num_rows, np.nan), np.zeros(table.num_rows, np.int64)
    requests = 0
    for batch in _progress(batches, f"rank {split}"):
        batch = batch.to(device)
        logits_BC = module(batch.history, batch.candidates, batch.context)
        real_BC = batch.rows_BC >= 0
        rows_n = batch.rows_BC[real_BC].cpu().numpy()
        logits_n[rows_n] = logits_BC[real_BC].double().cpu().numpy()
        requests_n[rows_n] = batch.requests_B.unsqueeze(1).expand_as(real_BC)[real_BC].cpu().numpy()
        requests += len(batch.requests_B)
    wrong = np.flatnonzero(~np.isfinite(logits_n))
    if len(wrong):
        raise ModelError(f"{len(wrong)} of {len(logits_n)} scores of the {split} split are not finite, first at row {wrong[0]} of its examples")
    names = ("user_id", "item_id", "timestamp", "history_length", "position", "click")
    users_n, items_n, times_n, lengths_n, positions_n, clicks_n = (column(table, name) for name in names)
    return RankingRows(
        users_n=users_n, items_n=items_n, times_n=times_n, lengths_n=lengths_n, positions_n=positions_n, clicks_n=clicks_n, logits_n=logits_n,
        requests_n=requests_n, requests=requests,
    )  # fmt: skip


@torch.inference_mode()
def predict_retrieval(
    module: nn.Module,
    features: FeatureSet,
    split: str,
    *,
    k: int,
    max_per_user: int | None = None,
    index: Index | None = None,
    exclude_seen: bool = True,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> RetrievalRows:
    """Retrieve for every target of `split`, over the whole catalogue less what the user had seen, and find the target's place.

    A target the user had already seen is left out and counted: no list that leaves out the seen can hold it. Without `exclude_seen` nothing is
    left out, and what people come back to counts as any other target. A target newer than the model is a miss. `index` holds the module's items
    (None: exact_index chooses). Memory is one batch's, whatever the catalogue and the split are. Raises HistoryError where there is no target,
    ModelError where a vector is not finite.
    """
    index = index or exact_index(module)
    batches = TargetBatches(features, split, max_history=max_history(module), batch_size=batch_size, max_per_user=max_per_user)
    parts: list[tuple[Ints, ...]] = []
    seen_before = 0
    for batch in _progress(batches, f"retrieve {split}"):
        users_B, targets_B, lengths_B = batch.users_B.numpy(), batch.targets_B.numpy(), batch.history_length_B.numpy()
        seen = Exclusion(*seen_items(features, users_B, lengths_B)) if exclude_seen else _nothing(len(users_B))
        new_B = ~_contains(seen, targets_B)
        known = torch.from_numpy(np.where(targets_B <= index.items, targets_B, 0))
        user_BD = module.user_vectors(batch.to(device).history)  # type: ignore[operator]
        ids_BK, _, ranks_B = index.topk_and_ranks(user_BD, known, k, exclude=seen)
        columns = (users_B, targets_B, batch.times_B.numpy(), lengths_B, np.diff(seen.offsets_B), ranks_B.cpu().numpy(), ids_BK.cpu().numpy())
        parts.append(tuple(values[new_B] for values in columns))
        seen_before += int((~new_B).sum())
    users_n, items_n, times_n, lengths_n, seen_n, ranks_n, lists_nK = (np.concatenate(values) for values in zip(*parts, strict=True))
    return RetrievalRows(
        users_n=users_n, items_n=items_n, times_n=times_n, lengths_n=lengths_n, seen_n=seen_n, ranks_n=ranks_n, lists_nK=lists_nK,
        seen_before=seen_before, catalogue=features.catalogue.items,
    )  # fmt: skip


def _nothing(users: int) -> Exclusion:
    return Exclusion(np.zeros(users + 1, np.int64), np.zeros(0, np.int64))


def _owners(sets: Exclusion) -> Ints:
    return np.repeat(np.arange(len(sets.offsets_B) - 1), np.diff(sets.offsets_B))


def _contains(sets: Exclusion, values_B: Ints) -> NDArray[np.bool_]:
    """[B]: whether set b holds values_B[b]."""
    owners = _owners(sets)
    return np.bincount(owners[sets.items == values_B[owners]], minlength=len(values_B)) > 0


def _progress(batches: Any, what: str) -> Iterator[Any]:
    """A bar on a terminal; elsewhere a line every ten seconds."""
    began = told = time.perf_counter()
    bar = sys.stderr.isatty()
    for done, batch in enumerate(tqdm(batches, desc=what, unit="batch", disable=not bar, leave=False)):
        yield batch
        now = time.perf_counter()
        if not bar and now - told >= 10:
            told = now
            log.info("%s: %d of %d batches, %.0f s", what, done + 1, len(batches), now - began)


# ---------------------------------------------------------------- judging the answers


def judge_ranking(rows: RankingRows, features: FeatureSet, settings: EvaluationSettings) -> SplitResult:
    users_n, size = _dense(rows.users_n)

    def measure(keep: NDArray) -> dict[str, metrics.Contributions]:
        return metrics.ranking_contributions(users_n[keep], rows.requests_n[keep], rows.clicks_n[keep], rows.logits_n[keep], size)

    slices = [*_slices(rows, features), by_position(rows.positions_n)]
    probabilities_n = metrics.sigmoid(rows.logits_n)
    curve = metrics.calibration_contributions(users_n, rows.clicks_n, probabilities_n, size)
    return SplitResult(
        counts={"rows": len(users_n), "requests": rows.requests, "users": size, "clicks": int(rows.clicks_n.sum())},
        metrics=_intervals(measure(np.arange(len(users_n))), settings),
        slices=_judge_slices(slices, measure, settings),
        curve=[{"predicted": p, **e.json()} for p, e in _intervals(curve, settings).items()],
        classification={"roc": roc_curve(rows.clicks_n, probabilities_n), "confusion": confusion(rows.clicks_n, probabilities_n)},
    )


def judge_retrieval(rows: RetrievalRows, features: FeatureSet, settings: EvaluationSettings) -> SplitResult:
    users_n, size = _dense(rows.users_n)

    def measure(keep: NDArray) -> dict[str, metrics.Contributions]:
        return metrics.retrieval_contributions(users_n[keep], rows.ranks_n[keep], settings.k, size)

    estimates = _intervals(measure(np.arange(len(users_n))), settings)
    for k in settings.k:
        estimates[f"coverage@{k}"] = _coverage(rows, k, settings.confidence)
    curve = metrics.hit_rate_contributions(users_n, rows.ranks_n, min(_CURVE_TO, rows.catalogue), size)
    return SplitResult(
        counts={"rows": len(users_n), "users": size, "targets_seen_before": rows.seen_before, "catalogue": rows.catalogue},
        metrics=estimates,
        slices=_judge_slices(_slices(rows, features), measure, settings),
        curve=[{"k": k, **e.json()} for k, e in _intervals(curve, settings).items()],
    )


def _coverage(rows: RetrievalRows, k: int, confidence: float) -> Estimate:
    value, error = metrics.coverage(rows.users_n, rows.lists_nK, k, rows.catalogue)
    if value is None:
        return Estimate(value=None, reason="no rows")
    if error is None:
        return Estimate(value=value, reason="no interval: 1 user(s)")
    reach = float(norm.ppf((1 + confidence) / 2)) * error
    return Estimate(value=value, low=max(value - reach, 0.0), high=min(value + reach, 1.0))


def _dense(users_n: Ints) -> tuple[Ints, int]:
    distinct, dense_n = np.unique(users_n, return_inverse=True)
    return dense_n.astype(np.int64), len(distinct)


def _intervals(contributions: dict[Any, metrics.Contributions], settings: EvaluationSettings) -> dict[Any, Estimate]:
    return intervals(contributions, confidence=settings.confidence, replicates=settings.replicates, seed=SEED)


def _slices(rows: RankingRows | RetrievalRows, features: FeatureSet) -> list[Slice]:
    return [
        by_history_length(rows.lengths_n),
        by_item_age(rows.times_n, features.catalogue.first_seen[rows.items_n]),
        by_train_events("user", features.train_lengths[rows.users_n]),
        by_train_events("item", features.catalogue.train_events[rows.items_n]),
    ]


def _judge_slices(
    slices: Sequence[Slice], measure: Callable[[NDArray], dict[str, metrics.Contributions]], settings: EvaluationSettings
) -> list[dict[str, Any]]:
    """One entry a bucket that has rows; a slice with a single bucket says nothing new but is kept, so that reports line up."""
    result = []
    for cut in slices:
        kept = [(label, rows) for b, label in enumerate(cut.labels) if len(rows := np.flatnonzero(cut.buckets_n == b))]
        measured = {(label, name): c for label, rows in kept for name, c in measure(rows).items()}
        estimates = _intervals(measured, settings)
        for label, rows in kept:
            found = {name: estimate for (bucket, name), estimate in estimates.items() if bucket == label}
            result.append({"slice": cut.name, "bucket": label, "rows": len(rows), "metrics": found})
    return result
