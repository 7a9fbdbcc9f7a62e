"""Exact top-k and exact ranks over the whole catalogue: every inner product, a block of users at a time.

B users, b users of a block, D width, K results, N items. Memory is one block's scores, `block_scores` floats, never [B, N].
"""

from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from torch import Tensor

from longtrail.errors import ModelError
from longtrail.retrieval.index import Exclusion, Filter, check_request, check_targets, require_finite

_BLOCK_SCORES = 1 << 23  # 32 MB of float32


class DenseIndex:
    """The oracle of every faster engine (longtrail.retrieval.index.Index)."""

    def __init__(self, item_ND: Tensor, *, block_scores: int = _BLOCK_SCORES) -> None:
        """`item_ND` [N + 1, D]: row i is item i, row 0 padding. Raises ModelError where a vector is not finite."""
        if item_ND.ndim != 2 or len(item_ND) < 2:
            raise ModelError(f"item vectors have shape {list(item_ND.shape)}; expected [items + 1, width] with at least one item")
        require_finite(item_ND, "item")
        self._items_ND = item_ND.float().contiguous()
        self._block_scores = block_scores

    @classmethod
    def build(cls, item_vectors: Tensor) -> Self:
        return cls(item_vectors)

    @property
    def items(self) -> int:
        return len(self._items_ND) - 1

    @property
    def width(self) -> int:
        """D."""
        return self._items_ND.shape[1]

    @property
    def kind(self) -> str:
        return "dense"

    def warm_up(self) -> Self:
        """One search, so that the first request finds torch's threads and memory ready. Returns itself."""
        self.topk(self._items_ND[:1], min(10, self.items))
        return self

    def topk(self, user_BD: Tensor, k: int, *, exclude: Exclusion | None = None, allowed: Filter | None = None) -> tuple[Tensor, Tensor]:
        """(ids_BK int64, scores_BK float32), best first; equal scores by lower item id; id 0 and -inf where fewer than k are allowed."""
        check_request(user_BD, self.width, k, exclude)
        found = [best_columns(scores_bN, k) for _, _, scores_bN in self._blocks(user_BD, exclude, allowed)]
        return _concatenate([ids for ids, _ in found], k, torch.int64), _concatenate([scores for _, scores in found], k, torch.float32)

    def topk_and_ranks(
        self, user_BD: Tensor, targets_B: Tensor, k: int, *, exclude: Exclusion | None = None, allowed: Filter | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """topk, and ranks_B (int64, from 1): the place of each target in its user's whole ordered catalogue; 0 where it is excluded.

        A target's rank and its place in the list agree: both come from the same scores.
        """
        check_request(user_BD, self.width, k, exclude)
        check_targets(user_BD, targets_B, self.items)
        found = []
        for start, stop, scores_bN in self._blocks(user_BD, exclude, allowed):
            found.append((*best_columns(scores_bN, k), _ranks(scores_bN, targets_B[start:stop].to(scores_bN.device))))
        ids, scores, ranks = ([part[i] for part in found] for i in range(3))
        ranks_B = torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)
        return _concatenate(ids, k, torch.int64), _concatenate(scores, k, torch.float32), ranks_B

    def _blocks(self, user_BD: Tensor, exclude: Exclusion | None, allowed: Filter | None) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, scores [b, N + 1]) of users start..stop: -inf for padding and for items that must not be returned."""
        hidden_N = None if allowed is None else torch.from_numpy(~allowed.up_to(self.items)).to(self._items_ND.device)
        user_BD = user_BD.to(self._items_ND)
        step = max(1, self._block_scores // len(self._items_ND))
        for start in range(0, len(user_BD), step):
            stop = min(start + step, len(user_BD))
            with torch.autocast(user_BD.device.type, enabled=False):  # 8-bit scores would tie by the hundred, and ties go to the lower id
                scores_bN = user_BD[start:stop] @ self._items_ND.T
            scores_bN[:, 0] = -torch.inf
            if hidden_N is not None:
                scores_bN[:, hidden_N] = -torch.inf
            if exclude is not None:
                offsets = np.asarray(exclude.offsets_B[start : stop + 1], np.int64)
                rows = torch.from_numpy(np.repeat(np.arange(stop - start), np.diff(offsets)))
                columns = torch.from_numpy(np.asarray(exclude.items[offsets[0] : offsets[-1]], np.int64))
                known = (columns >= 0) & (columns <= self.items)
                scores_bN[rows[known].to(scores_bN.device), columns[known].to(scores_bN.device)] = -torch.inf
            yield start, stop, scores_bN


def best_columns(scores_bN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row, ties by lower column; short rows are filled with column 0 and -inf. Raises ModelError for NaN and inf."""
    take = min(k, scores_bN.shape[1] - 1)
    values, ids = scores_bN.topk(take, dim=1, sorted=True)
    if not (values[:, :1] < torch.inf).all():  # topk puts NaN first
        raise ModelError("scores overflow float32: user or item vectors are too large")
    cut = values[:, -1:]
    # torch.topk picks among equal scores as it likes; where a tie straddles the cut, take its lowest ids instead.
    straddles = ((scores_bN == cut).sum(1) > (values == cut).sum(1)) & (cut[:, 0] > -torch.inf)
    if straddles.any():
        ids[straddles] = _tied(scores_bN[straddles], cut[straddles], take)
    ids = ids.sort(dim=1).values
    values = scores_bN.gather(1, ids)
    values, order = values.sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order).masked_fill(values == -torch.inf, 0)
    if take < k:
        ids = torch.nn.functional.pad(ids, (0, k - take))
        values = torch.nn.functional.pad(values, (0, k - take), value=-torch.inf)
    return ids, values


def _tied(scores_bN: Tensor, cut_b1: Tensor, take: int) -> Tensor:
    """[b, take]: columns above the cut, and as many of those equal to it, lowest first, as there is room for."""
    above, equal = scores_bN > cut_b1, scores_bN == cut_b1
    room_b1 = take - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= room_b1))
    return chosen.nonzero()[:, 1].reshape(len(scores_bN), take)


def _ranks(scores_bN: Tensor, targets_b: Tensor) -> Tensor:
    """[b], from 1: columns with a higher score, or an equal one and a lower id, come first. 0 where the target's score is -inf."""
    own_b1 = scores_bN.gather(1, targets_b[:, None])
    columns_N = torch.arange(scores_bN.shape[1], device=scores_bN.device)
    before = (scores_bN > own_b1).sum(1) + ((scores_bN == own_b1) & (columns_N < targets_b[:, None])).sum(1)
    return torch.where(own_b1[:, 0] == -torch.inf, 0, before + 1)


def _concatenate(parts: list[Tensor], k: int, kind: torch.dtype) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros((0, k), dtype=kind)
