"""A few candidates' reads by linear attention and all gradients of them, compiled by numba: linear_layer.py's passes over the events.

B requests, C candidates, L history, D width, H heads, F features of a head, X = H · F; `sizes` is (L, D, H, F, C, kind, directed).

A tile of events is turned, and its features are made in the innermost cache and never written to memory. Few candidates do not need the sum
A = Σ φ(k) kᵀ, which costs X · D an event: what candidate c reads of it is Σ_l w_cl k_l with w_cl = φ(q_c) · φ(k_l), which costs C (X + D), and its
gradients cost as little. What is left is the features' own matrix product and its two gradients; backward makes features again.
kind SOFT: φ = softmax over a head's features; else elu + 1. Directed: of k / |k|. Padding is skipped. No use of the interpreter's lock.
"""

import numpy as np

from longtrail.kernels import kernel
from longtrail.models.attention.compiled import clear, copy, sums_of_events, turned_events
from longtrail.models.attention.linear_code import (
    add_lanes,
    add_products,
    elu1,
    events_from_rows,
    over_lengths,
    products,
    products_before_another,
    slopes,
    soften,
    sum_events,
    times_squares,
    weigh,
)
from longtrail.models.attention.vector_code import GROUP, LANES, TILE

MADE_WITH = {
    "kernels.py": "be9794c4dfea49a5",
    "models/attention/compiled.py": "559149b214ee1e6b",
    "models/attention/linear_code.py": "b2b784682c3b52e0",
    "models/attention/vector_code.py": "079d4e0aeff8cb8f",
}

SOFT, ELU1 = 1, 2  # kinds of features


@kernel
def _features(tile, weights, bias, nothing, over, sizes, inner, out, keys, following):  # type: ignore[no-untyped-def]
    """inner = W k (over |k|) and features `out` of a turned tile; meanwhile the one at keys[following] is asked for."""
    width, heads, features, kind, directed = sizes[1], sizes[2], sizes[3], sizes[5], sizes[6]
    if directed:
        over_lengths(tile, width, over)  # type: ignore[call-arg]
    products_before_another(tile, weights, nothing, over, 0, GROUP, width, inner, keys, following)
    products(tile, weights, nothing, over, GROUP, heads * features - GROUP, width, inner, keys, following)
    if kind == SOFT:
        for h in range(heads):
            soften(inner, bias, h * features, features, out)  # type: ignore[call-arg]
    else:
        elu1(inner, heads * features * TILE, out)  # type: ignore[call-arg]


@kernel
def forward(keys, counts, weights, bias, queries, sizes, first, stop, reads, norms):  # type: ignore[no-untyped-def]
    """reads [B, C, H, D] = Σ_l w k_l, from zeros, and norms [B, C, H] = Σ_l w, of requests first .. stop - 1.

    keys [B, L, D], counts [B] of real events, weights [X, D], bias [X], queries φ(q) [B, C, X].
    """
    length, width, heads, features, candidates = sizes[:5]
    units, pairs = heads * features, candidates * heads
    tile, rows = np.empty(width * TILE, np.float32), np.empty(width * TILE, np.float32)
    inner, found = np.empty(units * TILE, np.float32), np.empty(units * TILE, np.float32)
    nothing, over, weight = np.zeros(units, np.float32), np.ones(TILE, np.float32), np.empty(TILE, np.float32)
    sums = np.empty(pairs * LANES, np.float32)
    for b in range(first, stop):
        clear(sums, 0, len(sums))  # type: ignore[call-arg]
        for start in range(0, counts[b], TILE):
            at, real = (b * length + start) * width, min(TILE, counts[b] - start)
            turned_events(keys, at, width, real, rows, tile)
            _features(tile, weights, bias, nothing, over, sizes, inner, found, keys, at + TILE * width)
            for pair in range(pairs):
                h, query = pair % heads * features, (b * pairs + pair) * features
                weigh(found, h, queries, query, features, np.float32(0), weight, 0)  # type: ignore[call-arg]
                clear(weight, real, TILE - real)  # type: ignore[call-arg]
                add_lanes(weight, sums, pair * LANES)  # type: ignore[call-arg]
                if real == TILE:
                    sum_events(weight, keys, at, width, reads, (b * pairs + pair) * width)  # type: ignore[call-arg]
                else:
                    sum_events(weight, rows, 0, width, reads, (b * pairs + pair) * width)  # type: ignore[call-arg]
        for pair in range(pairs):
            norms[b * pairs + pair] = sums[pair * LANES : (pair + 1) * LANES].sum()


