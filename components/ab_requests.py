"""The requests of an offline A/B test: read from the tables, given their point-in-time features, scored by the models under test.

R requests, C candidates (right-padded with 0), K places, F features of the reward model, N rows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from longtrail.errors import EvaluationError
from longtrail.files import read_json
from longtrail.offpolicy.bandit import bandit_requests
from longtrail.schema import IMPRESSIONS, ITEM_STATISTICS, PROPENSITY_METADATA, USER_STATISTICS, Propensity

if TYPE_CHECKING:
    from longtrail.examples import FeatureSet
    from longtrail.offpolicy.evidence import LogHealth

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

CANDIDATES_FILE = "candidates.parquet"
MAX_CATEGORIES = 12  # our choice: the largest are segments of the report, the others one together
_CELLS = 16_384  # candidate cells scored at a time


@dataclass(frozen=True, kw_only=True)
class RequestSet:
    """Who asked, when, and what could have been shown."""

    users_R: Ints
    times_R: Ints  # UTC µs
    items_RC: Ints
    lengths_R: Ints

    @property
    def real(self) -> NDArray[np.bool_]:
        """[R, C] where there is a candidate."""
        return np.arange(self.items_RC.shape[1]) < self.lengths_R[:, None]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What was shown in each request. `shown_RK` are columns of the candidates, -1 after the end."""

    shown_RK: Ints
    positions_RK: Ints
    clicks_RK: Floats
    propensities_RK: Floats
    kind: Propensity


@dataclass(frozen=True, kw_only=True)
class RequestFeatures:
    """What was known at each request's time: history lengths [R], user statistics [R] and item statistics [R, C] by name."""

    history_length_R: Ints
    user: dict[str, Ints]
    item: dict[str, Ints]


def propensity_kind(impressions: Path) -> Propensity:
    """What the propensities of an impressions table mean, from its Parquet metadata; NONE where it does not say."""
    metadata = pq.read_schema(impressions).metadata or {}
    return Propensity(metadata.get(PROPENSITY_METADATA.encode(), b"none").decode())


def rated_requests(features: "FeatureSet", max_candidates: int, max_requests: int | None) -> tuple[RequestSet, Floats]:
    """The bandit conversion's requests, from the test period's rows, and the label of every candidate [R, C]."""
    table = features.examples("test")
    users_N, items_N = (table[name].to_numpy() for name in ("user_id", "item_id"))
    times_N, clicks_N = _micros(table["timestamp"]), table["click"].to_numpy().astype(np.float64)
    made = bandit_requests(users_N, times_N, max_candidates, max_requests=max_requests)
    rows, real = np.maximum(made.rows_RC, 0), made.rows_RC >= 0
    first = rows[:, 0]
    requests = RequestSet(users_R=users_N[first], times_R=times_N[first], items_RC=np.where(real, items_N[rows], 0), lengths_R=made.lengths_R)
    return requests, np.where(real, clicks_N[rows], 0.0)


def logged_requests(tables: Path, features: "FeatureSet", *, whole_catalogue: bool) -> tuple[RequestSet, Shown]:
    """The test period's lists as they were logged, with the candidates they were chosen from (`candidates.parquet`, or the whole catalogue).

    Only the test period: the models have learned from the clicks before it. Raises EvaluationError where the log cannot answer.
    """
    wanted = pc.unique(features.examples("test")["request_id"].combine_chunks())
    log = _rows_of(tables / "impressions.parquet", wanted, IMPRESSIONS.names)
    if not log.num_rows:
        raise EvaluationError(f"{tables / 'impressions.parquet'}: no impressions in the test period; expected the requests of examples/test.parquet")
    log = log.sort_by([("request_id", "ascending"), ("position", "ascending")])
    names, request_N = np.unique(log["request_id"].to_numpy(zero_copy_only=False), return_inverse=True)
    starts = np.flatnonzero(np.diff(request_N, prepend=-1))
    place_N = np.arange(len(request_N)) - starts[request_N]
    items_N = log["item_id"].to_numpy()
    if whole_catalogue:
        count = features.catalogue.items
        items_RC, lengths_R = np.broadcast_to(np.arange(1, count + 1), (len(names), count)), np.full(len(names), count)
    else:
        items_RC, lengths_R = _candidate_sets(tables / CANDIDATES_FILE, names)
    column_N = _columns_of(items_RC, request_N, items_N, names)
    width = int(place_N.max()) + 1

    def grid(values: NDArray[Any], padding: float) -> NDArray[Any]:
        out = np.full((len(names), width), padding, dtype=values.dtype)
        out[request_N, place_N] = values
        return out

    propensities = log["propensity"].to_numpy(zero_copy_only=False).astype(np.float64)
    _check_propensities(tables, names[request_N], propensities)
    requests = RequestSet(
        users_R=log["user_id"].to_numpy()[starts], times_R=_micros(log["timestamp"])[starts], items_RC=items_RC, lengths_R=lengths_R
    )
    return requests, Shown(
        shown_RK=grid(column_N, -1),
        positions_RK=grid(log["position"].to_numpy().astype(np.int64), 1),
        clicks_RK=grid(log["click"].to_numpy().astype(np.float64), 0),
        propensities_RK=grid(propensities, 1),
        kind=propensity_kind(tables / "impressions.parquet"),
    )


