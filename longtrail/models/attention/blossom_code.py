"""Vector code of compiled_blossom.py: one query, or all query heads of a key/value head two at a time, and a list of keys. d head width.

A key stands at base + places[i]. Arrays are flat float32; d is a multiple of LANES. numba notices changes of compiled_blossom.py alone:
whoever changes this file changes that one's date too.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from longtrail.models.attention.vector_code import F32, I64, LANES, VECTOR, Emit

_UNROLLED = 4  # keys whose sums stand in registers of their own: products wait for the sum before them
_integer, _float = types.int64, types.float32


@intrinsic
def dots(typing_context, queries, at, keys, base, places, count, width, scale, out, to):  # type: ignore[no-untyped-def]
    """out[to + i] = scale · Σ_d queries[at + d] · keys[base + places[i] + d] for i < count, a multiple of LANES."""
    signature = types.void(queries, _integer, keys, _integer, places, _integer, _integer, _float, out, _integer)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        _, at, _, base, _, count, width, scale, _, to = args
        query_at, keys_at, places_at, out_at = emit.pointer(0, at), emit.pointer(2, base), emit.pointer(4, emit.number(0)), emit.pointer(8, to)
        factor, sums = emit.spread(scale), emit.sums(LANES)
        with emit.steps(count, LANES) as (first, _):
            rows = [builder.gep(keys_at, [emit.load_one(places_at, emit.offset(first, emit.number(i)))]) for i in range(LANES)]
            for place in sums:
                builder.store(emit.constant(0), place)
            with emit.steps(width, LANES) as (column, _):
                query = emit.load(query_at, column)
                for row, place in zip(rows, sums, strict=True):
                    emit.add_product(query, emit.load(row, column), place)
            emit.store(builder.fmul(emit.lane_sums([builder.load(place) for place in sums]), factor), out_at, first)
        return context.get_dummy_value()

    return signature, generate


def _sum_of_keys(heads: int) -> Any:
    """An intrinsic for `heads` heads at a time."""

    @intrinsic
    def summed(typing_context, shares, first, room, keys, base, places, count, width, out, to):  # type: ignore[no-untyped-def]
        """out[to + m · D + d] = Σ_i shares[first + m · room + i] · keys[base + places[i] + d] for i < count, a multiple of LANES."""
        signature = types.void(shares, _integer, _integer, keys, _integer, places, _integer, _integer, out, _integer)

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            emit = Emit(context, builder, signature, args)
            _, first, room, _, base, _, count, width, _, to = args
            shares_at = [emit.pointer(0, emit.offset(first, (room, emit.number(m)))) for m in range(heads)]
            keys_at, places_at, out_at = emit.pointer(3, base), emit.pointer(5, emit.number(0)), emit.pointer(8, to)
            sums = emit.sums(_UNROLLED, heads)
            with emit.steps(width, LANES) as (column, _):
                for u, m in np.ndindex(_UNROLLED, heads):
                    builder.store(emit.constant(0), sums[u][m])
                with emit.steps(count, _UNROLLED) as (start, _):
                    for u in range(_UNROLLED):
                        i = emit.offset(start, emit.number(u))
                        key = emit.load(keys_at, emit.offset(emit.load_one(places_at, i), column))
                        for m in range(heads):
                            emit.add_product(emit.at(shares_at[m], i), key, sums[u][m])
                for m in range(heads):
                    total = builder.load(sums[0][m])
                    for u in range(1, _UNROLLED):
                        total = builder.fadd(total, builder.load(sums[u][m]))
                    emit.store(total, out_at, emit.offset((width, emit.number(m)), column))
            return context.get_dummy_value()

        return signature, generate

    return summed


def _addition_to_keys(heads: int) -> Any:
    """An intrinsic for `heads` heads at a time."""

    @intrinsic
    def added(typing_context, shares, first, room, rows, at, width, keys, base, places, count):  # type: ignore[no-untyped-def]
        """keys[base + places[i] + d] += Σ_m shares[first + m · room + i] · rows[at + m · D + d] for i < count."""
        signature = types.void(shares, _integer, _integer, rows, _integer, _integer, keys, _integer, places, _integer)

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            emit = Emit(context, builder, signature, args)
            _, first, room, _, at, width, _, base, _, count = args
            shares_at = [emit.pointer(0, emit.offset(first, (room, emit.number(m)))) for m in range(heads)]
            rows_at, keys_at, places_at = emit.pointer(3, at), emit.pointer(6, base), emit.pointer(8, emit.number(0))
            with emit.steps(width, LANES) as (column, _):
                given = [emit.load(rows_at, emit.offset((width, emit.number(m)), column)) for m in range(heads)]
                with cgutils.for_range(builder, count, intp=I64) as loop:
                    to = emit.offset(emit.load_one(places_at, loop.index), column)
                    key = emit.load(keys_at, to)
                    for m in range(heads):
                        key = emit.multiply_add(emit.at(shares_at[m], loop.index), given[m], key)
                    emit.store(key, keys_at, to)
            return context.get_dummy_value()

        return signature, generate

    return added


sum_one, sum_two, add_one, add_two = _sum_of_keys(1), _sum_of_keys(2), _addition_to_keys(1), _addition_to_keys(2)


@intrinsic
def exponentials(typing_context, scores, first, count):  # type: ignore[no-untyped-def]
    """Replaces count >= 1 scores by e^(score - largest), a multiple of LANES with -inf behind them; returns (their sum, the largest)."""
    signature = types.UniTuple(_float, 2)(scores, _integer, _integer)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        scores_at, (total, largest) = emit.pointer(0, args[1]), emit.sums(2)
        builder.store(emit.constant(0), total)
        builder.store(emit.constant(-np.inf), largest)

        def larger(a, b):  # type: ignore[no-untyped-def]
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        with emit.steps(args[2], LANES) as (i, _):
            builder.store(larger(emit.load(scores_at, i), builder.load(largest)), largest)
        most = emit.across(builder.load(largest), larger)
        with emit.steps(args[2], LANES) as (i, _):
            power = emit.exponential(builder.fsub(emit.load(scores_at, i), most))
            emit.store(power, scores_at, i)
            builder.store(builder.fadd(builder.load(total), power), total)
        found = [builder.extract_element(x, ir.Constant(I64, 0)) for x in (emit.across(builder.load(total), builder.fadd), most)]
        return context.make_tuple(builder, signature.return_type, found)

    return signature, generate


@intrinsic
def multiply(typing_context, numbers, first, count, factor):  # type: ignore[no-untyped-def]
    """numbers[first : first + count] *= factor; count is a multiple of LANES."""
    signature = types.void(numbers, _integer, _integer, _float)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        at, factor = emit.pointer(0, args[1]), emit.spread(args[3])
        with emit.steps(args[2], LANES) as (i, _):
            emit.store(builder.fmul(emit.load(at, i), factor), at, i)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def by_scores(typing_context, shares, gradients, first, count, gate, scale):  # type: ignore[no-untyped-def]
    """Of a path's shares p and the gradients g by them: returns Σ p g, the gate's gradient; leaves gate · p, and gate · scale · p (g - Σ p g), the
    gradient by q · k."""
    signature = _float(shares, gradients, _integer, _integer, _float, _float)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        shares_at, gradients_at, (sum_at,) = emit.pointer(0, args[2]), emit.pointer(1, args[2]), emit.sums(1)
        gate, scale = emit.spread(args[4]), emit.spread(args[5])
        builder.store(emit.constant(0), sum_at)
        with emit.steps(args[3], LANES) as (i, _):
            emit.add_product(emit.load(shares_at, i), emit.load(gradients_at, i), sum_at)
        total = emit.across(builder.load(sum_at), builder.fadd)
        with emit.steps(args[3], LANES) as (i, _):
            weight = builder.fmul(emit.load(shares_at, i), gate)
            gradient = builder.fmul(builder.fsub(emit.load(gradients_at, i), total), builder.fmul(weight, scale))
            emit.store(weight, shares_at, i)
            emit.store(gradient, gradients_at, i)
        return builder.extract_element(total, ir.Constant(I64, 0))

    return signature, generate


@intrinsic
def turn(typing_context, rows, at, turns, to, width, sign):  # type: ignore[no-untyped-def]
    """Pairs of rows[at : at + D] turned by the (cos, sin) of turns[to : to + D], forth for a sign of 1, back for -1."""
    signature = types.void(rows, _integer, turns, _integer, _integer, _float)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        rows_at, turns_at = emit.pointer(0, args[1]), emit.pointer(2, args[3])
        signs = ir.Constant(VECTOR, [ir.Constant(F32, 1.0 if lane % 2 else -1.0) for lane in range(LANES)])
        signs = builder.fmul(signs, emit.spread(args[5]))
        with emit.steps(args[4], LANES) as (i, _):
            x, turn = emit.load(rows_at, i), emit.load(turns_at, i)
            cosine, sine, other = (
                emit.shuffle(given, given, [change(lane) for lane in range(LANES)])
                for given, change in ((turn, lambda c: c & ~1), (turn, lambda c: c | 1), (x, lambda c: c ^ 1))
            )
            emit.store(builder.fadd(builder.fmul(x, cosine), builder.fmul(builder.fmul(other, sine), signs)), rows_at, i)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def add(typing_context, out, to, first, at, second, place, count):  # type: ignore[no-untyped-def]
    """out[to : to + count] = first[at : at + count] + second[place : place + count]; count is a multiple of LANES."""
    signature = types.void(out, _integer, first, _integer, second, _integer, _integer)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        emit = Emit(context, builder, signature, args)
        out_at, first_at, second_at = (emit.pointer(i, args[i + 1]) for i in (0, 2, 4))
        with emit.steps(args[6], LANES) as (i, _):
            emit.store(builder.fadd(emit.load(first_at, i), emit.load(second_at, i)), out_at, i)
        return context.get_dummy_value()

    return signature, generate
