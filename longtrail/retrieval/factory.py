"""Which index a model gets. N items, D width, M splits."""

import importlib.util
from typing import Any, TypeGuard

from torch import Tensor

from longtrail.config import RetrievalSettings
from longtrail.errors import ModelError
from longtrail.retrieval.dense import DenseIndex
from longtrail.retrieval.index import Index

# Measured crossovers (docs/retrieval.md says where): below so many numbers in all item vectors a matmul of one user is as quick as a scan of codes;
# from so many items on, lists of sub-ids save more than planning a visit of them costs.
DENSE_NUMBERS = 250_000
PRUNE_ITEMS = 1_000_000


def build_index(items: Any, settings: RetrievalSettings | None = None, *, threads: int = 1) -> Index:
    """An index over `items`: vectors [N + 1, D], or a model's item embedding (`model.items`), dense or RecJPQ.

    Vectors are searched by dense, whatever the kind; codes by the kind. Raises ModelError where vectors or centroids are not finite.
    """
    settings = settings or RetrievalSettings()
    if not has_codes(items):
        return DenseIndex(items if isinstance(items, Tensor) else items.vectors().detach())
    kind = settings.kind if settings.kind != "auto" else _auto(items, settings)
    if kind == "dense":
        return DenseIndex(items.vectors().detach())
    if importlib.util.find_spec("numba") is None:
        raise ModelError(f"retrieval.kind is {kind}, which needs the package numba: install it or use dense")
    from longtrail.retrieval.pq import PQIndex  # numba takes half a second, and dense catalogues do without
    from longtrail.retrieval.prune import Pruning

    pruning = Pruning() if kind == "recjpq_prune" else None
    return PQIndex(items.codes, items.centroids, shared=items.composition == "sum", threads=threads, pruning=pruning)


def _auto(items: Any, settings: RetrievalSettings) -> str:
    count, splits = items.codes.shape
    if count * items.width < DENSE_NUMBERS:
        return "dense"
    fits = count * splits * (splits + 4) <= settings.list_bytes
    return "recjpq_prune" if fits and count >= PRUNE_ITEMS else "pqtopk"


def has_codes(items: Any) -> TypeGuard[Any]:
    """Whether these are RecJPQ items: `codes` and `centroids`."""
    return isinstance(getattr(items, "codes", None), Tensor) and isinstance(getattr(items, "centroids", None), Tensor)
