"""What models are given and what they must give back.

B requests, L history, C candidates, D width, N items, F item statistics, G user statistics.
Histories are right-padded and stored oldest first; candidates are right-padded; id 0 is padding; `lengths` are the only source of masks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor


class _Batch:
    """Moves every tensor of a dataclass at once."""

    def to(self, device: torch.device | str) -> Self:
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **moved)  # type: ignore[type-var]


def _check_shapes(batch: Any, letters: Mapping[str, str]) -> None:
    """Raises ValueError where a tensor of `batch` has not the dimensions that the end of its name tells, as large as those of the first that
    has them, or holds ids, times or lengths that are not whole numbers. `letters`: of each tensor, by name."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, shape in letters.items():
        value = getattr(batch, name)
        if value.ndim != len(shape):
            raise ValueError(f"{type(batch).__name__}.{name} is {list(value.shape)}; expected [{', '.join(shape)}]")
        for letter, size in zip(shape, value.shape, strict=True):
            known, first = sizes.setdefault(letter, (size, name))
            if known != size:
                raise ValueError(f"{type(batch).__name__}.{name} is {list(value.shape)}; expected {letter} = {known}, as in {first}")
        if value.is_floating_point() and not name.startswith("statistics"):
            raise ValueError(f"{type(batch).__name__}.{name} is {value.dtype}; expected torch.int64")


@dataclass(frozen=True, kw_only=True)
class History(_Batch):
    """What each user did, oldest first: `history.items_BL[b, :history.lengths_B[b]]`; zeros after it.

    L is at least 1: where nobody did anything, a place of padding stands. Raises ValueError for a width of 0, which recurrent and windowed models
    have no form for, and for tensors whose shapes do not fit each other or which are not of whole numbers.
    """

    items_BL: Tensor  # int64 [B, L], dense item ids
    categories_BL: Tensor  # int64 [B, L], dense category ids, 0 unknown
    actions_BL: Tensor  # int64 [B, L], dense action ids, from 1
    times_BL: Tensor  # int64 [B, L], UTC microseconds
    lengths_B: Tensor  # int64 [B], 0..L

    def __post_init__(self) -> None:
        _check_shapes(self, {"items_BL": "BL", "categories_BL": "BL", "actions_BL": "BL", "times_BL": "BL", "lengths_B": "B"})
        if self.items_BL.shape[1] == 0:
            raise ValueError(f"histories of {len(self.lengths_B)} users have no places; expected at least one, of padding where all are empty")


@dataclass(frozen=True, kw_only=True)
class Candidates(_Batch):
    """The candidate set of each request: `candidates.items_BC[b, :candidates.lengths_B[b]]`; zeros after it.

    Raises ValueError for tensors whose shapes do not fit each other, or whose ids or lengths are not whole numbers.
    """

    items_BC: Tensor  # int64 [B, C]
    categories_BC: Tensor  # int64 [B, C]
    statistics_BCF: Tensor  # float32 [B, C, F], longtrail.statistics.item_features
    lengths_B: Tensor  # int64 [B]

    def __post_init__(self) -> None:
        _check_shapes(self, {"items_BC": "BC", "categories_BC": "BC", "statistics_BCF": "BCF", "lengths_B": "B"})


@dataclass(frozen=True, kw_only=True)
class Context(_Batch):
    """What is known of each request beside history and candidates. Raises ValueError for tensors whose shapes do not fit each other."""

    statistics_BG: Tensor  # float32 [B, G], longtrail.statistics.user_features
    times_B: Tensor  # int64 [B], UTC microseconds: the request's own time

    def __post_init__(self) -> None:
        _check_shapes(self, {"statistics_BG": "BG", "times_B": "B"})


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Vocabulary sizes, padding excluded: ids run from 1 to these."""

    items: int
    categories: int
    actions: int


Axis = Literal["items", "categories", "actions"]


@runtime_checkable
class Grows(Protocol):
    """Any part of a model that holds tensors of a row for each id of one kind, row 0 padding: training that goes on from newer data adds rows."""

    axes: Mapping[str, Axis]  # by a tensor's name in the part: {"table": "items"}


@runtime_checkable
class ItemEmbedding(Protocol):
    """One vector an item, however it is stored: the item slot of every trained model, `.items` of an encoder and `.embedding.items` of a ranker."""

    items: int  # N
    width: int  # D

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [...] → [..., D]; 0 (padding) and ids above N (unknown) read zeros."""
        ...

    def vectors(self) -> Tensor:
        """[N + 1, D]; row 0 is zeros. A whole catalogue of vectors: where a few are enough, ask `embed` for those."""
        ...

    def start(self, vectors_ND: Tensor, *, std: float) -> None:
        """Begin as near as may be to the vectors [N + 1, D], scaled as a whole to a standard deviation of `std`."""
        ...


