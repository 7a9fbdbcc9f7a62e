"""The attention layer of fused.py on a CPU, compiled by numba: what serving scores one request with, and what training does in passes over the keys.

B requests, C candidates, L history, n events of it, D width, H hidden units.

The hidden layer [C, H, L] is never written: for TILE events and GROUP units at a time its pre-activations stand in registers, go through the sigmoid
there and are added to the scores. Loops over tiles are outermost, so that a tile of the history is read from the innermost cache; backward makes
the hidden layer of a tile again there and adds up all gradients from it. Ours; the tests hold it to fused.py. float32; the sigmoid is right to 3e-7.
No use of the interpreter's lock: threads run side by side.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from longtrail.kernels import kernel
from longtrail.models.attention.vector_code import F32, GROUP, I32, I64, LANES, PAIR, TILE, VECTORS, WHOLE, Emit

_integer = types.int64
Floats = NDArray[np.float32]
MADE_WITH = {"kernels.py": "be9794c4dfea49a5", "models/attention/vector_code.py": "079d4e0aeff8cb8f"}


def _tiles(ahead: bool) -> Any:
    """An intrinsic."""

    @intrinsic
    def tile(typing_context, keys, at, weights, row, bias, last, last_bias, width, units, squashed, scores, to, after, next_at):  # type: ignore[no-untyped-def]
        """scores[to : to + TILE] = Σ_h last[h] · sigmoid(bias[row + h] + Σ_d weights[(row + h) · D + d] · keys[at + d · TILE + place]) + last_bias,
        and the sigmoid of that where `squashed`. `units` is a multiple of GROUP.
        Where `ahead`, the tile at after[next_at] is asked for meanwhile."""
        signature = types.void(
            keys, _integer, weights, _integer, bias, last, types.float32, _integer, _integer, types.boolean, scores, _integer, after, _integer
        )

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            emit = Emit(context, builder, signature, args)
            _, at, _, row, _, _, last_bias, width, units, squashed, _, to, _, next_at = args
            keys_at, weights_at, bias_at = emit.pointer(0, at), emit.pointer(2, builder.mul(row, width)), emit.pointer(4, row)
            last_at, scores_at = emit.pointer(5, emit.number(0)), emit.pointer(10, to)
            following = emit.pointer(12, next_at) if ahead else None
            totals = [cgutils.alloca_once_value(builder, emit.spread(last_bias)) for _ in range(VECTORS)]
            with emit.steps(units, GROUP) as (unit, _):
                for j, row_sums in enumerate(emit.hidden(keys_at, weights_at, bias_at, unit, width, following)):
                    w = emit.at(last_at, emit.offset(unit, emit.number(j)))
                    for total, x in zip(totals, row_sums, strict=True):
                        emit.add_product(w, emit.sigmoid(x), total)
            for v, total in enumerate(totals):
                plain = builder.load(total)
                emit.store(builder.select(squashed, emit.sigmoid(plain), plain), scores_at, emit.number(LANES * v))
            return context.get_dummy_value()

        return signature, generate

    return tile


_tile, _tile_before_another = _tiles(False), _tiles(True)


@intrinsic
def _turned(typing_context, keys, at, width, tile):  # type: ignore[no-untyped-def]
    """tile[d · TILE + j] = keys[at + j · D + d] for TILE events: squares of LANES × LANES, turned by swapping a bit of row and column at a time."""
    signature = types.void(keys, _integer, _integer, tile)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        _, at, width, _ = args
        keys_at, tile_at = emit.pointer(0, at), emit.pointer(3, emit.number(0))
        with emit.steps(width, LANES) as (column, _), emit.steps(emit.number(TILE), LANES) as (event, _):
            rows = [emit.load(keys_at, emit.offset((emit.offset(event, emit.number(i)), width), column)) for i in range(LANES)]
            for bit in (1 << n for n in range(LANES.bit_length() - 1)):
                upper = ir.Constant(WHOLE, [I32(LANES + (c ^ bit) if c & bit else c) for c in range(LANES)])
                lower = ir.Constant(WHOLE, [I32(LANES + c if c & bit else c ^ bit) for c in range(LANES)])
                for i in (i for i in range(LANES) if not i & bit):
                    a, b = rows[i], rows[i | bit]
                    rows[i], rows[i | bit] = builder.shuffle_vector(a, b, upper), builder.shuffle_vector(a, b, lower)
            for i, turned in enumerate(rows):
                emit.store(turned, tile_at, emit.offset((emit.offset(column, emit.number(i)), emit.number(TILE)), event))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _inner(  # type: ignore[no-untyped-def]
    typing_context, keys, weights, row, bias, first, last, scores, width, units, inner, last_sums, bias_sums, to, after, next_at
):
    """Of a turned tile and its gradient by the scores: that by the pre-activations, inner[h · TILE + place], and in last_sums and
    bias_sums[(to + h) · LANES + lane] the sums of those by `last` and the bias. Meanwhile the tile at after[next_at] is asked for."""
    floats = (keys, weights, _integer, bias, _integer, last, scores, _integer, _integer, inner, last_sums, bias_sums, _integer, after, _integer)
    signature = types.void(*floats)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        _, _, row, _, first, _, _, width, units, _, _, _, to, _, next_at = args
        zero = emit.number(0)
        keys_at, weights_at, bias_at = emit.pointer(0, zero), emit.pointer(1, builder.mul(row, width)), emit.pointer(3, first)
        last_at, scores_at, inner_at = emit.pointer(5, zero), emit.pointer(6, zero), emit.pointer(9, zero)
        sums_at = [emit.pointer(place, builder.mul(to, emit.number(LANES))) for place in (10, 11)]
        with emit.steps(units, GROUP) as (unit, _):
            for j, row_sums in enumerate(emit.hidden(keys_at, weights_at, bias_at, unit, width, emit.pointer(13, next_at))):
                h = emit.offset(unit, emit.number(j))
                w, lanes = emit.at(last_at, h), builder.mul(h, emit.number(LANES))
                last_sum, bias_sum = (emit.load(place, lanes) for place in sums_at)
                for v, x in enumerate(row_sums):
                    x = emit.sigmoid(x)
                    product = builder.fmul(emit.load(scores_at, emit.number(LANES * v)), x)
                    gradient = builder.fmul(builder.fmul(product, w), builder.fsub(emit.constant(1), x))
                    last_sum, bias_sum = builder.fadd(last_sum, product), builder.fadd(bias_sum, gradient)
                    emit.store(gradient, inner_at, emit.offset((h, emit.number(TILE)), emit.number(LANES * v)))
                emit.store(last_sum, sums_at[0], lanes)
                emit.store(bias_sum, sums_at[1], lanes)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _by_score(typing_context, keys, row, at, width, shares, to, squashed, scores):  # type: ignore[no-untyped-def]
    """scores[place] += Σ_d row[at + d] · keys[d · TILE + place] of a turned tile; where `squashed`, times a (1 - a) for a = shares[to + place]."""
    signature = types.void(keys, row, _integer, _integer, shares, _integer, types.boolean, scores)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        zero, shares_at, scores_at = emit.number(0), emit.pointer(4, args[5]), emit.pointer(7, emit.number(0))
        (sums,) = emit.sums(1, VECTORS)
        for v, place in enumerate(sums):
            builder.store(emit.load(scores_at, emit.number(LANES * v)), place)
        emit.add_products(emit.pointer(0, zero), [emit.pointer(1, args[2])], args[3], [sums])
        for v, place in enumerate(sums):
            share, plain = emit.load(shares_at, emit.number(LANES * v)), builder.load(place)
            slope = builder.fmul(share, builder.fsub(emit.constant(1), share))
            emit.store(builder.select(args[6], builder.fmul(plain, slope), plain), scores_at, emit.number(LANES * v))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def copy(typing_context, out, to, given, at, count):  # type: ignore[no-untyped-def]
    """out[to : to + count] = given[at : at + count]. In a loop numba asks of every index whether it is negative, which takes many times as long."""
    signature = types.void(out, _integer, given, _integer, _integer)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        out_at, given_at = emit.pointer(0, args[1]), emit.pointer(2, args[3])
        emit.along(args[4], lambda i: emit.store(emit.load(given_at, i), out_at, i), lambda i: emit.store_one(emit.load_one(given_at, i), out_at, i))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def clear(typing_context, out, to, count):  # type: ignore[no-untyped-def]
    """out[to : to + count] = 0."""
    signature = types.void(out, _integer, _integer)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        out_at, zero = emit.pointer(0, args[1]), ir.Constant(F32, 0.0)
        emit.along(args[2], lambda i: emit.store(emit.constant(0), out_at, i), lambda i: emit.store_one(zero, out_at, i))
        return context.get_dummy_value()

    return signature, generate


def _rows_from_events(rows: int) -> Any:
    """An intrinsic for `rows` rows at a time."""

    @intrinsic
    def summed(typing_context, shares, units, keys, at, width, events, out, to):  # type: ignore[no-untyped-def]
        """out[to + h · D + d] += Σ_j shares[h · TILE + j] · keys[at + j · D + d] over `events` places, for `units` rows h."""
        signature = types.void(shares, _integer, keys, _integer, _integer, _integer, out, _integer)

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            emit = Emit(context, builder, signature, args)
            _, units, _, at, width, events, _, to = args
            shares_at, keys_at, out_at = emit.pointer(0, emit.number(0)), emit.pointer(2, at), emit.pointer(6, to)
            with emit.steps(units, rows) as (unit, _), emit.steps(width, PAIR) as (column, _):
                sums = emit.sums(rows, 2)
                places = [
                    [emit.offset((emit.offset(unit, emit.number(j)), width), column, emit.number(LANES * v)) for v in (0, 1)] for j in range(rows)
                ]
                for j, v in np.ndindex(rows, 2):
                    builder.store(emit.load(out_at, places[j][v]), sums[j][v])
                with cgutils.for_range(builder, events, intp=I64) as loop:
                    events_at = [emit.offset((loop.index, width), column, emit.number(LANES * v)) for v in (0, 1)]
                    k = [emit.load(keys_at, place) for place in events_at]
                    for j in range(rows):
                        share = emit.at(shares_at, emit.offset((emit.offset(unit, emit.number(j)), emit.number(TILE)), loop.index))
                        for vector, place in zip(k, sums[j], strict=True):
                            emit.add_product(share, vector, place)
                for j, v in np.ndindex(rows, 2):
                    emit.store(builder.load(sums[j][v]), out_at, places[j][v])
            return context.get_dummy_value()

        return signature, generate

    return summed


_sum_of_events, sums_of_events = _rows_from_events(1), _rows_from_events(GROUP)


@intrinsic
def _events_from_rows(typing_context, shares, rows, row, units, width, events, out, to):  # type: ignore[no-untyped-def]
    """out[to + j · D + d] += Σ_h shares[h · TILE + j] · rows[(row + h) · D + d] over `units` rows h, for `events` places j: a multiple of GROUP.

    What stands a tile further on in `out` is asked for meanwhile.
    """
    signature = types.void(shares, rows, _integer, _integer, _integer, _integer, out, _integer)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        _, _, row, units, width, events, _, to = args
        shares_at, rows_at, out_at = emit.pointer(0, emit.number(0)), emit.pointer(1, builder.mul(row, width)), emit.pointer(6, to)
        with emit.steps(events, GROUP) as (event, _), emit.steps(width, PAIR) as (column, _):
            sums = emit.sums(GROUP, 2)
            places = [
                [emit.offset((emit.offset(event, emit.number(j)), width), column, emit.number(LANES * v)) for v in (0, 1)] for j in range(GROUP)
            ]
            for j, v in np.ndindex(GROUP, 2):
                builder.store(emit.load(out_at, places[j][v]), sums[j][v])
                emit.fetch(out_at, emit.offset(places[j][v], (width, emit.number(TILE))))
            with cgutils.for_range(builder, units, intp=I64) as loop:
                w = [emit.load(rows_at, emit.offset((loop.index, width), column, emit.number(LANES * v))) for v in (0, 1)]
                for j in range(GROUP):
                    share = emit.at(shares_at, emit.offset((loop.index, emit.number(TILE)), event, emit.number(j)))
                    for vector, place in zip(w, sums[j], strict=True):
                        emit.add_product(share, vector, place)
            for j, v in np.ndindex(GROUP, 2):
                emit.store(builder.load(sums[j][v]), out_at, places[j][v])
        return context.get_dummy_value()

    return signature, generate


@kernel
def turned_events(keys, at, width, events, rows, tile):  # type: ignore[no-untyped-def]
    """A turned tile of `events` events, zeros behind them."""
    if events == TILE:
        _turned(keys, at, width, tile)  # type: ignore[call-arg]
        return
    copy(rows, 0, keys, at, events * width)  # type: ignore[call-arg]
    clear(rows, events * width, (TILE - events) * width)  # type: ignore[call-arg]
    _turned(rows, 0, width, tile)  # type: ignore[call-arg]


@kernel
def _scores(keys, n, weights, bias, last, last_bias, width, squashed, scores, candidates, length):  # type: ignore[no-untyped-def]
    """_tile for all events and candidates. Arrays are flat: slices would double the time it takes to compile."""
    tile, found = np.zeros(width * TILE, np.float32), np.empty(TILE, np.float32)
    for start in range(0, n, TILE):
        real = min(TILE, n - start)
        for j in range(real):
            for d in range(width):
                tile[d * TILE + j] = keys[(start + j) * width + d]
        for c in range(candidates):
            _tile(tile, 0, weights, c * len(last), bias, last, last_bias, width, len(last), squashed, found, 0, keys, 0)  # type: ignore[call-arg]
            for j in range(real):
                scores[c * length + start + j] = found[j]


@kernel
def forward(keys, counts, first, weights, bias, last, last_bias, width, length, squashed, pooled, scores, reads):  # type: ignore[no-untyped-def]
    """Scores [.., C, L], 0 on padding, and where `pooled` their sums of keys [.., C, D], of requests first .. first + len(counts) - 1.

    `counts` are their numbers of events. All other arrays are flat, and those of the whole batch; `reads` begins at zeros.
    """
    units = len(last)
    candidates = len(scores) // (len(keys) // width)
    tile, rows, found = np.empty(width * TILE, np.float32), np.empty(width * TILE, np.float32), np.empty(TILE, np.float32)
    for i in range(len(counts)):
        b = first + i
        for start in range(0, counts[i], TILE):
            at, real = (b * length + start) * width, min(TILE, counts[i] - start)
            following = at + TILE * width
            turned_events(keys, at, width, real, rows, tile)
            for pair in range(b * candidates, (b + 1) * candidates):
                if pair == b * candidates:
                    _tile_before_another(tile, 0, weights, pair * units, bias, last, last_bias, width, units, squashed, found, 0, keys, following)
                else:
                    _tile(tile, 0, weights, pair * units, bias, last, last_bias, width, units, squashed, found, 0, keys, following)
                copy(scores, pair * length + start, found, 0, real)  # type: ignore[call-arg]
                if pooled:
                    _sum_of_events(found, 1, keys, at, width, real, reads, pair * width)
        for pair in range(b * candidates, (b + 1) * candidates):
            clear(scores, pair * length + counts[i], length - counts[i])  # type: ignore[call-arg]


@kernel
def backward(  # type: ignore[no-untyped-def]
    keys, counts, first, weights, bias, last, width, length, shares, reads, scores, kind, fresh, keys_grad, weights_grad, bias_grad, last_grad, sums
):
    """Gradients of forward's arguments, of requests first .. first + len(counts) - 1.

    In: `shares` a [.., C, L]; `reads` the gradient by Σ_l a_l k_l; `scores` that by a (kind 1, linear, and 2, sigmoid) or by the score (kind 0).
    Out: keys_grad, added to where not `fresh`; weights_grad, from zeros; for each candidate bias_grad, last_grad [.., H] and the scores' `sums`.
    """
    units = len(last)
    candidates = len(shares) // (len(keys) // width)
    tile, rows, gradient = np.empty(width * TILE, np.float32), np.empty(width * TILE, np.float32), np.empty(TILE, np.float32)
    inner = np.empty((units + 1) * TILE, np.float32)  # and, in the last row, the shares
    both = np.empty(candidates * (units + 1) * width, np.float32)  # each candidate's weights, then its `reads`
    lasts, biases = np.empty(candidates * units * LANES, np.float32), np.empty(candidates * units * LANES, np.float32)
    for i in range(len(counts)):
        b = first + i
        clear(lasts, 0, len(lasts))  # type: ignore[call-arg]
        clear(biases, 0, len(biases))  # type: ignore[call-arg]
        for c in range(candidates):
            pair, to = b * candidates + c, c * (units + 1) * width
            copy(both, to, weights, pair * units * width, units * width)  # type: ignore[call-arg]
            copy(both, to + units * width, reads, pair * width, width)  # type: ignore[call-arg]
            sums[pair] = 0
        if fresh:
            clear(keys_grad, (b * length + counts[i]) * width, (length - counts[i]) * width)  # type: ignore[call-arg]
        for start in range(0, counts[i], TILE):
            at, real = (b * length + start) * width, min(TILE, counts[i] - start)
            following = at + TILE * width
            whole = real // GROUP * GROUP
            if fresh:
                clear(keys_grad, at, real * width)  # type: ignore[call-arg]
            turned_events(keys, at, width, real, rows, tile)
            for c in range(candidates):
                pair, row = b * candidates + c, c * (units + 1)
                copy(inner, units * TILE, shares, pair * length + start, real)  # type: ignore[call-arg]
                clear(inner, units * TILE + real, TILE - real)  # type: ignore[call-arg]
                copy(gradient, 0, scores, pair * length + start, real)  # type: ignore[call-arg]
                clear(gradient, real, TILE - real)  # type: ignore[call-arg]
                if kind:
                    _by_score(tile, both, (row + units) * width, width, inner, units * TILE, kind == 2, gradient)  # type: ignore[call-arg]
                total = np.float32(0)
                for j in range(TILE):
                    total += gradient[j]
                sums[pair] += total
                _inner(  # type: ignore[call-arg]
                    tile, both, row, bias, pair * units, last, gradient, width, units, inner, lasts, biases, c * units, keys, following
                )
                sums_of_events(inner, units, keys, at, width, real, weights_grad, pair * units * width)
                _events_from_rows(inner, both, row, units + 1, width, whole, keys_grad, at)  # type: ignore[call-arg]
                for j in range(whole, real):
                    for h in range(units + 1):
                        for d in range(width):
                            keys_grad[at + j * width + d] += inner[h * TILE + j] * both[(row + h) * width + d]
        for c in range(candidates):
            for h in range(units):
                to = (b * candidates + c) * units + h
                last_grad[to] = lasts[(c * units + h) * LANES : (c * units + h + 1) * LANES].sum()
                bias_grad[to] = biases[(c * units + h) * LANES : (c * units + h + 1) * LANES].sum()


def pair_scores(keys_LD: Floats, n: int, weights_CHD: Floats, bias_CH: Floats, last_H: Floats, last_bias: float, *, squashed: bool) -> Floats:
    """[C, L]: last · sigmoid(K w + b) + last_bias of the first `n` events, the sigmoid of that where `squashed`; 0 beyond them."""
    if spare := -len(last_H) % GROUP:  # units that count for nothing
        weights_CHD, bias_CH = np.pad(weights_CHD, ((0, 0), (0, spare), (0, 0))), np.pad(bias_CH, ((0, 0), (0, spare)))
        last_H = np.pad(last_H, (0, spare))
    scores_CL = torch.empty(len(weights_CHD), len(keys_LD)).numpy()  # torch's memory, so that what measures torch's sees it
    scores_CL[:, n:] = 0
    flat = (np.ascontiguousarray(x).reshape(-1) for x in (weights_CHD, bias_CH, last_H))
    _scores(
        np.ascontiguousarray(keys_LD).reshape(-1),
        n,
        *flat,
        np.float32(last_bias),
        keys_LD.shape[1],
        squashed,
        scores_CL.reshape(-1),
        *scores_CL.shape,
    )
    return scores_CL
