"""Compiled loops over blocked codes: exact top-k and exact ranks by sums of sub-scores.

M splits, U users of a call, K results. Codes are uint8 [blocks, M, 512]: 512 items a block, one split after the other, so that a scan reads memory
in order. A user's sub-scores are float32 [M * 256]; an item's score is their float32 sum in the order of the splits, everywhere the same.

Exact scores are only made of items that may still enter the list. Which ones is told by 8-bit tables, rounded up: sums of them bound scores from
above, and AVX-512 VBMI looks up 64 of them at once. (PQTopK scores every item, Petrov et al., RecSys 2024; 8-bit tables as a first pass are known
from product quantisation, e.g. faiss's fast scan; that they are exact here, by rescoring, and made again as the threshold rises, is our choice.)
Machines without VBMI add up all sub-scores.

All that these kernels inline stands here: numba's cache on disk notices changes of the file of a function, not of those that it calls.
"""

import numba
import numpy as np

from longtrail.kernels import kernel
from longtrail.retrieval.simd import BLOCK, CODES, GROUP, byte_sums, lowest, ones

MADE_WITH = {"kernels.py": "be9794c4dfea49a5", "retrieval/simd.py": "2facfbbeb4173517"}
_TILE = 1 << 17  # bytes of codes that one user's scan reads before the next user's: stays in L2
_TOP = 240  # where the threshold lies in 8 bits when tables are made: above it there is room for a rising threshold
_UP = 1.002  # levels by which a byte may lie above the exact value
_inner = numba.njit(nogil=True)  # becomes a part of the kernels that call it


# ---------------------------------------------------------------- scores and their bounds


@_inner
def _bounds_of(table, tables, at, splits, codes, low_M, margin, threshold, top):  # type: ignore[no-untyped-def]
    """Write 8-bit tables at tables[at]: (sub-score - low) / step rounded up, by less than _UP; at least 0. Returns (zero, step): a float32 sum of
    sub-scores that is at least x has a sum of bytes of at least (x - margin - zero) / step. `threshold` lies at `top`. step 0: they tell nothing."""
    zero = 0.0
    for k in range(splits):
        zero += low_M[k]
    step = (threshold - zero) / top
    if not step > margin:
        return zero, 0.0
    inverse = np.float32(1 / step)
    for k in range(splits):
        low, first = np.float32(low_M[k]), k * CODES
        for j in range(codes):  # in float32, for its vectors: wrong by less than 0.001 levels
            level = (table[first + j] - low) * inverse + np.float32(_UP - 0.001)
            tables[at + first + j] = np.uint8(np.int32(min(max(level, np.float32(0)), np.float32(255))))
    return zero, step


@_inner
def _extremes(table, splits, codes, low_M, top_M):  # type: ignore[no-untyped-def]
    """Least and largest sub-scores; returns what summing in float32 can be wrong by."""
    size = 0.0
    for k in range(splits):
        low, top = table[k * CODES], table[k * CODES]
        for j in range(1, codes):
            value = table[k * CODES + j]
            low, top = value if value < low else low, value if value > top else top
        low_M[k], top_M[k] = low, top
        size += np.float64(max(-low, top))
    return size * splits * 2.0**-22


@_inner
def _score(codes, splits, block, lane, table):  # type: ignore[no-untyped-def]
    at = block * splits * BLOCK + lane
    total = np.float32(0)
    for k in range(splits):
        total += table[k * CODES + codes[at + k * BLOCK]]
    return total


