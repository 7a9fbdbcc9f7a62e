"""Exact top-k of a catalogue of codes (RecJPQ): PQTopK's table of sub-scores, scanned by compiled kernels, with or without pruning.

B users, U users of a call, D width, K results, N items, M splits, b sub-ids a split, T = 256 M, P parts of a scan.

An item's score is the float32 sum of its M sub-scores, in the order of the splits: equal, up to rounding, to the inner product with its vector.
"""

from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longtrail.errors import ModelError
from longtrail.retrieval import catalogue, kernels
from longtrail.retrieval.blocks import Ints, Snapshot, Words, base_segment, make_lists
from longtrail.retrieval.index import Exclusion, Filter, check_request, check_targets, require_finite
from longtrail.retrieval.prune import Habit, Pruning, take_lists
from longtrail.retrieval.simd import BYTE_SHUFFLES, CODES
from longtrail.retrieval.tables import sub_scores
from longtrail.retrieval.workers import cuts, run_all

Floats = NDArray[np.float32]
_USERS = 256  # of one call of a kernel: their tables (8 to 32 kB each) and heaps bound the memory
_SPLIT_BYTES = 1 << 22 if BYTE_SHUFFLES else 1 << 18  # codes x users below which waking a second thread takes longer than it saves


class PQIndex:
    """Kinds pqtopk (every item) and recjpq_prune (`pruning` given: posting lists, visited until no other item can enter). Thread-safe.

    Readers see the catalogue as it was when their call began; `add`, `retire` and `compact` put a new one in its place.
    """

    def __init__(self, codes_NM: Tensor, centroids_MbE: Tensor, *, shared: bool = False, threads: int = 1, pruning: Pruning | None = None) -> None:
        """`codes_NM` uint8 [N + 1, M], row 0 padding; `centroids_MbE` float32 [M, b, E].

        E is D / M: split k is scored by the k-th part of a user vector. Where the splits are `shared`, E is D: each is scored by the whole of it.
        Raises ModelError where they do not fit.
        """
        _check_codes(codes_NM, centroids_MbE)
        base = base_segment(codes_NM.detach().cpu().numpy())
        self._open(Snapshot(segments=(base,), next_id=len(codes_NM)), centroids_MbE, shared, threads, pruning, fast=BYTE_SHUFFLES)

    @classmethod
    def of(cls, snapshot: Snapshot, centroids_MbE: Tensor, *, shared: bool = False, threads: int = 1, pruning: Pruning | None = None) -> "PQIndex":
        """An index over a catalogue that stands already (longtrail.retrieval.storage)."""
        index = cls.__new__(cls)
        index._open(snapshot, centroids_MbE, shared, threads, pruning, fast=BYTE_SHUFFLES)
        return index

    def _open(self, snapshot: Snapshot, centroids_MbE: Tensor, shared: bool, threads: int, pruning: Pruning | None, *, fast: bool) -> None:
        self.centroids_MbE = np.ascontiguousarray(centroids_MbE.detach().cpu().float().numpy())
        self.shared = shared
        self.threads = threads
        self.pruning = pruning
        self.fast = fast  # 8-bit bounds first; False adds up everything (what machines without AVX-512 VBMI do)
        self.habit = Habit(pruning.longest_pause if pruning else 0)
        self._writing = Lock()
        if pruning is not None and snapshot.lists is None:
            snapshot = _with_lists(snapshot, self.codes)
        self.snapshot = snapshot
        self._devices: dict[str, Any] = {}

    @property
    def items(self) -> int:
        return self.snapshot.next_id - 1

    @property
    def width(self) -> int:
        """D."""
        splits, _, width = self.centroids_MbE.shape
        return width if self.shared else splits * width

    @property
    def codes(self) -> int:
        """b."""
        return self.centroids_MbE.shape[1]

    @property
    def kind(self) -> str:
        return "pqtopk" if self.pruning is None else "recjpq_prune"

    def warm_up(self) -> "PQIndex":
        """Compile, or load from disk, everything a search runs: at load time, not in the first request. Returns itself."""
        user, targets = torch.zeros(1, self.width), torch.zeros(1, dtype=torch.int64)
        self.topk_and_ranks(user, targets, min(10, self.items))
        for _ in range(2):  # the second finds the threads awake and the pages of the codes mapped
            self.topk(user + 1, min(10, self.items), exclude=Exclusion(np.array([0, 1]), np.array([1])))
        return self

    # ------------------------------------------------------------ catalogue changes

    def add(self, codes_AM: Tensor) -> Ints:
        """Append items; returns their ids, which follow the largest. `codes_AM` uint8 [A, M]. Raises ModelError where they do not fit."""
        _check_codes(codes_AM, torch.from_numpy(self.centroids_MbE), least=0)
        with self._writing:
            before = self.snapshot.next_id
            self.snapshot = catalogue.added(self.snapshot, codes_AM.detach().cpu().numpy())
            return np.arange(before, self.snapshot.next_id)

    def retire(self, ids: Ints) -> None:
        """Never return these items again; their ids are not given anew. Raises ModelError for an id that is not there."""
        with self._writing:
            self.snapshot = catalogue.retired(self.snapshot, np.asarray(ids, np.int64))

    def compact(self) -> None:
        """Put what was added into the base and drop what was retired: ids stay. Searches go on meanwhile, changes wait."""
        with self._writing:
            snapshot = catalogue.compacted(self.snapshot)
            self.snapshot = snapshot if self.pruning is None else _with_lists(snapshot, self.codes)

    # ------------------------------------------------------------ searching

    def topk(self, user_BD: Tensor, k: int, *, exclude: Exclusion | None = None, allowed: Filter | None = None) -> tuple[Tensor, Tensor]:
        """longtrail.retrieval.index.Index.topk. A batch on a GPU is answered there (longtrail.retrieval.device)."""
        ids_BK, scores_BK, _ = self._answer(user_BD, None, k, exclude, allowed)
        return ids_BK, scores_BK

    def topk_and_ranks(
        self, user_BD: Tensor, targets_B: Tensor, k: int, *, exclude: Exclusion | None = None, allowed: Filter | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """longtrail.retrieval.index.Index.topk_and_ranks."""
        check_targets(user_BD, targets_B, self.items)
        ids_BK, scores_BK, ranks_B = self._answer(user_BD, targets_B, k, exclude, allowed)
        assert ranks_B is not None
        return ids_BK, scores_BK, ranks_B

    def _answer(
        self, user_BD: Tensor, targets_B: Tensor | None, k: int, exclude: Exclusion | None, allowed: Filter | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        check_request(user_BD, self.width, k, exclude)
        if self.shared:  # everything below cuts a user vector into one part a split
            user_BD = user_BD.repeat(1, len(self.centroids_MbE))
        snapshot = self.snapshot
        if user_BD.device.type != "cpu":
            return self.on_device(snapshot, user_BD.device)(user_BD, targets_B, k, exclude, allowed)
        user_BD = user_BD.detach().float().contiguous()
        users = len(user_BD)
        valid = snapshot.allowed(allowed)
        excluded, at = snapshot.excluded(exclude, users)
        places_BK, scores_BK = np.zeros((users, k), np.int64), np.empty((users, k), np.float32)
        ranks_B = None if targets_B is None else np.zeros(users, np.int64)
        places_B = None if targets_B is None else snapshot.places_of(targets_B.cpu().numpy())

        def chunk(start: int, stop: int, threads: int) -> None:
            view = _View(self, snapshot, valid, excluded, at[start : stop + 1], threads)
            tables_UT = view.tables(user_BD[start:stop].numpy())
            view.best(tables_UT, places_BK[start:stop], scores_BK[start:stop])
            if ranks_B is not None and places_B is not None:
                ranks_B[start:stop] = view.ranks(tables_UT, places_B[start:stop])

        def chunks(start: int, stop: int) -> None:
            for first in range(start, stop, _USERS):
                chunk(first, min(first + _USERS, stop), 1)

        work = users * sum(segment.codes.nbytes for segment in snapshot.segments)
        threads = self.threads if work >= _SPLIT_BYTES else 1
        if users >= 2 * threads:
            run_all([partial(chunks, start, stop) for start, stop in cuts(users, threads)])
        else:
            for user in range(users):
                chunk(user, user + 1, threads)
        ids_BK = snapshot.ids_of(places_BK.reshape(-1)).reshape(places_BK.shape)
        return torch.from_numpy(ids_BK), torch.from_numpy(scores_BK), None if ranks_B is None else torch.from_numpy(ranks_B)

    def on_device(self, snapshot: Snapshot, device: torch.device) -> Any:
        """The catalogue in the memory of a GPU; copied there at the first call after a change."""
        from longtrail.retrieval.device import DeviceCatalogue

        kept = self._devices.get(str(device))
        if kept is None or kept.snapshot is not snapshot:
            kept = self._devices[str(device)] = DeviceCatalogue(snapshot, torch.from_numpy(self.centroids_MbE), device)
        return kept


class _View:
    """One call's users over one snapshot."""

    def __init__(self, index: PQIndex, snapshot: Snapshot, valid: tuple[Words, ...], excluded: Ints, at: Ints, threads: int) -> None:
        self.index, self.snapshot, self.valid, self.excluded, self.at, self.threads = index, snapshot, valid, excluded, at, threads
        self.parts = [s.part(offset, words) for s, offset, words in zip(snapshot.segments, snapshot.offsets, valid, strict=True)]

    def tables(self, user_UD: Floats) -> Floats:
        """[U, T]. Raises ModelError where a sub-score overflows float32."""
        splits = len(self.index.centroids_MbE)
        tables_UT = np.zeros((len(user_UD), splits * CODES), np.float32)
        if not sub_scores(user_UD, self.index.centroids_MbE, tables_UT):
            raise ModelError("scores overflow float32: user vectors or centroids are too large")
        return tables_UT

    def best(self, tables_UT: Floats, places_UK: Ints, scores_UK: Floats) -> None:
        """Writes places and scores, best first."""
        users, k = places_UK.shape
        heap = _Heaps(1 if users > 1 else self.threads, users, k)
        waiting, turns_UT, turn_U = np.arange(users), np.zeros((users, 0), np.int32), np.zeros(users, np.int64)
        lists, pruning = self.snapshot.lists, self.index.pruning
        if lists is not None and pruning is not None and self.index.habit.wants():
            part = lists.part(self.valid[0])
            blocks = self.snapshot.segments[0].blocks
            done_U, turns_UT, turn_U = take_lists(
                part, lists.starts, self.index.codes, blocks, pruning, tables_UT, self.excluded, self.at, *heap.first, fast=self.index.fast
            )
            waiting = np.flatnonzero(~done_U)
            self.index.habit.learn(2 * len(waiting) <= users)
        if len(waiting):
            self._scan(self.parts[0], self.snapshot.segments[0].blocks, tables_UT, turns_UT, turn_U, heap, waiting)
        for segment, part in zip(self.snapshot.segments[1:], self.parts[1:], strict=True):
            self._scan(part, segment.blocks, tables_UT, turns_UT[:, :0], np.zeros(users, np.int64), heap, np.arange(users))
        kernels.merge(heap.scores_PUK, heap.places_PUK, heap.sizes_PU, scores_UK, places_UK)

    def _scan(self, part: Any, blocks: int, tables_UT: Floats, turns_UT: Any, turn_U: Ints, heap: "_Heaps", who: Ints) -> None:
        """All blocks of a part into the heaps of the users `who`, each of the heaps' P parts by a thread of its own."""
        users, k = heap.scores_PUK.shape[1:]
        floor_U = np.where(heap.sizes_PU[0] == k, heap.scores_PUK[0, :, 0], np.float32(-np.inf))
        everyone = len(who) == users
        tables, turns, turn, floor = (values if everyone else values[who] for values in (tables_UT, turns_UT, turn_U, floor_U))
        at = self.at if everyone else None
        excluded = self.excluded
        if at is None:
            sizes = np.diff(self.at)[who]
            at = np.concatenate([[0], np.cumsum(sizes)])
            excluded = excluded[np.repeat(self.at[who] - at[:-1], sizes) + np.arange(at[-1])]

        def scan(p: int, first: int, last: int) -> None:
            scores, places, sizes = heap.scores_PUK[p], heap.places_PUK[p], heap.sizes_PU[p]
            if not everyone:
                scores, places, sizes = scores[who], places[who], sizes[who]
            kernels.search(part, self.index.codes, first, last, tables, excluded, at, turns, turn, floor, scores, places, sizes, self.index.fast)
            if not everyone:
                heap.scores_PUK[p, who], heap.places_PUK[p, who], heap.sizes_PU[p, who] = scores, places, sizes

        run_all([partial(scan, p, first, last) for p, (first, last) in enumerate(cuts(blocks, len(heap.scores_PUK)))])

    def ranks(self, tables_UT: Floats, places_U: Ints) -> Ints:
        """[U], from 1; 0 for places (-1: none) of items that the user must not get."""
        users = len(places_U)
        owners = np.repeat(np.arange(users), np.diff(self.at))
        places = self.excluded[self.at[0] : self.at[-1]]
        allowed_U = self.snapshot.is_valid(places_U, self.valid)
        allowed_U[owners[places == places_U[owners]]] = False
        own_U = self._scores(tables_UT, np.arange(users), np.maximum(places_U, 0))
        threads = 1 if users > 1 else self.threads
        counts_PU = np.zeros((threads, users), np.int64)
        for segment, part in zip(self.snapshot.segments, self.parts, strict=True):

            def count(p: int, first: int, last: int, part: Any = part) -> None:
                kernels.count_before(part, self.index.codes, first, last, tables_UT, places_U, own_U, counts_PU[p], self.index.fast)

            run_all([partial(count, p, first, last) for p, (first, last) in enumerate(cuts(segment.blocks, threads))])
        scores = self._scores(tables_UT, owners, places)
        before = (scores > own_U[owners]) | ((scores == own_U[owners]) & (places < places_U[owners]))
        hidden_U = np.bincount(owners[before & self.snapshot.is_valid(places, self.valid)], minlength=users)
        return np.where(allowed_U, 1 + counts_PU.sum(0) - hidden_U, 0)

    def _scores(self, tables_UT: Floats, users: Ints, places: Ints) -> Floats:
        """The scores of places [n], each of its user, summed as the kernels do."""
        rows = self.snapshot.rows(places).astype(np.int64)
        scores = np.zeros(len(places), np.float32)
        for split in range(rows.shape[1]):
            scores += tables_UT[users, split * CODES + rows[:, split]]
        return scores


class _Heaps:
    """The k best so far of each user, in each of P parts."""

    def __init__(self, parts: int, users: int, k: int) -> None:
        self.scores_PUK = np.empty((parts, users, k), np.float32)
        self.places_PUK = np.empty((parts, users, k), np.int64)
        self.sizes_PU = np.zeros((parts, users), np.int64)

    @property
    def first(self) -> tuple[Floats, Ints, Ints]:
        return self.scores_PUK[0], self.places_PUK[0], self.sizes_PU[0]


def _with_lists(snapshot: Snapshot, codes: int) -> Snapshot:
    return Snapshot(segments=snapshot.segments, next_id=snapshot.next_id, lists=make_lists(snapshot.segments[0], codes))


def _check_codes(codes_NM: Tensor, centroids_MbE: Tensor, *, least: int = 2) -> None:
    if centroids_MbE.ndim != 3 or not 1 <= centroids_MbE.shape[1] <= CODES:
        raise ModelError(f"centroids have shape {list(centroids_MbE.shape)}; expected [splits, at most {CODES} codes, width / splits]")
    require_finite(centroids_MbE.flatten(1), "centroid")
    if codes_NM.dtype != torch.uint8 or codes_NM.ndim != 2 or codes_NM.shape[1] != len(centroids_MbE) or len(codes_NM) < least:
        raise ModelError(
            f"codes are {codes_NM.dtype} {list(codes_NM.shape)}; expected uint8 [items + 1, {len(centroids_MbE)}]"
            + (" with at least one item" if least else "")
        )
    if codes_NM.numel() and int(codes_NM.max()) >= centroids_MbE.shape[1]:
        raise ModelError(f"codes run to {int(codes_NM.max())}; the centroids have {centroids_MbE.shape[1]} a split, from 0")
