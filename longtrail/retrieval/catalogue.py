"""Changes of a catalogue of codes: each makes a new snapshot from the one before, which its readers keep. A added items, M splits.

Added items go to a second segment with room to spare; their codes are written beyond what any older snapshot's bits allow it to read. Retired items
lose their bit. Compaction writes one segment of what is left.
"""

import numpy as np

from longtrail.errors import ModelError
from longtrail.retrieval.blocks import BLOCK, Bytes, Ints, Segment, Snapshot, block_codes, pack, unpack

_ROOM = 8  # blocks that a second segment has at least


def added(snapshot: Snapshot, codes_AM: Bytes) -> Snapshot:
    """Ids follow the largest so far."""
    base, *rest = snapshot.segments
    tail = rest[0] if rest else Segment(
        codes=np.zeros((_ROOM, base.codes.shape[1], BLOCK), np.uint8), first=snapshot.next_id, count=0, valid=np.zeros(_ROOM * BLOCK // 64, np.uint64)
    )  # fmt: skip
    count = tail.count + len(codes_AM)
    codes, valid = tail.codes, tail.valid.copy()
    if count > tail.places:
        blocks = max(2 * len(codes), -(-count // BLOCK))
        codes = np.concatenate([codes, np.zeros((blocks - len(codes), *codes.shape[1:]), np.uint8)])
        valid = np.concatenate([valid, np.zeros(blocks * BLOCK // 64 - len(valid), np.uint64)])
    places = np.arange(tail.count, count)
    codes[places // BLOCK, :, places % BLOCK] = codes_AM
    mask = unpack(valid, len(codes) * BLOCK)
    mask[places] = True
    grown = Segment(codes=codes, first=tail.first, count=count, valid=pack(mask, len(mask)))
    return Snapshot(segments=(base, grown), next_id=snapshot.next_id + len(codes_AM), lists=snapshot.lists)


def retired(snapshot: Snapshot, ids: Ints) -> Snapshot:
    """Without these items. Raises ModelError naming one that is not there; one that was retired before is fine."""
    unknown = ids[(ids < 1) | (ids >= snapshot.next_id)]
    if len(unknown):
        raise ModelError(f"retire: item {unknown[0]} is not there; expected ids from 1 to {snapshot.next_id - 1}")
    places = snapshot.places_of(ids)
    segments = []
    for segment, offset in zip(snapshot.segments, snapshot.offsets, strict=True):
        own = places[(places >= offset) & (places < offset + segment.places)] - offset
        valid = segment.valid
        if len(own):
            valid = valid.copy()
            np.bitwise_and.at(valid, own >> 6, ~(np.uint64(1) << (own & 63).astype(np.uint64)))
        segments.append(Segment(codes=segment.codes, first=segment.first, count=segment.count, valid=valid, ids=segment.ids))
    return Snapshot(segments=tuple(segments), next_id=snapshot.next_id, lists=snapshot.lists)


def compacted(snapshot: Snapshot) -> Snapshot:
    """One segment with what may be returned, and no lists."""
    rows, ids = [], []
    for segment, offset in zip(snapshot.segments, snapshot.offsets, strict=True):
        places = np.flatnonzero(unpack(segment.valid, segment.blocks * BLOCK))
        rows.append(segment.rows(places))
        ids.append(snapshot.ids_of(places + offset))
    codes_NM, left = np.concatenate(rows), np.concatenate(ids)
    blocked = block_codes(codes_NM)
    valid = pack(np.ones(len(left), bool), len(blocked) * BLOCK)
    # Also without gaps the ids are kept: the first is 1, and place 0 is no longer padding's.
    segment = Segment(codes=blocked, first=1, count=len(left), valid=valid, ids=None if _in_a_row(left) else left)
    return Snapshot(segments=(segment,), next_id=snapshot.next_id)


def _in_a_row(ids: Ints) -> bool:
    return not len(ids) or (ids[0] == 1 and ids[-1] == len(ids))
