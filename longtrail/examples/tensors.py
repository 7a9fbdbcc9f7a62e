"""Numbers to model inputs. Training, evaluation and the service call these same three functions, so that their inputs cannot differ.

B requests, L history, C candidates, F item statistics, G user statistics.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longtrail.catalogue import Catalogue
from longtrail.errors import HistoryError
from longtrail.history import HistoryArrays
from longtrail.models.contracts import Candidates, Context, History
from longtrail.schema import ITEM_STATISTICS, USER_STATISTICS
from longtrail.statistics import item_features, user_features

Ints = NDArray[Any]


def history_tensors(arrays: HistoryArrays, catalogue: Catalogue) -> History:
    """int64 [B, L] each, with the category of every item. Raises HistoryError for an item beyond the catalogue."""
    return History(
        items_BL=torch.from_numpy(arrays.items_BL),
        categories_BL=torch.from_numpy(_categories(arrays.items_BL, catalogue)),
        actions_BL=torch.from_numpy(arrays.actions_BL),
        times_BL=torch.from_numpy(arrays.times_BL),
        lengths_B=torch.from_numpy(arrays.lengths_B),
    )


def candidate_tensors(items_BC: Ints, lengths_B: Ints, statistics: Mapping[str, Ints], catalogue: Catalogue, prior: float) -> Candidates:
    """`items_BC`, right-padded with 0; `statistics`: int64 [B, C] for each of schema.ITEM_STATISTICS; `prior`: the training click rate.

    Statistics of padded places come out as 0. Raises HistoryError for an item beyond the catalogue.
    """
    items_BC = np.ascontiguousarray(items_BC, dtype=np.int64)
    lengths_B = np.ascontiguousarray(lengths_B, dtype=np.int64)
    events, impressions, clicks = (np.asarray(statistics[name], dtype=np.int64) for name in ITEM_STATISTICS)
    features_BCF = item_features(events, impressions, clicks, prior)
    features_BCF[np.arange(items_BC.shape[1]) >= lengths_B[:, None]] = 0
    return Candidates(
        items_BC=torch.from_numpy(items_BC),
        categories_BC=torch.from_numpy(_categories(items_BC, catalogue)),
        statistics_BCF=torch.from_numpy(features_BCF),
        lengths_B=torch.from_numpy(lengths_B),
    )


def context_tensors(history_length_B: Ints, statistics: Mapping[str, Ints], times_B: Ints, prior: float) -> Context:
    """`history_length_B`: all events before the request, not only those a model reads; `statistics`: int64 [B] for each of USER_STATISTICS."""
    impressions, clicks = (np.asarray(statistics[name], dtype=np.int64) for name in USER_STATISTICS)
    return Context(
        statistics_BG=torch.from_numpy(user_features(np.asarray(history_length_B, dtype=np.int64), impressions, clicks, prior)),
        times_B=torch.from_numpy(np.ascontiguousarray(times_B, dtype=np.int64)),
    )


def _categories(items: Ints, catalogue: Catalogue) -> Ints:
    if items.size and (items.max() > catalogue.items or items.min() < 0):
        wrong = items.max() if items.max() > catalogue.items else items.min()
        raise HistoryError(f"item_id {wrong} is unknown; expected 0 (padding) to {catalogue.items}, the items of the catalogue")
    return catalogue.categories[items]
