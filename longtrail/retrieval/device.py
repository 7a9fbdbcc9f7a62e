"""Batches on a GPU: the same answers by torch. B users, U users of a block, n items of a chunk, K results, N items, M splits, b sub-ids, P places.

Scores are summed in the order of the splits, as on the CPU; the sub-scores themselves are made by another library, so that they, and with them the
order of items that are nearly equal, may differ in the last bit.
"""

import torch
from torch import Tensor

from longtrail.errors import ModelError
from longtrail.retrieval.blocks import BLOCK, Snapshot, unpack
from longtrail.retrieval.dense import best_columns
from longtrail.retrieval.index import Exclusion, Filter

_SCORES = 1 << 26  # floats of one block of scores: 256 MB
_USERS = 1024  # of one block


class DeviceCatalogue:
    """A snapshot in a device's memory: codes M bytes an item, ids 8."""

    def __init__(self, snapshot: Snapshot, centroids_MbE: Tensor, device: torch.device) -> None:
        self.snapshot = snapshot
        self.centroids_MbE = centroids_MbE.to(device)
        codes, ids, valid = [], [], []
        for segment, offset in zip(snapshot.segments, snapshot.offsets, strict=True):
            places = torch.arange(segment.blocks * BLOCK)
            codes.append(torch.from_numpy(segment.codes[: segment.blocks]).transpose(0, 1).reshape(segment.codes.shape[1], -1))
            ids.append(torch.from_numpy(snapshot.ids_of((places + offset).numpy())))
            valid.append(torch.from_numpy(unpack(segment.valid, segment.blocks * BLOCK)))
        self.codes_MP = torch.cat(codes, 1).to(device)
        self.ids_P = torch.cat(ids).to(device)
        self.valid_P = torch.cat(valid).to(device)
        self.ids_P[~self.valid_P] = 0

    def __call__(
        self, user_BD: Tensor, targets_B: Tensor | None, k: int, exclude: Exclusion | None, allowed: Filter | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(ids_BK, scores_BK, ranks_B or None), as longtrail.retrieval.index.Index says."""
        device = self.codes_MP.device
        valid_P = self.valid_P
        if allowed is not None:
            valid_P = valid_P & torch.from_numpy(allowed.up_to(self.snapshot.next_id - 1)).to(device)[self.ids_P]
        found = []
        for start in range(0, len(user_BD), _USERS):
            stop = min(start + _USERS, len(user_BD))
            pairs = None if exclude is None else self._pairs(exclude, start, stop)
            found.append(self._block(user_BD[start:stop], None if targets_B is None else targets_B[start:stop].to(device), k, pairs, valid_P))
        if not found:
            empty = torch.zeros((0, k), device=device)
            return empty.long(), empty, None if targets_B is None else torch.zeros(0, dtype=torch.int64, device=device)
        ranks = [ranks for _, _, ranks in found if ranks is not None]
        return torch.cat([ids for ids, _, _ in found]), torch.cat([scores for _, scores, _ in found]), torch.cat(ranks) if ranks else None

    def _pairs(self, exclude: Exclusion, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(users [E], ids [E]) of the block's exclusions, by rising id."""
        offsets = torch.as_tensor(exclude.offsets_B[start : stop + 1], dtype=torch.int64)
        ids = torch.as_tensor(exclude.items[int(offsets[0]) : int(offsets[-1])], dtype=torch.int64)
        users = torch.repeat_interleave(torch.arange(stop - start), offsets.diff())
        order = ids.argsort(stable=True)
        return users[order].to(self.codes_MP.device), ids[order].to(self.codes_MP.device)

    def _tables(self, user_UD: Tensor) -> Tensor:
        """[U, M, b]."""
        parts_UME = user_UD.detach().float().unflatten(1, (len(self.centroids_MbE), -1))
        with torch.autocast(parts_UME.device.type, enabled=False):  # 8-bit scores would tie by the hundred, and ties go to the lower id
            tables_UMb = torch.einsum("ume,mbe->umb", parts_UME, self.centroids_MbE)
        if not torch.isfinite(tables_UMb).all():
            raise ModelError("scores overflow float32: user vectors or centroids are too large")
        return tables_UMb

    def _scores(self, tables_UMb: Tensor, codes_Mn: Tensor) -> Tensor:
        """[U, n]."""
        scores_Un = torch.zeros((len(tables_UMb), codes_Mn.shape[1]), device=codes_Mn.device)
        for split, codes_n in enumerate(codes_Mn):
            scores_Un += tables_UMb[:, split].index_select(1, codes_n.int())
        return scores_Un

    def _block(
        self, user_UD: Tensor, targets_U: Tensor | None, k: int, pairs: tuple[Tensor, Tensor] | None, valid_P: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        tables_UMb, users = self._tables(user_UD), len(user_UD)
        ids_UK = torch.zeros((users, k), dtype=torch.int64, device=user_UD.device)
        scores_UK = torch.full((users, k), -torch.inf, device=user_UD.device)
        if not len(self.ids_P):  # all retired and compacted away
            return ids_UK, scores_UK, None if targets_U is None else torch.zeros_like(targets_U)
        own_U1, count_U, listed_U = None, torch.zeros(users, dtype=torch.int64, device=user_UD.device), None
        if targets_U is not None:
            order = torch.where(valid_P, self.ids_P, 0)
            place_U = (order[None, :] == targets_U[:, None]).int().argmax(1) if users * len(order) <= _SCORES else self._find(order, targets_U)
            listed_U = (order[place_U] == targets_U) & (targets_U > 0)
            # the target's own codes, user by user
            codes_UM = self.codes_MP[:, place_U].T.long()
            own_U1 = torch.zeros(users, device=user_UD.device)
            for split in range(codes_UM.shape[1]):
                own_U1 += tables_UMb[:, split].gather(1, codes_UM[:, split : split + 1])[:, 0]
            own_U1 = own_U1[:, None]
            if pairs is not None:
                listed_U[pairs[0][pairs[1] == targets_U[pairs[0]]]] = False
        step = max(BLOCK, _SCORES // users)
        for first in range(0, len(self.ids_P), step):
            chosen = slice(first, first + step)
            ids_n = self.ids_P[chosen]
            scores_Un = self._scores(tables_UMb, self.codes_MP[:, chosen])
            scores_Un[:, ~valid_P[chosen]] = -torch.inf
            if pairs is not None:
                self._hide(scores_Un, ids_n, valid_P[chosen], *pairs)
            if own_U1 is not None and targets_U is not None:
                before = (scores_Un > own_U1) | ((scores_Un == own_U1) & (ids_n < targets_U[:, None]))
                count_U += before.sum(1)
            columns, scores = best_columns(torch.cat([torch.full((users, 1), -torch.inf, device=user_UD.device), scores_Un], 1), k)
            ids = torch.where(columns > 0, ids_n[(columns - 1).clamp(min=0)], 0)
            # What was found before has lower ids: a stable sort keeps it first among equals.
            merged, order = torch.cat([scores_UK, scores], 1).sort(dim=1, descending=True, stable=True)
            scores_UK, ids_UK = merged[:, :k], torch.cat([ids_UK, ids], 1).gather(1, order)[:, :k]
        ranks_U = None if listed_U is None else torch.where(listed_U, count_U + 1, 0)
        return ids_UK, scores_UK, ranks_U

    @staticmethod
    def _find(order_P: Tensor, targets_U: Tensor) -> Tensor:
        """The place of each id; any place for one that is not there."""
        place = torch.zeros(int(max(order_P.max(), targets_U.max())) + 1, dtype=torch.int64, device=order_P.device)
        place[order_P] = torch.arange(len(order_P), device=order_P.device)
        return place[targets_U]

    @staticmethod
    def _hide(scores_Un: Tensor, ids_n: Tensor, valid_n: Tensor, users_E: Tensor, ids_E: Tensor) -> None:
        """-inf where a user's excluded item stands in the chunk."""
        columns_n = torch.arange(len(ids_n), device=ids_n.device)[valid_n]
        present_n = ids_n[valid_n]
        if not len(present_n):
            return
        near_E = torch.searchsorted(present_n, ids_E).clamp(max=len(present_n) - 1)
        inside_E = present_n[near_E] == ids_E
        scores_Un[users_E[inside_E], columns_n[near_E[inside_E]]] = -torch.inf
