"""Vector code of compiled_linear.py: tiles of TILE events of one request, turned: number d of event j stands at d · TILE + j.

Arrays are flat float32; D is a multiple of PAIR, features of a head come in multiples of GROUP. numba notices changes of compiled_linear.py alone:
whoever changes this file changes that one's date too.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from longtrail.models.attention.vector_code import GROUP, I64, LANES, PAIR, TILE, VECTOR, VECTORS, Emit

SMALLEST = 1e-6  # squared length added to a vector's, as feature_maps.py does
_integer, _float = types.int64, types.float32


@intrinsic
def over_lengths(typing_context, tile, width, out):  # type: ignore[no-untyped-def]
    """out[j] = 1 / |k_j|."""
    signature = types.void(tile, _integer, out)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        tile_at, out_at, sums = emit.pointer(0, emit.number(0)), emit.pointer(2, emit.number(0)), emit.sums(VECTORS)
        root = cgutils.get_or_insert_function(builder.module, ir.FunctionType(VECTOR, [VECTOR]), f"llvm.sqrt.v{LANES}f32")
        for place in sums:
            builder.store(emit.constant(SMALLEST), place)
        with cgutils.for_range(builder, args[1], intp=I64) as loop:
            for v, place in enumerate(sums):
                x = emit.load(tile_at, emit.offset((loop.index, emit.number(TILE)), emit.number(LANES * v)))
                emit.add_product(x, x, place)
        for v, place in enumerate(sums):
            emit.store(builder.fdiv(emit.constant(1), builder.call(root, [builder.load(place)])), out_at, emit.number(LANES * v))
        return context.get_dummy_value()

    return signature, generate


def _products(ahead: bool) -> Any:
    """An intrinsic."""

    @intrinsic
    def products(typing_context, tile, weights, nothing, over, first, units, width, out, after, next_at):  # type: ignore[no-untyped-def]
        """out[h · TILE + j] = over[j] · Σ_d weights[h · D + d] · tile[d · TILE + j] of units h from `first` on; `nothing` are as many zeros.
        Where `ahead`, the tile at after[next_at] is asked for meanwhile."""
        signature = types.void(tile, weights, nothing, over, _integer, _integer, _integer, out, after, _integer)

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            emit = Emit(context, builder, signature, args)
            first, units, width = args[4:7]
            tile_at, weights_at, nothing_at, over_at, out_at = (emit.pointer(i, emit.number(0)) for i in (0, 1, 2, 3, 7))
            following = emit.pointer(8, args[9]) if ahead else None
            with emit.steps(units, GROUP) as (unit, _):
                unit = builder.add(first, unit)
                for j, row in enumerate(emit.hidden(tile_at, weights_at, nothing_at, unit, width, following)):
                    place = builder.mul(emit.offset(unit, emit.number(j)), emit.number(TILE))
                    for v, x in enumerate(row):
                        lanes = emit.number(LANES * v)
                        emit.store(builder.fmul(x, emit.load(over_at, lanes)), out_at, builder.add(place, lanes))
            return context.get_dummy_value()

        return signature, generate

    return products


products, products_before_another = _products(False), _products(True)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def soften(typing_context, inner, bias, first, units, out):  # type: ignore[no-untyped-def]
    """out[h · TILE + j]: the softmax over units h from `first` on of inner[h · TILE + j] + bias[h]."""
    signature = types.void(inner, bias, _integer, _integer, out)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        _, _, first, units, _ = args
        inner_at, bias_at, out_at = emit.pointer(0, emit.number(0)), emit.pointer(1, first), emit.pointer(4, emit.number(0))
        largest, totals = emit.sums(2, VECTORS)

        def places(index):  # type: ignore[no-untyped-def]
            return [emit.offset((builder.add(first, index), emit.number(TILE)), emit.number(LANES * v)) for v in range(VECTORS)]

        for most, total in zip(largest, totals, strict=True):
            builder.store(emit.constant(-np.inf), most)
            builder.store(emit.constant(0), total)
        with cgutils.for_range(builder, units, intp=I64) as loop:
            shift = emit.at(bias_at, loop.index)
            for at, most in zip(places(loop.index), largest, strict=True):
                x = builder.fadd(emit.load(inner_at, at), shift)
                emit.store(x, out_at, at)
                builder.store(_larger(builder, x, builder.load(most)), most)
        with cgutils.for_range(builder, units, intp=I64) as loop:
            for at, most, total in zip(places(loop.index), largest, totals, strict=True):
                power = emit.exponential(builder.fsub(emit.load(out_at, at), builder.load(most)))
                emit.store(power, out_at, at)
                builder.store(builder.fadd(power, builder.load(total)), total)
        shares = [builder.fdiv(emit.constant(1), builder.load(total)) for total in totals]
        with cgutils.for_range(builder, units, intp=I64) as loop:
            for at, share in zip(places(loop.index), shares, strict=True):
                emit.store(builder.fmul(emit.load(out_at, at), share), out_at, at)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def elu1(typing_context, inner, count, out):  # type: ignore[no-untyped-def]
    """out = elu(inner) + 1 of the first `count` numbers, a multiple of LANES."""
    signature = types.void(inner, _integer, out)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        inner_at, out_at, zero = emit.pointer(0, emit.number(0)), emit.pointer(2, emit.number(0)), emit.constant(0)
        with emit.steps(args[1], LANES) as (i, _):
            x = emit.load(inner_at, i)
            above = builder.fcmp_ordered(">", x, zero)
            power = emit.exponential(builder.select(above, zero, x))
            emit.store(builder.select(above, builder.fadd(x, emit.constant(1)), power), out_at, i)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def weigh(typing_context, tile, first, row, at, count, start, out, to):  # type: ignore[no-untyped-def]
    """out[to + j] = start + Σ_d row[at + d] · tile[(first + d) · TILE + j] for d < count."""
    signature = types.void(tile, _integer, row, _integer, _integer, _float, out, _integer)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        tile_at, row_at, out_at = emit.pointer(0, builder.mul(args[1], emit.number(TILE))), emit.pointer(2, args[3]), emit.pointer(6, args[7])
        (sums,) = emit.sums(1, VECTORS)
        for place in sums:
            builder.store(emit.spread(args[5]), place)
        emit.add_products(tile_at, [row_at], args[4], [sums])
        for v, place in enumerate(sums):
            emit.store(builder.load(place), out_at, emit.number(LANES * v))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def sum_events(typing_context, shares, keys, at, width, out, to):  # type: ignore[no-untyped-def]
    """out[to + d] += Σ_j shares[j] · keys[at + j · D + d] over TILE events, four at a time: products wait for the sum before them."""
    signature = types.void(shares, keys, _integer, _integer, out, _integer)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        shares_at, keys_at, out_at, sums = emit.pointer(0, emit.number(0)), emit.pointer(1, args[2]), emit.pointer(4, args[5]), emit.sums(4, 2)
        with emit.steps(args[3], PAIR) as (column, _):
            for u, v in np.ndindex(4, 2):
                builder.store(emit.constant(0), sums[u][v])
            with emit.steps(emit.number(TILE), 4) as (start, _):
                for u in range(4):
                    j = emit.offset(start, emit.number(u))
                    share, row = emit.at(shares_at, j), emit.offset((j, args[3]), column)
                    for v in (0, 1):
                        emit.add_product(share, emit.load(keys_at, emit.offset(row, emit.number(LANES * v))), sums[u][v])
            for v in (0, 1):
                place = emit.offset(column, emit.number(LANES * v))
                total = emit.load(out_at, place)
                for u in range(4):
                    total = builder.fadd(total, builder.load(sums[u][v]))
                emit.store(total, out_at, place)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def add_lanes(typing_context, numbers, sums, to):  # type: ignore[no-untyped-def]
    """sums[to + lane] += the sum of TILE numbers, a lane each."""
    signature = types.void(numbers, sums, _integer)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        numbers_at, sums_at, zero = emit.pointer(0, emit.number(0)), emit.pointer(1, args[2]), emit.number(0)
        total = emit.load(sums_at, zero)
        for v in range(VECTORS):
            total = builder.fadd(total, emit.load(numbers_at, emit.number(LANES * v)))
        emit.store(total, sums_at, zero)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def add_products(typing_context, out, first, at, second, place):  # type: ignore[no-untyped-def]
    """out[j] += first[at + j] · second[place + j] for j < TILE."""
    signature = types.void(out, first, _integer, second, _integer)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        out_at, first_at, second_at = emit.pointer(0, emit.number(0)), emit.pointer(1, args[2]), emit.pointer(3, args[4])
        for lanes in (emit.number(LANES * v) for v in range(VECTORS)):
            emit.store(emit.multiply_add(emit.load(first_at, lanes), emit.load(second_at, lanes), emit.load(out_at, lanes)), out_at, lanes)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def slopes(  # type: ignore[no-untyped-def]
    typing_context, features, inner, first, units, queries, row, candidates, stride, grads, grad, pitch, dots, over, cap, along, bias_sums, sums
):
    """Of one head's units h from `first` on: g = f · (Σ_c queries[row + c · stride + h] · grads[grad + c · pitch + j] - dots[j]) for features f, at
    most `cap`. along[j] += Σ_h g · inner, then inner = g · over; lane by lane bias_sums[h] += Σ_j g, and
    sums[c · stride + h] += Σ_j grads · features, the gradient by the queries."""
    floats = (features, inner, _integer, _integer, queries, _integer, _integer, _integer, grads, _integer, _integer, dots, over)
    signature = types.void(*floats, _float, along, bias_sums, sums)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        first, units, row, candidates, stride, grad, pitch = (args[i] for i in (2, 3, 5, 6, 7, 9, 10))
        zero = emit.number(0)
        features_at, inner_at, queries_at, grads_at = (emit.pointer(i, at) for i, at in ((0, zero), (1, zero), (4, row), (8, grad)))
        dots_at, over_at, along_at, bias_at, sums_at = (emit.pointer(i, zero) for i in (11, 12, 14, 15, 16))
        vectors = [emit.number(LANES * v) for v in range(VECTORS)]
        gradients, alongs = emit.sums(2, VECTORS)
        cap = emit.spread(args[13])
        for lanes, place in zip(vectors, alongs, strict=True):
            builder.store(emit.load(along_at, lanes), place)
        with cgutils.for_range(builder, units, intp=I64) as loop:
            h = builder.add(first, loop.index)
            places = [emit.offset((h, emit.number(TILE)), lanes) for lanes in vectors]
            found = [emit.load(features_at, place) for place in places]
            for place in gradients:
                builder.store(emit.constant(0), place)
            with cgutils.for_range(builder, candidates, intp=I64) as pair:
                at = emit.offset((pair.index, stride), h)
                query, to = emit.at(queries_at, at), builder.mul(at, emit.number(LANES))
                total = emit.load(sums_at, to)
                for lanes, feature, place in zip(vectors, found, gradients, strict=True):
                    given = emit.load(grads_at, emit.offset((pair.index, pitch), lanes))
                    emit.add_product(query, given, place)
                    total = emit.multiply_add(given, feature, total)
                emit.store(total, sums_at, to)
            to = builder.mul(h, emit.number(LANES))
            total = emit.load(bias_at, to)
            for lanes, place, feature, gradient, sum_along in zip(vectors, places, found, gradients, alongs, strict=True):
                above = builder.fcmp_ordered(">", feature, cap)
                factor = builder.select(above, cap, feature)
                g = builder.fmul(factor, builder.fsub(builder.load(gradient), emit.load(dots_at, lanes)))
                emit.add_product(g, emit.load(inner_at, place), sum_along)
                emit.store(builder.fmul(g, emit.load(over_at, lanes)), inner_at, place)
                total = builder.fadd(total, g)
            emit.store(total, bias_at, to)
        for lanes, place in zip(vectors, alongs, strict=True):
            emit.store(builder.load(place), along_at, lanes)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def times_squares(typing_context, along, over):  # type: ignore[no-untyped-def]
    """along[j] *= over[j]² for j < TILE."""
    signature = types.void(along, over)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        along_at, over_at = emit.pointer(0, emit.number(0)), emit.pointer(1, emit.number(0))
        for lanes in (emit.number(LANES * v) for v in range(VECTORS)):
            over = emit.load(over_at, lanes)
            emit.store(builder.fmul(emit.load(along_at, lanes), builder.fmul(over, over)), along_at, lanes)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def events_from_rows(typing_context, shares, rows, units, width, along, keys, at, out, to):  # type: ignore[no-untyped-def]
    """out[to + j · D + d] = Σ_h shares[h · TILE + j] · rows[h · D + d] - along[j] · keys[at + j · D + d] of TILE events j over `units` rows h.

    What stands a tile further on in `out` is asked for meanwhile.
    """
    signature = types.void(shares, rows, _integer, _integer, along, keys, _integer, out, _integer)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        units, width, zero = args[2], args[3], emit.number(0)
        shares_at, rows_at, along_at, keys_at, out_at = (
            emit.pointer(i, at) for i, at in ((0, zero), (1, zero), (4, zero), (5, args[6]), (7, args[8]))
        )
        sums = emit.sums(GROUP, 2)
        with emit.steps(emit.number(TILE), GROUP) as (event, _), emit.steps(width, PAIR) as (column, _):
            events = [emit.offset(event, emit.number(j)) for j in range(GROUP)]
            places = [[emit.offset((j, width), column, emit.number(LANES * v)) for v in (0, 1)] for j in events]
            for j in range(GROUP):
                less = builder.fsub(emit.constant(0), emit.at(along_at, events[j]))
                for v in (0, 1):
                    builder.store(builder.fmul(less, emit.load(keys_at, places[j][v])), sums[j][v])
                    emit.fetch(out_at, emit.offset(places[j][v], (width, emit.number(TILE))))
            with cgutils.for_range(builder, units, intp=I64) as loop:
                row = [emit.load(rows_at, emit.offset((loop.index, width), column, emit.number(LANES * v))) for v in (0, 1)]
                for j in range(GROUP):
                    share = emit.at(shares_at, emit.offset((loop.index, emit.number(TILE)), events[j]))
                    for vector, place in zip(row, sums[j], strict=True):
                        emit.add_product(share, vector, place)
            for j, v in np.ndindex(GROUP, 2):
                emit.store(builder.load(sums[j][v]), out_at, places[j][v])
        return context.get_dummy_value()

    return signature, generate