@kernel
def backward(  # type: ignore[no-untyped-def]
    keys, counts, weights, bias, queries, reads, norms, sizes, each, first, stop, keys_grad, queries_grad, weights_grad, bias_grad
):
    """From the gradients by forward's `reads` and `norms` those by its arguments, of parts first .. stop - 1, each of `each` requests.

    Out: keys_grad and queries_grad; for each part, weights_grad [.., X, D], from zeros, and bias_grad [.., X].
    """
    length, width, heads, features, candidates, kind, directed = sizes
    units, pairs = heads * features, candidates * heads
    tile, rows, out = np.empty(width * TILE, np.float32), np.empty(width * TILE, np.float32), np.empty(width * TILE, np.float32)
    inner, found = np.empty((units + pairs) * TILE, np.float32), np.empty(units * TILE, np.float32)  # in inner's last rows, each pair's w
    nothing, over, along, dots = np.zeros(units, np.float32), np.ones(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    grads, both = np.empty(pairs * TILE, np.float32), np.empty((units + pairs) * width, np.float32)  # by w; weights, then a request's `reads`
    bias_sums, sums = np.empty(units * LANES, np.float32), np.empty(candidates * units * LANES, np.float32)
    cap = np.float32(np.inf if kind == SOFT else 1)
    copy(both, 0, weights, 0, units * width)  # type: ignore[call-arg]
    for part in range(first, stop):
        clear(bias_sums, 0, len(bias_sums))  # type: ignore[call-arg]
        for b in range(part * each, min((part + 1) * each, len(counts))):
            copy(both, units * width, reads, b * pairs * width, pairs * width)  # type: ignore[call-arg]
            clear(sums, 0, len(sums))  # type: ignore[call-arg]
            clear(keys_grad, (b * length + counts[b]) * width, (length - counts[b]) * width)  # type: ignore[call-arg]
            for start in range(0, counts[b], TILE):
                at, real = (b * length + start) * width, min(TILE, counts[b] - start)
                turned_events(keys, at, width, real, rows, tile)
                _features(tile, weights, bias, nothing, over, sizes, inner, found, keys, at + TILE * width)
                for pair in range(pairs):
                    h, query, weight = pair % heads * features, (b * pairs + pair) * features, (units + pair) * TILE
                    weigh(found, h, queries, query, features, np.float32(0), inner, weight)  # type: ignore[call-arg]
                    weigh(tile, 0, both, (units + pair) * width, width, norms[b * pairs + pair], grads, pair * TILE)  # type: ignore[call-arg]
                    clear(inner, weight + real, TILE - real)  # type: ignore[call-arg]
                    clear(grads, pair * TILE + real, TILE - real)  # type: ignore[call-arg]
                clear(along, 0, TILE)  # type: ignore[call-arg]
                for h in range(heads):
                    clear(dots, 0, TILE)  # type: ignore[call-arg]
                    for c in range(candidates if kind == SOFT else 0):  # Σ_f φ_f (gradient by φ_f)
                        add_products(dots, grads, (c * heads + h) * TILE, inner, (units + c * heads + h) * TILE)  # type: ignore[call-arg]
                    slopes(  # type: ignore[call-arg]
                        found,
                        inner,
                        h * features,
                        features,
                        queries,
                        b * candidates * units,
                        candidates,
                        units,
                        grads,
                        h * TILE,
                        heads * TILE,
                        dots,
                        over,
                        cap,
                        along,
                        bias_sums,
                        sums,
                    )
                if directed:
                    times_squares(along, over)  # type: ignore[call-arg]
                else:
                    clear(along, 0, TILE)  # type: ignore[call-arg]
                if real == TILE:
                    sums_of_events(inner, units, keys, at, width, TILE, weights_grad, part * units * width)
                    events_from_rows(inner, both, units + pairs, width, along, keys, at, keys_grad, at)  # type: ignore[call-arg]
                else:
                    sums_of_events(inner, units, rows, 0, width, TILE, weights_grad, part * units * width)
                    events_from_rows(inner, both, units + pairs, width, along, rows, 0, out, 0)  # type: ignore[call-arg]
                    copy(keys_grad, at, out, 0, real * width)  # type: ignore[call-arg]
            for unit in range(candidates * units):
                queries_grad[b * candidates * units + unit] = sums[unit * LANES : (unit + 1) * LANES].sum()
        for unit in range(units):
            bias_grad[part * units + unit] = bias_sums[unit * LANES : (unit + 1) * LANES].sum()
