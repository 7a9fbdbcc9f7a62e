"""The exact index of any retriever: what evaluation, early stopping and the service ask."""

import hashlib
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
    item vectors; rows of scores where it has those. Raises ModelError where `settings.kind` does not fit, or the module
    is no retriever."""
    if isinstance(module, RowRetriever):
        return SparseIndex(module.score_rows())
    if not isinstance(module, Retriever):
        raise ModelError(f"{type(module).__name__} is no retriever; expected a model with user_vectors and item_vectors")
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

    save_index(folder, index, made_of=_hash(module))
    return True


def load_index(folder: Path, module: nn.Module, settings: RetrievalSettings | None = None, *, threads: int = 1) -> Index:
    """The index in `folder`, memory-mapped, ready for its first request; built from `module` where there is none.

    Raises ModelError where it is damaged, is not of this module's codes and centroids, or is of another kind than `settings` ask for by name. An
    index that does not say what it was built of, as older releases wrote them, is refused too: packaging writes it anew.
    """
    if not folder.exists():
        index: Any = exact_index(module, settings, threads=threads)
    else:
        from longtrail.retrieval.storage import CARD, open_index

        if not has_codes(getattr(module, "items", None)):
            raise ModelError(f"{folder}: an index of codes; expected none, for the model's items have no codes")
        index = open_index(folder, threads=threads, made_of=_hash(module))
        asked = "auto" if settings is None else settings.kind
        if asked not in ("auto", index.kind):
            raise ModelError(f"{folder / CARD}: kind is {index.kind}; expected {asked}, as retrieval.kind says: build the index again")
    return index.warm_up() if hasattr(index, "warm_up") else index


def _hash(module: nn.Module) -> str:
    """SHA-256 of all that an index of RecJPQ items is built of."""
    items: Any = module.items
    digest = hashlib.sha256(str(items.composition).encode())
    for tensor in (items.codes, items.centroids.float()):
        values = np.ascontiguousarray(tensor.detach().cpu().numpy())
        digest.update(f"{values.dtype} {list(values.shape)}".encode())
        digest.update(values.data)
    return digest.hexdigest()
