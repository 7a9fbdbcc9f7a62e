"""The exact index of any retriever: what evaluation, early stopping and the service ask."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from longtrail.config import RetrievalSettings
from longtrail.errors import ModelError
from longtrail.models.contracts import Retriever, RowRetriever
from longtrail.retrieval.factory import build_index, has_codes
from longtrail.retrieval.index import Index
from longtrail.retrieval.sparse import SparseIndex


def exact_index(module: nn.Module, settings: RetrievalSettings | None = None, *, threads: int = 1) -> Index:
    """An exact Index over the whole catalogue, to be asked with what `module.user_vectors` gives: its codes where its items are RecJPQ's, else its
    item vectors; rows of scores where it has those. Raises ModelError where `settings.kind` does not fit."""
    if isinstance(module, RowRetriever):
        return SparseIndex(module.score_rows())
    assert isinstance(module, Retriever)
    items = getattr(module, "items", None)
    return build_index(items if has_codes(items) else module.item_vectors().detach(), settings, threads=threads)


def write_index(folder: Path, module: nn.Module, settings: RetrievalSettings | None = None) -> bool:
    """Write the index of RecJPQ items for `load_index`. False, and nothing written, where `exact_index` would give another kind."""
    if not has_codes(getattr(module, "items", None)):
        return False
    index: Any = exact_index(module, settings)
    if index.kind == "dense":
        return False
    from longtrail.retrieval.storage import save_index  # numba takes half a second, and dense catalogues do without

    save_index(folder, index)
    return True


def load_index(folder: Path, module: nn.Module, settings: RetrievalSettings | None = None, *, threads: int = 1) -> Index:
    """The index in `folder`, memory-mapped, ready for its first request; built from `module` where there is none.

    Raises ModelError where it is damaged, or is not of this module's items.
    """
    if not folder.exists():
        index: Any = exact_index(module, settings, threads=threads)
    else:
        from longtrail.retrieval.storage import open_index

        index = open_index(folder, threads=threads)
        items: Any = getattr(module, "items", None)
        same = has_codes(items) and index.items == len(items.codes) - 1 and index.shared == (items.composition == "sum")
        if not same or not np.array_equal(index.centroids_MbE, items.centroids.detach().numpy()):
            raise ModelError(f"{folder}: an index of other items than the model's: write it again with the model")
    return index.warm_up() if hasattr(index, "warm_up") else index