def request_features(feast: Path, requests: RequestSet) -> RequestFeatures:
    """Every candidate's features as they were strictly before the request, by the definitions that training used (Feast)."""
    from features.definitions import RANKING
    from features.point_in_time import PointInTime

    request_N, column_N = np.nonzero(requests.real)
    values = PointInTime(feast, named=False).features(
        RANKING, requests.times_R[request_N], user_id=requests.users_R[request_N], item_id=requests.items_RC[request_N, column_N]
    )
    first_R = np.searchsorted(request_N, np.arange(len(requests.users_R)))
    item = {name: np.zeros(requests.items_RC.shape, np.int64) for name in ITEM_STATISTICS}
    for name, grid in item.items():
        grid[request_N, column_N] = values[name]
    user = {name: values[name][first_R] for name in USER_STATISTICS}
    return RequestFeatures(history_length_R=values["history_length"][first_R], user=user, item=item)


def score(model: Path, features: "FeatureSet", requests: RequestSet, known: RequestFeatures) -> Floats:
    """[R, C] a ranker's logits of every candidate; 0 at padding. Raises ModelError where the model does not fit the features."""
    import torch

    from longtrail.examples import candidate_tensors, context_tensors, history_tensors
    from longtrail.models.store import check_fits, load_model

    loaded = load_model(model)
    check_fits(loaded.card, features.sizes, features.actions)
    catalogue, prior = features.catalogue, loaded.card.prior_click_rate
    max_history = getattr(loaded.card.settings, "max_history", 1)
    out = np.zeros(requests.items_RC.shape)
    order = np.lexsort((requests.lengths_R, np.minimum(known.history_length_R, max_history)))  # alike histories together: little padding
    step = max(1, _CELLS // requests.items_RC.shape[1])
    for start in range(0, len(order), step):
        block = order[start : start + step]
        width = int(requests.lengths_R[block].max())
        history = history_tensors(features.history.gather(requests.users_R[block], known.history_length_R[block], max_history), catalogue)
        item = {name: grid[block, :width] for name, grid in known.item.items()}
        candidates = candidate_tensors(requests.items_RC[block, :width], requests.lengths_R[block], item, catalogue, prior)
        user = {name: values[block] for name, values in known.user.items()}
        context = context_tensors(known.history_length_R[block], user, requests.times_R[block], prior)
        with torch.inference_mode():
            out[block, :width] = loaded.module(history, candidates, context).double().numpy()
    return np.where(requests.real, out, 0.0)


def reward_features(features: "FeatureSet", requests: RequestSet, known: RequestFeatures, *scores: Floats) -> Floats:
    """[R, C, F] what the reward model knows of a candidate: the models' standardised scores, item and user statistics."""
    from longtrail.statistics import item_features, user_features

    events, impressions, clicks = (known.item[name] for name in ITEM_STATISTICS)
    item = item_features(events, impressions, clicks, features.prior_click_rate)
    shown, clicked = (known.user[name] for name in USER_STATISTICS)
    user = user_features(known.history_length_R, shown, clicked, features.prior_click_rate)
    user_RC = np.broadcast_to(user[:, None, :], (*item.shape[:2], user.shape[1]))
    return np.concatenate([np.stack(scores, axis=2), item, user_RC], axis=2).astype(np.float64)


def context(requests: RequestSet, shown: Shown, known: RequestFeatures, tables: Path) -> dict[str, NDArray[Any]]:
    """[R, K] what is known of each shown item: time, the user's history length, the item and the name of its category, for segments and checks."""
    places = shown.shown_RK.shape[1]
    items_RK = np.where(shown.shown_RK >= 0, np.take_along_axis(requests.items_RC, np.maximum(shown.shown_RK, 0), axis=1), 0)
    table = pq.read_table(tables / "items.parquet", columns=["item_id", "category"])
    names = np.full(int(table["item_id"].to_numpy().max(initial=0)) + 1, "unknown", dtype=object)
    names[table["item_id"].to_numpy()] = table["category"].fill_null("unknown").to_numpy()
    counts = pc.value_counts(pa.array(names[items_RK[items_RK > 0]], pa.string())).to_pylist()
    largest = [row["values"] for row in sorted(counts, key=lambda row: -row["counts"])[:MAX_CATEGORIES]]
    names[~np.isin(names.astype(str), largest)] = "all others"
    return {
        "time": np.repeat(requests.times_R[:, None], places, axis=1),
        "history_length": np.repeat(known.history_length_R[:, None], places, axis=1),
        "item": items_RK,
        "category": names[items_RK],
    }


def log_health(tables: Path) -> "LogHealth":
    """What ingest found that should not be in a log: duplicates, and clicks that fit no shown item where the source counted them."""
    from longtrail.ingest import DUPLICATE_IMPRESSION
    from longtrail.offpolicy.evidence import LogHealth

    counts = read_json(tables / "counts.json")
    stray = counts.get("clicks_without_impression")
    clicks = None if stray is None else int(counts.get("clicks", 0)) + int(stray)
    return LogHealth(repeated_rows=int(counts.get("reasons", {}).get(DUPLICATE_IMPRESSION, 0)), stray_clicks=stray, clicks=clicks)


def _candidate_sets(path: Path, names: NDArray[Any]) -> tuple[Ints, Ints]:
    """[R, C] distinct candidates of each request, sorted by id, and how many [R]."""
    if not path.is_file():
        raise EvaluationError(
            f"{path}: no such file; a log can only be judged with the candidates each list was chosen from (request_id, item_id). "
            "Log them, or set ab_test.source to bandit"
        )
    table = _rows_of(path, pa.array(names, pa.string()), ["request_id", "item_id"])
    request = np.searchsorted(names, table["request_id"].to_numpy(zero_copy_only=False))
    pairs = np.unique(np.stack([request, table["item_id"].to_numpy()]), axis=1)
    lengths = np.bincount(pairs[0], minlength=len(names))
    starts = np.cumsum(lengths) - lengths
    items = np.zeros((len(names), int(lengths.max(initial=1))), np.int64)
    items[pairs[0], np.arange(pairs.shape[1]) - starts[pairs[0]]] = pairs[1]
    return items, lengths


def _columns_of(items_RC: Ints, request_N: Ints, items_N: Ints, names: NDArray[Any]) -> Ints:
    """[N] where each shown item stands among its request's candidates. Raises EvaluationError naming a request that shows something else."""
    found = np.zeros(len(items_N), np.int64)
    missing = np.zeros(len(items_N), bool)
    step = max(1, (1 << 22) // items_RC.shape[1])
    for start in range(0, len(items_N), step):
        block = slice(start, start + step)
        same = items_RC[request_N[block]] == items_N[block, None]
        found[block], missing[block] = same.argmax(axis=1), ~same.any(axis=1)
    if missing.any():
        row = int(np.argmax(missing))
        raise EvaluationError(
            f"candidates: request {names[request_N[row]]} shows item {items_N[row]}, which is not among its candidates "
            f"({int(missing.sum())} such rows)"
        )
    return found


def _check_propensities(tables: Path, requests_N: NDArray[Any], propensities_N: Floats) -> None:
    bad = ~((propensities_N > 0) & (propensities_N <= 1))
    if bad.any():
        row = int(np.argmax(bad))
        raise EvaluationError(
            f"{tables / 'impressions.parquet'}: request {requests_N[row]}: propensity is {propensities_N[row]}; expected a number in (0, 1] "
            f"({int(bad.sum())} such rows of {len(bad)} in the test period)"
        )


def _rows_of(path: Path, requests: pa.Array, columns: list[str]) -> pa.Table:
    """The rows of a table whose request_id is among `requests`; the file is streamed."""
    return ds.dataset(path).to_table(columns=columns, filter=pc.field("request_id").isin(requests))


def _micros(column: pa.ChunkedArray) -> Ints:
    return column.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()
