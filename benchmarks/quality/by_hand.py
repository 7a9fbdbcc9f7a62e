"""What statistics made by hand reach on MovieLens, like or not, by how much of the history they see: does the log hold more than a model finds?

    python -m benchmarks.quality.by_hand --features build/quality/data/ml-1m-click-*/features

A logistic regression, fitted to the newest 100,000 ratings of the training period. Similarities of films come from older ratings alone, so that no
label is in its own features. E rows, U users, N items; a window is the newest L events before a row.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numba import njit
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from components.command import run
from longtrail.examples import FeatureSet
from longtrail.examples.features import column
from longtrail.metrics import auc, gauc
from longtrail.schema import ITEM_STATISTICS, USER_STATISTICS
from longtrail.statistics import item_features, user_features

Floats = NDArray[Any]
Ints = NDArray[np.int64]

NEWEST = 100_000
WHOLE = 1 << 30
HALF_LIVES = (2.0, 7.0, 20.0, 70.0)  # events
_LEAST_SIMILARITY = 0.05


@njit(cache=True)
def window_features(  # type: ignore[no-untyped-def]
    users_E, items_E, lengths_E, length, items, above, liked, offsets, categories_N, similarity_NN, out_EF
):  # pragma: no cover
    """Like rate and mean of `above` (rating less the film's mean) in each row's window; the latter among the candidate's genres and films like it."""
    for e in range(len(users_E)):
        end = offsets[users_E[e] - 1] + lengths_E[e]
        start = max(offsets[users_E[e] - 1], end - length)
        n = end - start
        bias = above[start:end].sum() / (n + 5)
        same, same_sum, near, near_sum = 0.0, 0.0, 0.0, 0.0
        for j in range(start, end):
            if categories_N[items[j]] == categories_N[items_E[e]]:
                same, same_sum = same + 1, same_sum + above[j] - bias
            s = similarity_NN[items_E[e], items[j]]
            if s > _LEAST_SIMILARITY:
                near, near_sum = near + s, near_sum + s * (above[j] - bias)
        out_EF[e, 0], out_EF[e, 1] = (liked[start:end].sum() + 5) / (n + 10), bias
        out_EF[e, 2], out_EF[e, 3] = same_sum / (same + 3), np.log1p(same)
        out_EF[e, 4], out_EF[e, 5] = near_sum / (near + 0.5), np.log1p(near)


@njit(cache=True)
def recent_features(users_E, lengths_E, above, offsets, half_lives, out_EF):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Decayed means of `above`, an event's weight halved every so many events: how the user rates at the moment."""
    for e in range(len(users_E)):
        first = offsets[users_E[e] - 1]
        end = first + lengths_E[e]
        for k in range(len(half_lives)):
            decay, weight, total, weights = 0.5 ** (1 / half_lives[k]), 1.0, 0.0, 1.0
            for j in range(end - 1, max(first, end - int(8 * half_lives[k])) - 1, -1):
                total, weights, weight = total + weight * above[j], weights + weight, weight * decay
            out_EF[e, k] = total / weights


def similarities(users: Ints, items: Ints, ratings: Floats, shape: tuple[int, int]) -> tuple[Floats, Floats]:
    """Films' mean ratings [N + 1], pulled to that of all, and cosines [N + 1, N + 1] of ratings less both means, pulled to 0 for few raters."""
    count_N, rated_U = np.bincount(items, minlength=shape[1]), np.bincount(users, minlength=shape[0])
    mean_N = (np.bincount(items, ratings, shape[1]) + 5 * ratings.mean()) / (count_N + 5)
    bias_U = np.bincount(users, ratings - mean_N[items], shape[0]) / (rated_U + 5)
    rest_UN = csr_matrix((ratings - mean_N[items] - bias_U[users], (users, items)), shape=shape)
    rated_UN = csr_matrix((np.ones(len(users)), (users, items)), shape=shape)
    squares_NN = (rest_UN.multiply(rest_UN).T @ rated_UN).toarray()
    both_NN = (rated_UN.T @ rated_UN).toarray()
    similarity_NN = (rest_UN.T @ rest_UN).toarray() / (np.sqrt(squares_NN * squares_NN.T) + 1e-9) * both_NN / (both_NN + 50)
    np.fill_diagonal(similarity_NN, 0)
    return mean_N, similarity_NN.astype(np.float32)


class Rows:
    """One split: labels and all features, by name."""

    def __init__(self, features: FeatureSet, split: str, log: dict[str, Any], since: int) -> None:
        table = features.examples(split)
        keep_E = column(table, "timestamp") >= since
        value = {name: column(table, name)[keep_E] for name in ("user_id", "item_id", "history_length", "click", *ITEM_STATISTICS, *USER_STATISTICS)}
        self.users_E, self.clicks_E, self.lengths_E = value["user_id"], value["click"], value["history_length"]
        prior = features.prior_click_rate
        self.item = item_features(value["item_events"], value["item_impressions"], value["item_clicks"], prior)
        self.user = user_features(self.lengths_E, value["user_impressions"], value["user_clicks"], prior)
        self.recent = np.zeros((len(self.users_E), len(HALF_LIVES)))
        recent_features(self.users_E, self.lengths_E, log["above"], log["offsets"], np.array(HALF_LIVES), self.recent)
        self.windows: dict[int, Floats] = {}
        for length in (50, 200, WHOLE):
            self.windows[length] = np.zeros((len(self.users_E), 6))
            window_features(self.users_E, value["item_id"], self.lengths_E, length, out_EF=self.windows[length], **log)

    def some(self, length: int | None, columns: int, recent: bool) -> Floats:
        parts = [self.item, *([] if length is None else [self.user, self.windows[length][:, :columns]]), *([self.recent] if recent else [])]
        return np.hstack(parts)


def by_hand(features: Annotated[Path, typer.Option(help="what the board prepared")]) -> None:
    """A table of validation and test figures."""
    opened = FeatureSet.open(features)
    times = np.sort(column(opened.examples("train"), "timestamp"))
    since = int(times[-NEWEST]) if len(times) > NEWEST else int(times[0])
    users_U = np.arange(1, opened.users + 1)
    flat = opened.history.flat(users_U, opened.history.lengths(users_U), WHOLE)
    ratings, users = flat.actions.astype(np.float64), np.repeat(users_U, np.diff(flat.offsets_B1))
    old = flat.times < since
    mean_N, similarity_NN = similarities(users[old], flat.items[old], ratings[old], (opened.users + 1, opened.sizes.items + 1))
    log = {
        "items": flat.items, "above": ratings - mean_N[flat.items], "liked": (ratings >= 4).astype(np.float64), "offsets": flat.offsets_B1,
        "categories_N": opened.catalogue.categories, "similarity_NN": similarity_NN,
    }  # fmt: skip
    rows = {split: Rows(opened, split, log, since if split == "train" else 0) for split in ("train", "valid", "test")}
    wanted: list[tuple[str, int | None, int, bool]] = [("item statistics", None, 0, False), ("and the user's", WHOLE, 0, False)]
    for name, columns, recent in (
        ("and like rate", 2, False),
        ("and same genres", 4, False),
        ("and films like it", 6, False),
        ("and recency", 6, True),
    ):
        wanted += [(f"{name}, {'whole' if length == WHOLE else length}", length, columns, recent) for length in (50, 200, WHOLE)]
    print("| features | valid AUC | GAUC | test AUC | GAUC | test, over 200 events: AUC | GAUC |\n|---|---|---|---|---|---|---|")
    for name, length, columns, recent in wanted:
        fitted = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows["train"].some(length, columns, recent), rows["train"].clicks_E)
        figures: list[float | None] = []
        for split in ("valid", "test"):
            of, scores_E = rows[split], fitted.decision_function(rows[split].some(length, columns, recent))
            for kept in [of.lengths_E >= 0, of.lengths_E > 200][: 1 + (split == "test")]:
                figures += [auc(of.clicks_E[kept], scores_E[kept]), gauc(of.users_E[kept], of.clicks_E[kept], scores_E[kept])]
        print(f"| {name} | " + " | ".join("–" if value is None else f"{value:.4f}" for value in figures) + " |", flush=True)


if __name__ == "__main__":
    run(by_hand)
