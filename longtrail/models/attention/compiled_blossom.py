"""Both paths of Blossom on a CPU, compiled by numba: blossom_layer.py's passes over the places.

B users, L places, H query heads, G key/value heads, M = H / G, d head width, K chosen blocks, S distances; W = (H + 2G) · d.

q, k and v of a place stand side by side in a row of W numbers, as the projection writes them. For one query at a time: which places it reads is
written down as a list (own block and chosen blocks, then the distances); the scores of the list, two softmaxes, and the sum of all values, each
weighed by its share times its path's gate, are made from the innermost cache. So neither path's result is kept, nor a log-sum: backward makes the
shares of a query again, and the sum of share times gradient that it needs is the gate's gradient. Ours; the tests hold it to the equations.
Arrays are flat and float32. Later places are never read, so nothing of the past depends on them. No use of the interpreter's lock.
"""

import numpy as np

from longtrail.kernels import kernel
from longtrail.models.attention.blossom_code import add, add_one, add_two, by_scores, dots, exponentials, multiply, sum_one, sum_two, turn
from longtrail.models.attention.selection import LEAST_SHARE, NOTHING
from longtrail.models.attention.vector_code import LANES

MADE_WITH = {
    "kernels.py": "be9794c4dfea49a5",
    "models/attention/blossom_code.py": "47489dba876400bc",
    "models/attention/selection.py": "f22c56e73d928a7d",
    "models/attention/vector_code.py": "079d4e0aeff8cb8f",
}


@kernel
def turned(rows, turns, counts, first, stop, sizes, sign):  # type: ignore[no-untyped-def]
    """Rotates q and k of users first .. stop - 1, in place; or, with a sign of -1, their gradients back."""
    length, heads, groups, width = sizes[:4]
    row = (heads + 2 * groups) * width
    for b in range(first, stop):
        for t in range(counts[b]):
            for h in range(heads + groups):
                turn(rows, (b * length + t) * row + h * width, turns, t * width, width, sign)  # type: ignore[call-arg]