@runtime_checkable
class Ranker(Protocol):
    """Scores a whole candidate set against one history, without tiling the history."""

    def __call__(self, history: History, candidates: Candidates, context: Context) -> Tensor:
        """Logits [B, C] of P(click); what stands in padded places is undefined and must be masked by the caller. B and C may be 0."""
        ...


@runtime_checkable
class Watched(Protocol):
    """A ranker that can tell how it is: asked on batches from all over each pass over the validation split, joined to the learning curve."""

    def health(self, history: History, candidates: Candidates, context: Context) -> dict[str, float]:
        """Figures by name, means over the candidates of people with a history: so they are weighed. Empty where there is nobody with one."""
        ...


@runtime_checkable
class StartsAttention(Protocol):
    """A ranker whose attention starts from its item vectors."""

    def start_attention(self, items_n: Tensor, categories_n: Tensor) -> None:
        """Called before a new model's first step, when its item vectors have their start. Items int64 [n], as often as people meet them, and their
        categories."""
        ...


@runtime_checkable
class WithAuxiliary(Protocol):
    """A ranker with parts that its logits do not train, such as a search."""

    def training_logits(self, history: History, candidates: Candidates, context: Context) -> list[Tensor]:
        """Its own logits [B, C] first, then auxiliary ones: in training, the losses of all are added up."""
        ...


@runtime_checkable
class Retriever(Protocol):
    """Scores every item of the catalogue as the inner product of a user vector and an item vector."""

    def user_vectors(self, history: History) -> Tensor:
        """[B, D]: the user after their whole history. Defined (no NaN) for an empty history too. B may be 0."""
        ...

    def item_vectors(self) -> Tensor:
        """[N + 1, D]: row i is item i; row 0 (padding) is zeros."""
        ...


class ScoreRows(NamedTuple):
    """Scores of items that are no inner products: row r gives item i weights_R[r] · base_N1[i], and what the row itself names on top of that.

    The rows are sparse: row r names items_n[offsets_R1[r] : offsets_R1[r + 1]], ascending and without repeats. Item 0 is padding: never named.
    """

    offsets_R1: Tensor  # int64 [R + 1]
    items_n: Tensor  # int32
    scores_n: Tensor  # float32
    base_N1: Tensor  # float32 [N + 1], at least 0
    weights_R: Tensor  # float32 [R], above 0


@runtime_checkable
class RowRetriever(Protocol):
    """A retriever whose users are rows of ScoreRows; longtrail.retrieval.sparse.SparseIndex searches them exactly."""

    def user_vectors(self, history: History) -> Tensor:
        """int64 [B, 1]: the row of each user. Defined for an empty history too. B may be 0."""
        ...

    def score_rows(self) -> ScoreRows:
        """What each row gives every item."""
        ...


@runtime_checkable
class SizedByData(Protocol):
    """A model with tensors whose sizes its settings do not tell."""

    def allocate(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Make room for saved weights of these shapes, by name; what it cannot have keeps its size, and the check that follows tells."""
        ...


class Pairs(NamedTuple):
    """What a step of a retriever's training looks at: T states of users and the item that each must name, window by window in the windows' order."""

    states_TD: Tensor  # [T, D]
    targets_T: Tensor  # int64 [T], never 0
    windows_T: Tensor  # int64 [T], row of the batch, ascending; within a window by place


Json = dict[str, Any]
