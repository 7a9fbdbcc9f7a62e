"""What every retrieval engine offers: the best items of the catalogue for a batch of users. B users, D width, K results, N items."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longtrail.errors import ModelError


class Exclusion(NamedTuple):
    """Items that must not be returned, by user: `items[offsets_B[b] : offsets_B[b + 1]]` are user b's.

    Repeats, 0 and ids that the index does not hold do no harm.
    """

    offsets_B: NDArray[np.int64]  # [B + 1]
    items: NDArray[np.int64]


class Filter:
    """Items that may be returned (in stock, sold in a region), the same for a whole call. Make it once and use it for many calls.

    `mask` bool [N + 1], by item id; items past its end may not be returned, and 0 never is.
    """

    def __init__(self, mask: NDArray[np.bool_] | Tensor) -> None:
        values = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        if values.ndim != 1 or values.dtype != np.bool_:
            raise ModelError(f"filter has type {values.dtype} and shape {list(values.shape)}; expected bool [items + 1]")
        self.mask = values.copy()
        self.mask[:1] = False
        self.mask.setflags(write=False)
        self.packed: tuple[Any, Any] | None = None  # (catalogue version, the mask as an engine keeps it)

    def up_to(self, items: int) -> NDArray[np.bool_]:
        """[items + 1], cut or filled up with False."""
        return np.concatenate([self.mask[: items + 1], np.zeros(max(0, items + 1 - len(self.mask)), bool)])


@runtime_checkable
class Index(Protocol):
    """Built once from item vectors or codes (longtrail.retrieval.build_index), then asked by user vectors; scores are inner products."""

    @property
    def items(self) -> int:
        """N, the largest item id."""
        ...

    def topk(self, user_BD: Tensor, k: int, *, exclude: Exclusion | None = None, allowed: Filter | None = None) -> tuple[Tensor, Tensor]:
        """(ids_BK int64, scores_BK float32), best first; equal scores by lower item id. Places beyond the allowed items hold id 0 and -inf.

        Raises ModelError for shapes that do not fit and for users whose vectors are not finite.
        """
        ...

    def topk_and_ranks(
        self, user_BD: Tensor, targets_B: Tensor, k: int, *, exclude: Exclusion | None = None, allowed: Filter | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """topk, and ranks_B (int64, from 1): the place of each target in its user's whole ordered catalogue; 0 where it is not allowed.

        A target's rank and its place in the list agree: both come from the same scores.
        """
        ...


def check_request(user_BD: Tensor, width: int, k: int, exclude: Exclusion | None) -> None:
    """Raises ModelError naming what does not fit."""
    if user_BD.ndim != 2 or user_BD.shape[1] != width:
        raise ModelError(f"user vectors have shape {list(user_BD.shape)}; expected [users, {width}]")
    if k < 1:
        raise ModelError(f"k is {k}; expected at least 1")
    if exclude is not None and len(exclude.offsets_B) != len(user_BD) + 1:
        raise ModelError(f"exclusions have {len(exclude.offsets_B)} offsets; expected {len(user_BD) + 1} (users + 1)")
    require_finite(user_BD, "user")


def check_targets(user_BD: Tensor, targets_B: Tensor, items: int) -> None:
    """Raises ModelError naming what does not fit. 0, no target, is fine."""
    if targets_B.shape != user_BD.shape[:1]:
        raise ModelError(f"targets have shape {list(targets_B.shape)}; expected [{len(user_BD)}] (users)")
    if len(targets_B) and not 0 <= int(targets_B.min()) <= int(targets_B.max()) <= items:
        raise ModelError(f"targets run from {int(targets_B.min())} to {int(targets_B.max())}; expected item ids from 0 to {items}")


def require_finite(vectors: Tensor, name: str) -> None:
    """Raises ModelError naming how many rows hold NaN or infinity, and the first."""
    if vectors.device.type == "cpu" and vectors.dtype == torch.float32 and np.isfinite(vectors.detach().numpy()).all():
        return  # in a third of torch's time, where a request has one user
    finite = torch.isfinite(vectors).all(dim=1)
    if not finite.all():
        raise ModelError(f"{int((~finite).sum())} of {len(vectors)} {name} vectors are not finite, first at row {int((~finite).nonzero()[0])}")
