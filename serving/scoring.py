"""From features to scores: the same tensors as in training (longtrail.examples), one vectorised pass a request, no BentoML and no Feast.

B requests, L history, C candidates, D width, N items, K results.
"""

from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from longtrail.catalogue import Catalogue
from longtrail.config import Model
from longtrail.examples import candidate_tensors, context_tensors, history_tensors
from longtrail.history import HistoryArrays
from longtrail.models.attention.fused import serving
from longtrail.models.attention.user_state import UserState
from longtrail.models.contracts import Ranker, Retriever, RowRetriever
from longtrail.models.store import LoadedModel
from longtrail.retrieval.exact import exact_index
from longtrail.retrieval.index import Exclusion, Index
from longtrail.schema import ITEM_STATISTICS
from serving.user_states import UserStates

Ints = NDArray[np.int64]
Statistics = Mapping[str, Ints]


class Scorer:
    """Both models with what they need resident: catalogue, item statistics, item vectors."""

    def __init__(
        self,
        *,
        retriever: LoadedModel,
        ranker: LoadedModel,
        catalogue: Catalogue,
        prior_click_rate: float,
        index: Index | None = None,
        exclude_seen: bool = True,
    ) -> None:
        """`index` holds the retriever's items; without it one is built. `exclude_seen` is that of RetrievalSettings."""
        self._retriever = cast(Retriever | RowRetriever, retriever.module)
        self.model = ranker
        self._ranker = cast(Ranker, ranker.module)
        self._catalogue = catalogue
        self._prior = prior_click_rate
        self._exclude_seen = exclude_seen
        self.retriever_history = _max_history(retriever.card.settings)
        self.ranker_history = _max_history(ranker.card.settings)
        self.states: UserStates | None = None  # where the ranker keeps something of each user: set by user_states.attach_states
        with torch.inference_mode():
            self._index = index or exact_index(retriever.module)

    @property
    def ranker(self) -> Ranker:
        """The module itself, to be asked what it looks at."""
        return self._ranker

    def item_statistics(self, items_BC: Ints) -> dict[str, Ints]:
        """ITEM_STATISTICS [B, C] of items as they stand at the end of the log."""
        return {name: getattr(self._catalogue, name)[items_BC] for name in ITEM_STATISTICS}

    def logits(
        self,
        history: HistoryArrays,
        history_length_B: Ints,
        user_statistics: Statistics,
        items_BC: Ints,
        item_statistics: Statistics,
        times_B: Ints,
        *,
        state: UserState | None = None,
    ) -> NDArray[np.float64]:
        """[B, C] logits of P(click) for B requests with C candidates each, none of them padding. `times_B` is UTC microseconds.

        With a `state` of `states`, made of the whole history, `history` need hold no more than the newest events.
        """
        requests, candidates = items_BC.shape
        kept = {} if state is None else {"state": state}
        with torch.inference_mode(), serving():
            logits_BC = self._ranker(
                history_tensors(newest(history, self.ranker_history), self._catalogue),
                candidate_tensors(items_BC, np.full(requests, candidates), item_statistics, self._catalogue, self._prior),
                context_tensors(history_length_B, user_statistics, times_B, self._prior),
                **kept,
            )
        return logits_BC.double().numpy()

    def retrieve(self, history: HistoryArrays, k: int, seen: Ints) -> tuple[Ints, NDArray[np.float32]]:
        """The (at most) k best items for one history, best first, and their scores; none of `seen` where that is to be left out."""
        exclude = Exclusion(np.array([0, len(seen)]), seen) if self._exclude_seen else None
        with torch.inference_mode():
            vector_1D = self._retriever.user_vectors(history_tensors(newest(history, self.retriever_history), self._catalogue))
            items_1K, scores_1K = self._index.topk(vector_1D, k, exclude=exclude)
        found = items_1K[0].numpy()
        return found[found > 0], scores_1K[0].numpy()[found > 0]


def newest(history: HistoryArrays, length: int) -> HistoryArrays:
    """The newest `length` events of each history, right-padded to the longest left (at least 1 wide): [B, L] to [B, min(L, length)].

    items [[1, 2, 3], [4, 0, 0]], lengths [3, 1], length 2  ->  items [[2, 3], [4, 0]], lengths [2, 1]
    """
    if history.items_BL.shape[1] <= length:
        return history
    lengths_B = np.minimum(history.lengths_B, length)
    columns_BL = (history.lengths_B - lengths_B)[:, None] + np.arange(length)
    real_BL = np.arange(length) < lengths_B[:, None]
    columns_BL = np.minimum(columns_BL, history.items_BL.shape[1] - 1)

    def take(values_BL: Ints) -> Ints:
        return np.where(real_BL, np.take_along_axis(values_BL, columns_BL, axis=1), 0)

    return HistoryArrays(items_BL=take(history.items_BL), actions_BL=take(history.actions_BL), times_BL=take(history.times_BL), lengths_B=lengths_B)


def _max_history(settings: Model) -> int:
    """How much of a history a model reads; 1, the least there is, where it reads none."""
    return getattr(settings, "max_history", 1)