@_inner
def _eight_scores(words, splits, block, group, table, scores):  # type: ignore[no-untyped-def]
    """Scores of items 8 group .. 8 group + 7 of a block into scores[:8]; returns the largest. One load brings eight codes."""
    byte = np.uint64(255)
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = np.float32(0)
    at = block * splits * (BLOCK // 8) + group
    for k in range(splits):
        word, entry = words[at + k * (BLOCK // 8)], np.uint64(k * CODES)
        a0 += table[entry + (word & byte)]
        a1 += table[entry + ((word >> np.uint64(8)) & byte)]
        a2 += table[entry + ((word >> np.uint64(16)) & byte)]
        a3 += table[entry + ((word >> np.uint64(24)) & byte)]
        a4 += table[entry + ((word >> np.uint64(32)) & byte)]
        a5 += table[entry + ((word >> np.uint64(40)) & byte)]
        a6 += table[entry + ((word >> np.uint64(48)) & byte)]
        a7 += table[entry + (word >> np.uint64(56))]
    scores[0], scores[1], scores[2], scores[3], scores[4], scores[5], scores[6], scores[7] = a0, a1, a2, a3, a4, a5, a6, a7
    return max(max(max(a0, a1), max(a2, a3)), max(max(a4, a5), max(a6, a7)))


# ---------------------------------------------------------------- the k best so far: a heap, the worst on top


@_inner
def _worse(score, place, other_score, other_place):  # type: ignore[no-untyped-def]
    return score < other_score or (score == other_score and place > other_place)


@_inner
def _sink(scores, places, at, size):  # type: ignore[no-untyped-def]
    score, place = scores[at], places[at]
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and _worse(scores[child + 1], places[child + 1], scores[child], places[child]):
            child += 1
        if not _worse(scores[child], places[child], score, place):
            break
        scores[at], places[at] = scores[child], places[child]
        at = child
    scores[at], places[at] = score, place


@_inner
def _offer(scores, places, size, k, score, place):  # type: ignore[no-untyped-def]
    """Keep (score, place) if it is among the k best. Returns the heap's size."""
    if size == k:
        if _worse(scores[0], places[0], score, place):
            scores[0], places[0] = score, place
            _sink(scores, places, 0, size)
        return size
    at = size
    while at > 0 and _worse(score, place, scores[(at - 1) // 2], places[(at - 1) // 2]):
        scores[at], places[at] = scores[(at - 1) // 2], places[(at - 1) // 2]
        at = (at - 1) // 2
    scores[at], places[at] = score, place
    return size + 1


@kernel
def merge(scores_PUK, places_PUK, sizes_PU, scores_UK, places_UK):  # type: ignore[no-untyped-def]
    """The k best of P heaps a user, best first; -inf and -1 behind them. Empties the first heap."""
    parts, users, k = scores_PUK.shape
    for u in range(users):
        scores, places, size = scores_PUK[0, u], places_PUK[0, u], sizes_PU[0, u]
        for p in range(1, parts):
            for i in range(sizes_PU[p, u]):
                size = _offer(scores, places, size, k, scores_PUK[p, u, i], places_PUK[p, u, i])
        for i in range(size, k):
            scores_UK[u, i], places_UK[u, i] = -np.inf, -1
        while size > 0:
            size -= 1
            scores_UK[u, size], places_UK[u, size] = scores[0], places[0]
            scores[0], places[0] = scores[size], places[size]
            _sink(scores, places, 0, size)


# ---------------------------------------------------------------- scans


@_inner
def _holds(sorted_values, start, stop, value):  # type: ignore[no-untyped-def]
    end = stop
    while start < stop:
        middle = (start + stop) // 2
        if sorted_values[middle] < value:
            start = middle + 1
        else:
            stop = middle
    return start < end and sorted_values[start] == value


@_inner
def _met_before(codes, splits, block, lane, turns, turn):  # type: ignore[no-untyped-def]
    """Whether the item stands in a list that was scanned before `turn`."""
    at = block * splits * BLOCK + lane
    for k in range(splits):  # noqa: SIM110 - numba compiles loops
        if turns[k * CODES + codes[at + k * BLOCK]] < turn:
            return True
    return False


@_inner
def _scan(part, first, last, query, heap, size, turn, floor, bounds, fast):  # type: ignore[no-untyped-def]
    """Blocks first..last of one user. `bounds`: the 8-bit tables and what they were made from, kept between calls. Returns the heap's size."""
    codes, words, splits, offset, places_of, valid, check = part
    table, excluded, start, stop, turns = query
    scores, places, k = heap
    tables, at, width, low_M, top_M, state, masks, eight, lanes, found = bounds
    # state: zero, step, margin and threshold of the tables; items rescored since they were made; blocks to add up without them, and how many
    # the last time; low ends
    ordered = len(places_of) == 0 and turn == 0  # places rise: an equal score that comes later never enters
    for block in range(first, last):
        threshold = max(floor, scores[0]) if size == k else floor
        plain = not fast or threshold == -np.inf or state[5] > 0
        count = 0  # items that may enter: lanes[:count], scores found[:count]
        if not plain:
            level = (threshold - state[2] - state[0]) / state[1] if state[1] > 0 else 999.0
            if level > 252 or (state[4] > 64 and threshold > state[3]):
                gap = -threshold
                for i in range(splits):
                    gap += np.float64(top_M[i])
                for i in range(splits):  # below top - gap a sub-score is hopeless, so finer steps above it cost nothing
                    state[7 + i] = max(np.float64(low_M[i]), np.float64(top_M[i]) - max(gap, 0.0))
                state[0], state[1] = _bounds_of(table, tables, at, splits, width, state[7:], state[2], threshold, _TOP)
                state[3], state[4] = threshold, 0.0
                level = (threshold - state[2] - state[0]) / state[1] if state[1] > 0 else 0.0
            plain = level <= 1.0  # the tables tell nothing
            if plain:
                state[5] = state[6] = min(2 * state[6] + 1, 63.0)
        if plain:
            state[5] -= 1.0
            strict = ordered and size == k and scores[0] >= floor
            for group in range(BLOCK // 8):
                bits = (valid[block * GROUP + group // 8] >> np.uint64(8 * (group % 8))) & np.uint64(255)
                if not bits:
                    continue
                best = _eight_scores(words, splits, block, group, table, eight)
                if best < threshold or (strict and best == threshold):
                    continue
                while bits:
                    lane = lowest(bits)  # type: ignore[call-arg, var-annotated]
                    bits &= bits - np.uint64(1)
                    if eight[lane] > threshold or (eight[lane] == threshold and not strict):
                        lanes[count], found[count] = group * 8 + lane, eight[lane]
                        count += 1
        else:
            bound = np.uint8(min(np.ceil(level - 1e-6), 255.0))
            byte_sums(codes, block * splits * BLOCK, tables, at, splits, bound, np.uint8(255), masks)  # type: ignore[call-arg]
            rescored = 0
            for group in range(GROUP):
                bits = masks[group] & valid[block * GROUP + group]
                while bits:
                    lane = group * 64 + lowest(bits)  # type: ignore[call-arg]
                    bits &= bits - np.uint64(1)
                    rescored += 1
                    score = _score(codes, splits, block, lane, table)
                    lanes[count], found[count] = lane, score
                    count += score >= threshold
            state[4] += rescored
            if rescored <= BLOCK // 6:
                state[6] = 0.0
            elif state[3] >= threshold:  # bounds let too many through (the first blocks, ties, a flat table): adding up is cheaper for a while
                state[5] = state[6] = min(2 * state[6] + 1, 63.0)
        for i in range(count):
            score, lane = found[i], lanes[i]
            place = offset + block * BLOCK + lane
            if len(places_of):
                place = np.int64(places_of[block * BLOCK + lane])
            if size == k and not _worse(scores[0], places[0], score, place):
                continue
            if len(places_of) and not (check[place >> 6] >> np.uint64(place & 63)) & np.uint64(1):
                continue
            if start < stop and _holds(excluded, start, stop, place):
                continue
            if turn and _met_before(codes, splits, block, lane, turns, turn):
                continue
            size = _offer(scores, places, size, k, score, place)
    return size


@_inner
def _fresh(users, splits, width, tables_UT):  # type: ignore[no-untyped-def]
    """Room for the 8-bit tables of each user."""
    low_UM, top_UM = np.empty((users, splits), np.float32), np.empty((users, splits), np.float32)
    state_US = np.zeros((users, 7 + splits))
    for u in range(users):
        state_US[u, 2] = _extremes(tables_UT[u], splits, width, low_UM[u], top_UM[u])
    masks, eight = np.zeros(2 * GROUP, np.uint64), np.zeros(8, np.float32)
    lanes, found = np.zeros(BLOCK + 1, np.int64), np.zeros(BLOCK + 1, np.float32)
    return np.zeros(users * splits * CODES, np.uint8), low_UM, top_UM, state_US, masks, eight, lanes, found


@kernel
def search(part, width, first, last, tables_UT, excluded, excluded_at, turns_UT, turn_U, floor_U, scores_UK, places_UK, size_U, fast):  # type: ignore[no-untyped-def]
    """Blocks first..last of a part of the catalogue into each user's heap. A tile of codes serves all users before the next is read.

    part = (codes, words, splits, offset, places_of, valid, check): `words` are the codes as uint64; item i of the part has place `offset + i`, or
    places_of[i] where that is not empty; `valid` is a bit set by item of the part, `check` one by place (read only with places_of).
    excluded[excluded_at[u] : excluded_at[u + 1]]: sorted places. Items of lists (turns_UT) before `turn_U` were met and are passed over;
    floor_U: what scores less is not wanted. fast: use 8-bit bounds.
    """
    splits, users = part[2], len(tables_UT)
    bytes_UT, low_UM, top_UM, state_US, masks, eight, lanes, found = _fresh(users, splits, width, tables_UT)
    tile = max(1, _TILE // (splits * BLOCK))
    for start in range(first, last, tile):
        for u in range(users):
            query = (tables_UT[u], excluded, excluded_at[u], excluded_at[u + 1], turns_UT[u])
            heap = (scores_UK[u], places_UK[u], scores_UK.shape[1])
            bounds = (bytes_UT, u * splits * CODES, width, low_UM[u], top_UM[u], state_US[u], masks, eight, lanes, found)
            size_U[u] = _scan(part, start, min(start + tile, last), query, heap, size_U[u], turn_U[u], floor_U[u], bounds, fast)


@kernel
def search_lists(part, width, plans, starts, trials, blocks, tables_UT, excluded, excluded_at, scores_UK, places_UK, size_U, turn_U, done_U, fast):  # type: ignore[no-untyped-def]
    """Lists of a plan (longtrail.retrieval.tables.plan) into each user's heap, until no item that is left can enter (done_U) or going
    on does not pay.

    trials [n, 2] (lists, cost): after so many lists, those that the present threshold asks for must not be more than `cost` times all `blocks`.
    turn_U: lists visited.
    """
    lists_UR, bounds_UR, costs_UR, counts_U, turns_UT = plans
    splits, users, k = part[2], len(tables_UT), scores_UK.shape[1]
    bytes_UT, low_UM, top_UM, state_US, masks, eight, lanes, found = _fresh(users, splits, width, tables_UT)
    for u in range(users):
        query = (tables_UT[u], excluded, excluded_at[u], excluded_at[u + 1], turns_UT[u])
        heap = (scores_UK[u], places_UK[u], k)
        bounds = (bytes_UT, u * splits * CODES, width, low_UM[u], top_UM[u], state_US[u], masks, eight, lanes, found)
        turn, trial, paying = 0, 0, True
        while paying:
            threshold = scores_UK[u, 0] if size_U[u] == k else np.float32(-np.inf)
            done_U[u] = bounds_UR[u, turn] < threshold or bounds_UR[u, turn] == -np.inf  # ... every item has been met
            if done_U[u] or turn == counts_U[u]:
                break
            if trial < len(trials) and turn >= trials[trial, 0]:
                stop = turn
                while stop < counts_U[u] and bounds_UR[u, stop] >= threshold:
                    stop += 1
                ahead = costs_UR[u, stop] - costs_UR[u, turn]
                paying = bounds_UR[u, stop] < threshold and ahead <= trials[trial, 1] * blocks
                trial += 1
                continue
            chosen = lists_UR[u, turn]
            size_U[u] = _scan(part, starts[chosen], starts[chosen + 1], query, heap, size_U[u], turn, np.float32(-np.inf), bounds, fast)
            turn += 1
        turn_U[u] = turn


@kernel
def count_before(part, width, first, last, tables_UT, targets_U, scores_U, counts_U, fast):  # type: ignore[no-untyped-def]
    """Add to counts_U how many valid items of blocks first..last come before place targets_U: a higher score, or an equal one and a lower place."""
    codes, words, splits, offset, _, valid, _ = part
    users = len(tables_UT)
    bytes_UT, low_UM, _, state_US, masks, eight, _, _ = _fresh(users, splits, width, tables_UT)
    for u in range(users):
        state_US[u, 7:] = low_UM[u]
        # Above the target there must be room for what rounding up can add.
        top, at = 250 - 1.01 * splits, u * splits * CODES
        made = _bounds_of(tables_UT[u], bytes_UT, at, splits, width, state_US[u, 7:], state_US[u, 2], np.float64(scores_U[u]), top)
        state_US[u, 0], state_US[u, 1] = made
    tile = max(1, _TILE // (splits * BLOCK))
    for start in range(first, last, tile):
        for u in range(users):
            table, own, target = tables_UT[u], scores_U[u], targets_U[u]
            zero, step, margin = state_US[u, 0], state_US[u, 1], state_US[u, 2]
            low = high = 0.0
            if step > 0:
                low, high = np.ceil((own - margin - zero) / step - 1e-6), np.ceil((own + margin - zero) / step + splits * _UP + 1e-6)
            usable, count, unsure = fast and low >= 1 and high <= 255, 0, 0
            for block in range(start, min(start + tile, last)):
                if usable and unsure <= (block - start + 1) * (BLOCK // 5):
                    at = u * splits * CODES
                    byte_sums(codes, block * splits * BLOCK, bytes_UT, at, splits, np.uint8(low), np.uint8(high), masks)  # type: ignore[call-arg]
                    for group in range(GROUP):
                        bits = masks[group] & valid[block * GROUP + group]
                        sure = masks[GROUP + group] & bits
                        count += ones(sure)
                        bits ^= sure
                        unsure += ones(bits)
                        while bits:
                            lane = group * 64 + lowest(bits)  # type: ignore[call-arg]
                            bits &= bits - np.uint64(1)
                            score = _score(codes, splits, block, lane, table)
                            count += score > own or (score == own and offset + block * BLOCK + lane < target)
                    continue
                for group in range(BLOCK // 8):
                    bits = (valid[block * GROUP + group // 8] >> np.uint64(8 * (group % 8))) & np.uint64(255)
                    if bits and _eight_scores(words, splits, block, group, table, eight) >= own:
                        for lane in range(8):
                            if (bits >> np.uint64(lane)) & np.uint64(1):
                                place = offset + block * BLOCK + group * 8 + lane
                                count += eight[lane] > own or (eight[lane] == own and place < target)
            counts_U[u] += count
