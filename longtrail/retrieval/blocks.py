"""Codes as the kernels read them, and a catalogue of them as one reader sees it. N items, M splits, P places, B users.

A place is where an item's codes stand: block `place // 512`, lane `place % 512`. Places rise with item ids, but ids may have gaps that places have
not (retired items, after compaction) and places gaps that ids have not (the end of a part's last block).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtrail.errors import ModelError
from longtrail.retrieval.index import Exclusion, Filter
from longtrail.retrieval.simd import BLOCK

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

NO_PLACES: NDArray[np.uint32] = np.zeros(0, np.uint32)


def block_codes(codes_NM: Bytes, blocks: int | None = None) -> Bytes:
    """[N, M] to [blocks, M, 512], filled up with zeros; at least one block, or as many as asked for."""
    items, splits = codes_NM.shape
    blocks = blocks or max(1, -(-items // BLOCK))
    result = np.zeros((blocks, splits, BLOCK), np.uint8)
    whole = items // BLOCK
    step = 256  # blocks: the turning stays in the cache
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        result[start:stop] = codes_NM[start * BLOCK : stop * BLOCK].reshape(stop - start, BLOCK, splits).transpose(0, 2, 1)
    if items % BLOCK:
        result[whole, :, : items % BLOCK] = codes_NM[whole * BLOCK :].T
    return result


def pack(mask_P: NDArray[np.bool_], places: int) -> Words:
    """One bit a place, filled up with zeros: [places / 64]."""
    bits = np.zeros(places // 8, np.uint8)
    packed = np.packbits(mask_P, bitorder="little")
    bits[: len(packed)] = packed
    return bits.view(np.uint64)


def unpack(words: Words, places: int) -> NDArray[np.bool_]:
    return np.unpackbits(words.view(np.uint8), count=places, bitorder="little").astype(bool)


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """Items of rising ids: ids first .. first + count - 1 in order, or those of `ids`."""

    codes: Bytes  # [blocks, M, 512]
    first: int
    count: int
    valid: Words  # by place: items that are there and not retired
    ids: Ints | None = None  # [count]

    @property
    def blocks(self) -> int:
        """Blocks that hold items."""
        return -(-self.count // BLOCK)

    @property
    def places(self) -> int:
        return len(self.codes) * BLOCK

    def part(self, offset: int, valid: Words) -> tuple[Any, ...]:
        """What longtrail.retrieval.kernels calls a part."""
        flat = self.codes.reshape(-1)
        return flat, flat.view(np.uint64), self.codes.shape[1], offset, NO_PLACES, valid, valid

    def rows(self, places: Ints) -> Bytes:
        """[n, M]."""
        return self.codes[places // BLOCK, :, places % BLOCK]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lists:
    """The codes once more for each split, sorted by its sub-ids: list k * b + j holds the items of sub-id j of split k, by rising place."""

    codes: Bytes  # [blocks, M, 512]
    places: NDArray[np.uint32]  # [blocks * 512], places in the base segment
    starts: Ints  # [M * b + 1], blocks
    valid: Words  # where a list has items at all

    def part(self, check: Words) -> tuple[Any, ...]:
        flat = self.codes.reshape(-1)
        return flat, flat.view(np.uint64), self.codes.shape[1], 0, self.places, self.valid, check

    @property
    def bytes(self) -> int:
        return self.codes.nbytes + self.places.nbytes + self.starts.nbytes + self.valid.nbytes


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """The catalogue at one moment: never changed once it is made, but for codes beyond every `valid` bit."""

    segments: tuple[Segment, ...]  # the base, and what was added since
    next_id: int
    lists: Lists | None = None  # of the base
    offsets: tuple[int, ...] = field(init=False)  # first place of each segment

    def __post_init__(self) -> None:
        ends = np.cumsum([0, *(segment.places for segment in self.segments)])
        object.__setattr__(self, "offsets", tuple(int(end) for end in ends[:-1]))

    @property
    def plain(self) -> bool:
        """Whether every item's place is its id."""
        return len(self.segments) == 1 and self.segments[0].first == 0 and self.segments[0].ids is None

    def places_of(self, ids: Ints) -> Ints:
        """-1 for ids that are not there (0, unknown, dropped by compaction). Retired ids may still have a place."""
        places = np.full(len(ids), -1, np.int64)
        for segment, offset in zip(self.segments, self.offsets, strict=True):
            if segment.ids is None:
                inside = (ids >= max(1, segment.first)) & (ids < segment.first + segment.count)
                places[inside] = offset + ids[inside] - segment.first
            elif segment.count:
                near = np.minimum(np.searchsorted(segment.ids, ids), segment.count - 1)
                inside = (segment.ids[near] == ids) & (ids > 0)
                places[inside] = offset + near[inside]
        return places

    def ids_of(self, places: Ints) -> Ints:
        """Item ids of valid places; 0 for -1, no place."""
        if self.plain:
            return np.maximum(places, 0)
        ids = np.zeros_like(places)
        for segment, offset in zip(self.segments, self.offsets, strict=True):
            inside = (places >= offset) & (places < offset + segment.count)
            own = places[inside] - offset
            ids[inside] = segment.first + own if segment.ids is None else segment.ids[own]
        return ids

    def rows(self, places: Ints) -> Bytes:
        """Codes [n, M] of places."""
        rows = np.zeros((len(places), self.segments[0].codes.shape[1]), np.uint8)
        for segment, offset in zip(self.segments, self.offsets, strict=True):
            inside = (places >= offset) & (places < offset + segment.places)
            rows[inside] = segment.rows(places[inside] - offset)
        return rows

    def allowed(self, wanted: Filter | None) -> tuple[Words, ...]:
        """Bits of the items of each segment that may be returned."""
        if wanted is None:
            return tuple(segment.valid for segment in self.segments)
        kept = wanted.packed
        if kept is None or kept[0] is not self:
            wanted.packed = kept = (self, tuple(self._filtered(segment, wanted) for segment in self.segments))
        return kept[1]

    @staticmethod
    def _filtered(segment: Segment, wanted: Filter) -> Words:
        if segment.ids is None:
            mask = wanted.up_to(segment.first + segment.count - 1)[segment.first :]
        else:
            mask = wanted.up_to(int(segment.ids[-1]) if segment.count else 0)[segment.ids]
        return pack(mask, segment.places) & segment.valid

    def is_valid(self, places: Ints, allowed: tuple[Words, ...]) -> NDArray[np.bool_]:
        """Whether places (-1: none) are of items that may be returned."""
        result = np.zeros(len(places), bool)
        for segment, offset, words in zip(self.segments, self.offsets, allowed, strict=True):
            inside = (places >= offset) & (places < offset + segment.places)
            own = places[inside] - offset
            result[inside] = (words[own >> 6] >> (own & 63).astype(np.uint64)) & np.uint64(1)
        return result

    def excluded(self, exclude: Exclusion | None, users: int) -> tuple[Ints, Ints]:
        """(places, at [users + 1]): the sorted distinct places of each user's excluded items."""
        if exclude is None or not len(exclude.items):
            return np.zeros(0, np.int64), np.zeros(users + 1, np.int64)
        offsets = np.asarray(exclude.offsets_B, np.int64)
        places = self.places_of(np.asarray(exclude.items[offsets[0] : offsets[-1]], np.int64))
        if users == 1:
            places = np.unique(places)
            places = places[np.searchsorted(places, 0) :]
            return places, np.array([0, len(places)])
        if np.any(np.diff(offsets) < 0):
            raise ModelError("exclusions: offsets fall; expected the start of each user's items, rising")
        owners = np.repeat(np.arange(users), np.diff(offsets))[places >= 0]
        keys = np.unique(owners << 40 | places[places >= 0])
        return keys & ((1 << 40) - 1), np.searchsorted(keys >> 40, np.arange(users + 1))


