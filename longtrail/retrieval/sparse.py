"""Exact top-k and exact ranks where scores are a base order of all items and a few items that a user's row lifts (models.contracts.ScoreRows).

B users, N items, K results, E named or excluded items of all users of a call. The score of item i in row r is weights[r] · base[i], plus the row's
own score where it names i: in float64, where the product of two float32 is exact, so that scaling by a weight changes neither order nor ties.

Time and memory are O(E + B · K) a call, not O(B · N): items that a row does not name keep the order of `base`, which is sorted once. A list is made
of the named items and of the first K + E_b of that order (E_b of them may be named or excluded); a rank is a place in that order, corrected
for the named and excluded items.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longtrail.errors import ModelError
from longtrail.models.contracts import ScoreRows
from longtrail.retrieval.index import Exclusion, Filter, check_request, check_targets

_BLOCK = 1 << 21  # entries that one block of users may sort: about 100 MB

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class _Special(NamedTuple):
    """The items of each user that do not keep their place in the base order: named by the row, excluded, or both. Distinct, by user."""

    users_E: Ints
    items_E: Ints
    own_E: Floats  # the row's own score; 0 where it names none
    excluded_E: NDArray[np.bool_]


class SparseIndex:
    """An exact Index over ScoreRows; "user vectors" are int64 [B, 1], the users' rows. It works on the CPU."""

    def __init__(self, rows: ScoreRows) -> None:
        """Raises ModelError where a weight is not above 0, a base score below 0, or a number not finite."""
        self._offsets_R1, self._items_n, self._scores_n, base_N1, weights_R = (values.cpu().numpy() for values in rows)
        self._base_N1, self._weights_R = base_N1.astype(np.float64), weights_R.astype(np.float64)
        if not (np.isfinite(self._scores_n).all() and np.isfinite(self._base_N1).all() and np.isfinite(self._weights_R).all()):
            raise ModelError("scores of rows: some are not finite")
        if len(self._base_N1) < 2 or self._base_N1.min() < 0 or self._weights_R.min(initial=1) <= 0:
            raise ModelError("scores of rows: expected at least one item, base scores of 0 or more and weights above 0")
        self._order_N = 1 + np.argsort(-self._base_N1[1:], kind="stable")

    @property
    def items(self) -> int:
        return len(self._base_N1) - 1

    def topk(self, user_BD: Tensor, k: int, *, exclude: Exclusion | None = None, allowed: Filter | None = None) -> tuple[Tensor, Tensor]:
        """As Index.topk."""
        ids_BK, scores_BK, _ = self._answer(user_BD, None, k, exclude, allowed)
        return ids_BK, scores_BK

    def topk_and_ranks(
        self, user_BD: Tensor, targets_B: Tensor, k: int, *, exclude: Exclusion | None = None, allowed: Filter | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As Index.topk_and_ranks."""
        check_targets(user_BD, targets_B, self.items)
        return self._answer(user_BD, targets_B, k, exclude, allowed)

    def _answer(
        self, user_BD: Tensor, targets_B: Tensor | None, k: int, exclude: Exclusion | None, allowed: Filter | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_request(user_BD, 1, k, exclude)
        rows_B = user_BD[:, 0].cpu().numpy().astype(np.int64)
        if len(rows_B) and not 0 <= rows_B.min() <= rows_B.max() < len(self._weights_R):
            raise ModelError(f"rows of users run from {rows_B.min()} to {rows_B.max()}; expected 0 to {len(self._weights_R) - 1}")
        wanted_B = np.zeros(len(rows_B), np.int64) if targets_B is None else targets_B.cpu().numpy().astype(np.int64)
        may_N1 = np.arange(self.items + 1) > 0 if allowed is None else allowed.up_to(self.items)
        order_M = self._order_N if allowed is None else self._order_N[may_N1[self._order_N]]
        ids_BK, scores_BK, ranks_B = np.zeros((len(rows_B), k), np.int64), np.full((len(rows_B), k), -np.inf), np.zeros(len(rows_B), np.int64)
        for start, stop in self._blocks(rows_B, k, exclude):
            part = slice(start, stop)
            special = self._special(rows_B[part], _part(exclude, start, stop), may_N1)
            weights_b = self._weights_R[rows_B[part]]
            ids_BK[part], scores_BK[part] = self._lists(weights_b, special, order_M, k)
            if targets_B is not None:
                ranks_B[part] = self._ranks(weights_b, special, order_M, may_N1, wanted_B[part])
        found = (torch.from_numpy(ids_BK), torch.from_numpy(scores_BK.astype(np.float32)), torch.from_numpy(ranks_B))
        return found[0].to(user_BD.device), found[1].to(user_BD.device), found[2].to(user_BD.device)

    def _blocks(self, rows_B: Ints, k: int, exclude: Exclusion | None) -> list[tuple[int, int]]:
        """Runs of users, of about _BLOCK entries each; a user is never cut."""
        entries_B = min(k, self.items) + 2 * (self._offsets_R1[rows_B + 1] - self._offsets_R1[rows_B])
        if exclude is not None:
            entries_B = entries_B + 2 * np.diff(exclude.offsets_B)
        cuts = np.flatnonzero(np.diff(np.cumsum(entries_B) // _BLOCK, prepend=0) > 0)
        bounds = np.unique(np.concatenate([[0], cuts, [len(rows_B)]]))
        return list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))

    def _special(self, rows_b: Ints, exclude: Exclusion | None, may_N1: NDArray[np.bool_]) -> _Special:
        span = self.items + 1
        counts_b = self._offsets_R1[rows_b + 1] - self._offsets_R1[rows_b]
        places = _ranges(self._offsets_R1[rows_b], counts_b)
        named = np.repeat(np.arange(len(rows_b)), counts_b) * span + self._items_n[places]
        excluded = np.zeros(0, np.int64)
        if exclude is not None:
            kept = (exclude.items > 0) & (exclude.items <= self.items)
            excluded = (np.repeat(np.arange(len(rows_b)), np.diff(exclude.offsets_B)) * span + exclude.items)[kept]
        keys_E = np.unique(np.concatenate([named, excluded]))
        keys_E = keys_E[may_N1[keys_E % span]]
        own_E, excluded_E = np.zeros(len(keys_E)), np.zeros(len(keys_E), bool)
        if len(keys_E):
            at = np.minimum(np.searchsorted(keys_E, named), len(keys_E) - 1)
            held = keys_E[at] == named
            own_E[at[held]] = self._scores_n[places][held]
            excluded_E = np.isin(keys_E, excluded)
        return _Special(keys_E // span, keys_E % span, own_E, excluded_E)

    def _lists(self, weights_b: Floats, special: _Special, order_M: Ints, k: int) -> tuple[Ints, Floats]:
        """(ids [b, K], scores [b, K])."""
        users, span = len(weights_b), self.items + 1
        counts_b = np.minimum(k + np.bincount(special.users_E, minlength=users), len(order_M))
        users_n = np.repeat(np.arange(users), counts_b)
        items_n = order_M[_ranges(np.zeros(users, np.int64), counts_b)]
        plain_n = ~np.isin(users_n * span + items_n, special.users_E * span + special.items_E)
        lifted = ~special.excluded_E
        who = np.concatenate([users_n[plain_n], special.users_E[lifted]])
        items = np.concatenate([items_n[plain_n], special.items_E[lifted]])
        scores = weights_b[who] * self._base_N1[items] + np.concatenate([np.zeros(int(plain_n.sum())), special.own_E[lifted]])
        best = np.lexsort((items, -scores, who))
        place = np.arange(len(best)) - np.searchsorted(who[best], who[best], side="left")
        best, place = best[place < k], place[place < k]
        ids_bK, scores_bK = np.zeros((users, k), np.int64), np.full((users, k), -np.inf)
        ids_bK[who[best], place], scores_bK[who[best], place] = items[best], scores[best]
        return ids_bK, scores_bK

    def _ranks(self, weights_b: Floats, special: _Special, order_M: Ints, may_N1: NDArray[np.bool_], targets_b: Ints) -> Ints:
        """[b], from 1; 0 where the target may not be returned."""
        own_b, may_b = np.zeros(len(targets_b)), may_N1[targets_b]
        hits = special.items_E == targets_b[special.users_E]
        own_b[special.users_E[hits]] = special.own_E[hits]
        may_b[special.users_E[hits & special.excluded_E]] = False
        score_b = weights_b * self._base_N1[targets_b] + own_b

        def before(plain: Floats, items: Ints, users: Ints) -> NDArray[np.bool_]:
            return (plain > score_b[users]) | ((plain == score_b[users]) & (items < targets_b[users]))

        low_b, high_b = np.zeros(len(targets_b), np.int64), np.full(len(targets_b), len(order_M))
        users_b = np.arange(len(targets_b))
        while (low_b < high_b).any():  # all users' binary searches at once: how many places of the base order come before the target
            middle_b = (low_b + high_b) // 2
            items_b = order_M[np.minimum(middle_b, len(order_M) - 1)]
            go_b = (low_b < high_b) & before(weights_b * self._base_N1[items_b], items_b, users_b)
            low_b, high_b = np.where(go_b, middle_b + 1, low_b), np.where(go_b | (low_b >= high_b), high_b, middle_b)
        plain_E = weights_b[special.users_E] * self._base_N1[special.items_E]
        gone_E = before(plain_E, special.items_E, special.users_E)
        come_E = ~special.excluded_E & before(plain_E + special.own_E, special.items_E, special.users_E)
        moved_b = np.bincount(special.users_E, weights=come_E.astype(float) - gone_E, minlength=len(targets_b)).astype(np.int64)
        return np.where(may_b, low_b + moved_b + 1, 0)


def _part(exclude: Exclusion | None, start: int, stop: int) -> Exclusion | None:
    if exclude is None:
        return None
    offsets = np.asarray(exclude.offsets_B[start : stop + 1], np.int64)
    return Exclusion(offsets - offsets[0], np.asarray(exclude.items[offsets[0] : offsets[-1]], np.int64))


def _ranges(starts_b: Ints, counts_b: Ints) -> Ints:
    """starts_b[0], starts_b[0] + 1, … (counts_b[0] of them), then the same for the next."""
    ends_b = np.cumsum(counts_b)
    return np.repeat(starts_b - ends_b + counts_b, counts_b) + np.arange(ends_b[-1] if len(ends_b) else 0)
