"""What of a history a ranker looked at: its own weights, an item and a behaviour at a time. For people to look at; no score is made here.

U items explained, L events of one history.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longtrail.catalogue import Catalogue
from longtrail.examples import candidate_tensors, context_tensors, history_tensors
from longtrail.history import HistoryArrays
from longtrail.models.contracts import Candidates, Context, History
from longtrail.schema import ITEM_STATISTICS, USER_STATISTICS

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Kind = Literal["attention", "behaviours"]


@runtime_checkable
class Attentive(Protocol):
    """SAM, DIN: weights over the history, a pass after another."""

    def attention_weights(self, history: History, candidates: Candidates, context: Context) -> Sequence[Tensor]:
        """[B, C, L] of each pass."""
        ...


@runtime_checkable
class Summing(Protocol):
    """IFA: the history is read as a sum; what each behaviour counts in it can still be worked out."""

    def behaviour_weights(self, history: History, candidates: Candidates) -> Tensor:
        """[B, C, L]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Weights:
    """`passes`: [U, L] each, in the history's own order. `kind` is None, and there are none, where a ranker cannot tell."""

    kind: Kind | None
    passes: tuple[Floats, ...] = ()


def kind_of(ranker: Any) -> Kind | None:
    if isinstance(ranker, Attentive):
        return "attention"
    return "behaviours" if isinstance(ranker, Summing) else None


def weights_of(ranker: Any, history: HistoryArrays, items_U: Ints, catalogue: Catalogue, time: int) -> Weights:
    """Weights over one history (B = 1, of at least one event) for `items_U`; `time` is UTC µs. O(U · L): for a page, not for serving.

    Statistics of item and user are left at 0: they enter a score by the head, after the history was read.
    """
    kind = kind_of(ranker)
    if kind is None or not len(items_U) or not history.lengths_B[0]:
        return Weights(kind=kind)
    zero_1U, zero_1 = np.zeros((1, len(items_U)), np.int64), np.zeros(1, np.int64)
    candidates = candidate_tensors(items_U[None, :], np.array([len(items_U)]), dict.fromkeys(ITEM_STATISTICS, zero_1U), catalogue, 0.5)
    context = context_tensors(history.lengths_B, dict.fromkeys(USER_STATISTICS, zero_1), np.array([time]), 0.5)
    read = history_tensors(history, catalogue)
    with torch.inference_mode():
        found = ranker.attention_weights(read, candidates, context) if kind == "attention" else [ranker.behaviour_weights(read, candidates)]
    return Weights(kind=kind, passes=tuple(weights[0].double().numpy() for weights in found))
