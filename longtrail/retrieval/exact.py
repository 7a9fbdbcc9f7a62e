"""The exact index of any retriever: what evaluation and early stopping judge by."""

from torch import nn

from longtrail.models.contracts import Retriever, RowRetriever
from longtrail.retrieval.dense import DenseIndex
from longtrail.retrieval.sparse import SparseIndex


def exact_index(module: nn.Module) -> DenseIndex | SparseIndex:
    """An exact Index over the whole catalogue, to be asked with what `module.user_vectors` gives."""
    if isinstance(module, RowRetriever):
        return SparseIndex(module.score_rows())
    assert isinstance(module, Retriever)
    return DenseIndex.build(module.item_vectors())
