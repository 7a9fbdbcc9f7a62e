"""What a new model is given before its first step: RecJPQ codes, item vectors near those of the items that the same people had to do with.

A log of 100,000 rows is over-fitted in two epochs, too few for random item vectors to find out which items are alike: rankers that start there
order a request's candidates no better than the items' click rates do (docs/training.md). Our choice, not the papers'.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD

from longtrail.config import RankerSettings, RecJPQItemsSettings
from longtrail.errors import ModelError
from longtrail.examples import FeatureSet
from longtrail.models.contracts import StartsAttention
from longtrail.models.items.factory import item_slots
from longtrail.training.codes import assign_codes
from longtrail.training.interactions import before_held_out, interaction_matrix, unlabelled_until


def start(module: Any, features: FeatureSet, settings: Any, *, seed: int, since: int | None = None) -> None:
    """Codes, start vectors and what attention makes of them, as `settings` say, from the training period alone.

    A ranker's are of events that tell neither the clicks of the newer half of what it learns from, which is from `since` (UTC µs) on
    (`unlabelled_until`), nor those held out (`before_held_out`). Not for a training that is resumed: its weights hold all of it.

    Raises ModelError for a ranker without an `embedding` that can start.
    """
    items, until = getattr(settings, "items", None), None
    ranks = isinstance(settings, RankerSettings)
    if ranks and (settings.item_start == "cooccurrence" or isinstance(items, RecJPQItemsSettings)):
        features = before_held_out(features)
        until = unlabelled_until(features, since=since)
    if isinstance(items, RecJPQItemsSettings):
        assigned = assign_codes(features, items, seed=seed, until=until)
        for slot in item_slots(module):
            slot.set_codes(torch.from_numpy(assigned.codes_NM), torch.from_numpy(assigned.levels_Mb))
    if ranks and settings.item_start == "cooccurrence":
        if not hasattr(getattr(module, "embedding", None), "start_items"):
            raise ModelError(f"{type(module).__name__} has no embedding.start_items; expected a BehaviourEmbedding there, or item_start: random")
        module.embedding.start_items(torch.from_numpy(cooccurrence_vectors(features, settings.width, seed=seed, until=until)))
    if isinstance(module, StartsAttention):
        items_n = met_items(features, seed=seed)
        module.start_attention(torch.from_numpy(items_n), torch.from_numpy(features.catalogue.categories[items_n]))


def met_items(features: FeatureSet, *, seed: int, most: int = 10_000) -> NDArray[np.int64]:
    """Items drawn as often as the training period's events name them; all items alike where it has no events."""
    events_N = features.catalogue.train_events.astype(np.float64)
    events_N[0] = 0
    if not events_N.any():
        events_N[1:] = 1
    return np.random.default_rng(seed).choice(len(events_N), size=most, p=events_N / events_N.sum())


def cooccurrence_vectors(features: FeatureSet, width: int, *, seed: int, until: int | None = None) -> NDArray[np.float32]:
    """[N + 1, width]: right singular vectors, times their values, of the binary user x item matrix of the training period's interactions.

    Of those before `until` (UTC µs), where it is given: `unlabelled_until` says when interactions are labels. Columns past the matrix's rank are
    drawn from a normal distribution of the same spread.
    """
    matrix_UN = interaction_matrix(features, binary=True, until=until)
    shape = matrix_UN.shape
    rank = min(width, *(size - 1 for size in shape), matrix_UN.nnz)
    vectors_NW = np.random.default_rng(seed).normal(size=(shape[1], width))
    if rank > 0:
        svd = TruncatedSVD(n_components=rank, random_state=seed).fit(matrix_UN)
        found_NR = svd.components_.T * svd.singular_values_
        vectors_NW *= found_NR.std() or 1.0
        vectors_NW[:, :rank] = found_NR
    vectors_NW[0] = 0
    return vectors_NW.astype(np.float32)