@kernel
def windows(rows, counts, users, groups_of, numbers, sizes, stride, places, out):  # type: ignore[no-untyped-def]
    """out[r]: the keys of user users[r] and key/value head groups_of[r] in the window that ends with stride numbers[r], zeros where none is, plus
    places [G, l, d]."""
    length, heads, groups, width = sizes[:4]
    span, row, nothing = len(places) // groups, (heads + 2 * groups) * width, np.zeros(width, np.float32)
    for r in range(len(users)):
        b, g, last = users[r], groups_of[r], (numbers[r] + 1) * stride
        for i in range(span // width):
            t = last - span // width + i
            key, to, place = (b * length + t) * row + (heads + g) * width, r * span + i * width, g * span + i * width
            if 0 <= t < counts[b]:
                add(out, to, rows, key, places, place, width)  # type: ignore[call-arg]
            else:
                add(out, to, nothing, 0, places, place, width)  # type: ignore[call-arg]


@kernel
def _best_blocks(rows, at, sizes, keys, base, seen, own, mean, order, scores, best, chosen, to):  # type: ignore[no-untyped-def]
    """chosen[to : to + K]: selection.best_blocks of one query of a group, which sees the first `seen` block keys but `own`; -1 for none."""
    width, selected, together = sizes[3], sizes[5], sizes[1] // sizes[2]
    for i in range(selected):
        best[i], chosen[to + i] = -np.inf, -1
    if seen == 0:
        return
    for d in range(width):
        total = np.float32(0)
        for m in range(together):
            total += rows[at + m * width + d]
        mean[d] = total / np.float32(together)
    padded = (seen + LANES - 1) // LANES * LANES
    dots(mean, 0, keys, base, order, padded, width, np.float32(1 / np.sqrt(width)), scores, 0)  # type: ignore[call-arg]
    for i in range(seen):
        score = scores[i]
        if score > best[selected - 1] and i != own:
            j = selected - 1
            while j > 0 and best[j - 1] < score:
                best[j], chosen[to + j] = best[j - 1], chosen[to + j - 1]
                j -= 1
            best[j], chosen[to + j] = score, i
    for i in range(seen, padded):
        scores[i] = -np.inf
    if own < seen:
        scores[own] = -np.inf
    total, largest = exponentials(scores, 0, padded)  # type: ignore[call-arg]
    top = max(largest, np.float32(NOTHING))
    least = top + np.log(total * np.exp(largest - top) + np.exp(np.float32(NOTHING) - top)) + np.float32(np.log(LEAST_SHARE))
    for i in range(selected):
        if best[i] <= least:
            chosen[to + i] = -1


@kernel
def _list(places, t, n, row, sizes, chosen, at, distances):  # type: ignore[no-untyped-def]
    """Where the keys stand that query t of n reads, in rows of `row` numbers: own and chosen blocks, then the distances, both followed by its own
    up to whole vectors. Returns the two numbers of real ones, and where the second part begins and ends."""
    block, selected, causal = sizes[4:7]
    own = t // block * block
    long = 0
    for j in range(own, t + 1 if causal else min(own + block, n)):
        places[long] = j * row
        long += 1
    for i in range(at, at + selected):
        if chosen[i] >= 0:
            for j in range(chosen[i] * block, min((chosen[i] + 1) * block, n)):
                places[long] = j * row
                long += 1
    begin = (long + LANES - 1) // LANES * LANES
    end = begin
    for distance in distances:
        if 0 <= t - distance < n:
            places[end] = (t - distance) * row
            end += 1
    short = end - begin
    end = (end + LANES - 1) // LANES * LANES
    for i in range(long, begin):
        places[i] = t * row
    for i in range(begin + short, end):
        places[i] = t * row
    return long, short, begin, end


@kernel
def _shares(rows, query, key, width, places, read, shares, to):  # type: ignore[no-untyped-def]
    """Both paths' softmax of one head's query over a list of places, not divided yet by the two sums that it returns."""
    long, short, begin, end = read
    dots(rows, query, rows, key, places, end, width, np.float32(1 / np.sqrt(width)), shares, to)  # type: ignore[call-arg]
    for i in range(to + long, to + begin):
        shares[i] = -np.inf
    for i in range(to + begin + short, to + end):
        shares[i] = -np.inf
    return exponentials(shares, to, begin)[0], exponentials(shares, to + begin, end - begin)[0]  # type: ignore[call-arg]


@kernel
def _sums_of_keys(heads, shares, room, keys, base, places, count, width, out, to):  # type: ignore[no-untyped-def]
    """sum_one for any number of heads."""
    for m in range(0, heads - 1, 2):
        sum_two(shares, m * room, room, keys, base, places, count, width, out, to + m * width)
    if heads % 2:
        sum_one(shares, (heads - 1) * room, room, keys, base, places, count, width, out, to + (heads - 1) * width)


@kernel
def _additions_to_keys(heads, shares, room, rows, at, width, keys, base, places, count):  # type: ignore[no-untyped-def]
    """add_one for any number of heads."""
    for m in range(0, heads - 1, 2):
        add_two(shares, m * room, room, rows, at + m * width, width, keys, base, places, count)
    if heads % 2:
        add_one(shares, (heads - 1) * room, room, rows, at + (heads - 1) * width, width, keys, base, places, count)


@kernel
def _room(sizes, distances):  # type: ignore[no-untyped-def]
    """The most places of a list."""
    most = (sizes[5] + 1) * sizes[4]
    return (most + LANES - 1) // LANES * LANES + (len(distances) + LANES - 1) // LANES * LANES


@kernel
def forward(rows, counts, gates, keys, seen, firsts, distances, sizes, first, stop, out, chosen, kept):  # type: ignore[no-untyped-def]
    """out[b, t] = gate · long + gate · short of all heads, for the real places of blocks first .. stop - 1 of all users' blocks.

    rows [B, L, W], rotated; counts [B] real places; gates [B, L, H, 2]; keys: those of users' first seen[b] blocks, firsts[b] on, group by group,
    and LANES more rows, of any numbers.
    chosen [B, L, G, K] is written down where `kept`, else it is room for one query.
    """
    length, heads, groups, width, block, selected, causal = sizes
    row, together, room, most = (heads + 2 * groups) * width, heads // groups, _room(sizes, distances), length // block + LANES + 1
    places, shares, mean = np.empty(room, np.int64), np.empty(heads * room, np.float32), np.empty(width, np.float32)
    scores, best, order = np.empty(most, np.float32), np.empty(selected, np.float32), np.arange(most) * width
    blocks = (length + block - 1) // block
    for unit in range(first, stop):
        b, own = unit // blocks, unit % blocks
        known = min(own, seen[b]) if causal else seen[b]
        for t in range(own * block, min((own + 1) * block, counts[b])):
            place = b * length + t
            for g in range(groups):
                query, key = place * row + g * together * width, b * length * row + (heads + g) * width
                to = (place * groups + g) * selected if kept else 0
                _best_blocks(rows, query, sizes, keys, (firsts[b] + g * seen[b]) * width, known, own, mean, order, scores, best, chosen, to)
                read = _list(places, t, counts[b], row, sizes, chosen, to, distances)
                for m in range(together):
                    sums = _shares(rows, query + m * width, key, width, places, read, shares, m * room)
                    gate, begin, end = (place * heads + g * together + m) * 2, read[2], read[3]
                    multiply(shares, m * room, begin, gates[gate] / sums[0])  # type: ignore[call-arg]
                    multiply(shares, m * room + begin, end - begin, gates[gate + 1] / sums[1])  # type: ignore[call-arg]
                value, to = key + groups * width, (place * heads + g * together) * width
                _sums_of_keys(together, shares, room, rows, value, places, read[3], width, out, to)


@kernel
def backward(rows, counts, gates, chosen, distances, sizes, first, stop, grad, rows_grad, gates_grad):  # type: ignore[no-untyped-def]
    """Gradients of rows, still rotated, and of gates, both from zeros, for users' groups first .. stop - 1 of B · G."""
    length, heads, groups, width, _, selected, _ = sizes
    row, together, room = (heads + 2 * groups) * width, heads // groups, _room(sizes, distances)
    places, shares, inner = np.empty(room, np.int64), np.empty(together * room, np.float32), np.empty(together * room, np.float32)
    scale = np.float32(1 / np.sqrt(width))
    for pair in range(first, stop):
        b, g = pair // groups, pair % groups
        key = b * length * row + (heads + g) * width
        value = key + groups * width
        for t in range(counts[b]):
            place = b * length + t
            query, given = place * row + g * together * width, (place * heads + g * together) * width
            read = _list(places, t, counts[b], row, sizes, chosen, (place * groups + g) * selected, distances)
            begin, end = read[2], read[3]
            for m in range(together):
                to, gate = m * room, (place * heads + g * together + m) * 2
                sums = _shares(rows, query + m * width, key, width, places, read, shares, to)
                multiply(shares, to, begin, np.float32(1) / sums[0])  # type: ignore[call-arg]
                multiply(shares, to + begin, end - begin, np.float32(1) / sums[1])  # type: ignore[call-arg]
                dots(grad, given + m * width, rows, value, places, end, width, np.float32(1), inner, to)  # type: ignore[call-arg]
                gates_grad[gate] = by_scores(shares, inner, to, begin, gates[gate], scale)  # type: ignore[call-arg]
                gates_grad[gate + 1] = by_scores(shares, inner, to + begin, end - begin, gates[gate + 1], scale)  # type: ignore[call-arg]
            _sums_of_keys(together, inner, room, rows, key, places, end, width, rows_grad, query)
            _additions_to_keys(together, inner, room, rows, query, width, rows_grad, key, places, end)
            _additions_to_keys(together, shares, room, grad, given, width, rows_grad, value, places, end)