def base_segment(codes_NM: Bytes) -> Segment:
    """Items 1 .. N from codes [N + 1, M], whose row 0 is padding."""
    blocked = block_codes(codes_NM)
    mask = np.ones(len(codes_NM), bool)
    mask[0] = False
    return Segment(codes=blocked, first=0, count=len(codes_NM), valid=pack(mask, len(blocked) * BLOCK))


def make_lists(segment: Segment, width: int) -> Lists:
    """The posting lists of a segment's valid items. Bytes: about (M + 4) * M an item."""
    splits = segment.codes.shape[1]
    alive = np.flatnonzero(unpack(segment.valid, segment.blocks * BLOCK))
    rows = segment.rows(alive)
    sizes = np.concatenate([np.bincount(rows[:, k], minlength=width)[:width] for k in range(splits)])
    starts = np.concatenate([[0], np.cumsum(-(-sizes // BLOCK))])
    codes = np.zeros((int(starts[-1]), splits, BLOCK), np.uint8)
    places, mask = np.zeros(len(codes) * BLOCK, np.uint32), np.zeros(len(codes) * BLOCK, bool)
    for k in range(splits):
        order = np.argsort(rows[:, k], kind="stable")
        own = sizes[k * width : (k + 1) * width]
        first, last = starts[k * width], starts[(k + 1) * width]
        into = np.repeat((starts[k * width : (k + 1) * width] - first) * BLOCK - np.cumsum(own) + own, own) + np.arange(len(order))
        spread = np.zeros(((last - first) * BLOCK, splits), np.uint8)
        spread[into] = rows[order]
        codes[first:last] = block_codes(spread, last - first)
        places[first * BLOCK + into], mask[first * BLOCK + into] = alive[order], True
    return Lists(codes=codes, places=places, starts=starts.astype(np.int64), valid=pack(mask, len(mask)))
