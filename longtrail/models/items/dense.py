"""One vector an item, in a table: what every paper here starts from. That an unknown item reads zeros is our choice. N items, D width."""

import torch
from torch import Tensor, nn

from longtrail.models.contracts import Axis
from longtrail.models.lookup import look_up


class DenseItems(nn.Module):
    """A table [N + 1, D] whose row 0 (padding) is zeros and receives no gradient from a look-up.

    An id above N is an item that came after the model was trained: it reads row 0, the unknown item.
    """

    def __init__(self, items: int, width: int, *, std: float = 0.02, axis: Axis = "items") -> None:
        """`axis`: what the rows are of."""
        super().__init__()
        self.axes = {"table": axis}
        self.items = items
        self.width = width
        self.table = nn.Parameter(torch.randn(items + 1, width) * std)
        with torch.no_grad():
            self.table[0] = 0

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [...] → [..., D]."""
        return look_up(self.table, known(ids, self.items))

    def vectors(self) -> Tensor:
        """[N + 1, D]: row i is item i. Give row 0 no gradient: use `vectors()[1:]` in a loss."""
        return self.table

    @torch.no_grad()
    def start(self, vectors_ND: Tensor, *, std: float) -> None:
        """Begin at the item vectors [N + 1, D], scaled as a whole to a standard deviation of `std`."""
        self.table.copy_(vectors_ND * (std / vectors_ND[1:].std().clamp(min=1e-12)))
        self.table[0] = 0


def known(ids: Tensor, size: int) -> Tensor:
    """`ids` with those above `size`, which the vocabulary did not hold at training, replaced by 0."""
    return ids.masked_fill(ids > size, 0)
