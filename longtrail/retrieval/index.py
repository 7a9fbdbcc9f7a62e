"""What every retrieval engine offers: the best items of the catalogue for a batch of users. B users, D width, K results, N items."""

from typing import NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Exclusion(NamedTuple):
    """Items that must not be returned, by user: `items[offsets_B[b] : offsets_B[b + 1]]` are user b's (repeats and 0 do no harm)."""

    offsets_B: NDArray[np.int64]  # [B + 1]
    items: NDArray[np.int64]


@runtime_checkable
class Index(Protocol):
    """Built once from item vectors, then asked by user vectors; scores are inner products."""

    @classmethod
    def build(cls, item_vectors: Tensor) -> Self:
        """`item_vectors` [N + 1, D]: row i is item i, row 0 is padding and is never returned."""
        ...

    def topk(self, user_BD: Tensor, k: int, *, exclude: Exclusion | None = None) -> tuple[Tensor, Tensor]:
        """(ids_BK int64, scores_BK), best first; equal scores by lower item id. Places beyond the allowed items hold id 0 and -inf."""
        ...
