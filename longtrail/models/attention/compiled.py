"""The attention layer of fused.py for one request on a CPU, compiled by numba: what serving runs, four times as fast as torch's parts.

C candidates, L history, n events of it, D width, H hidden units.

The hidden layer [C, H, L] is never written: for TILE events and GROUP units at a time its pre-activations stand in registers, go through the sigmoid
there and are added to the scores. Loops over tiles are outermost, so that a tile of the history is read from the innermost cache. Ours; the tests
hold it to fused.py. float32; the sigmoid is right to 3e-7. No gradient, no use of the interpreter's lock: threads run side by side.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

_chosen = getattr(numba.config, "CPU_FEATURES", None)  # NUMBA_CPU_FEATURES
_WIDE = "+avx512f" in (llvmlite.binding.get_host_cpu_features().flatten() if _chosen is None else _chosen).split(",")
LANES, VECTORS = (16, 4) if _WIDE else (8, 2)  # as many sums as fit in the registers, less some for what is multiplied
TILE = LANES * VECTORS  # events
GROUP = 4  # hidden units
# 2^f for |f| <= 1/2, from f^0 on: interpolated at Chebyshev's points, relative error below 1e-8
_POWERS = (1.0, 0.69314718, 0.24022651, 0.055503272, 0.0096180569, 0.0013400428, 0.00015461445)
_ROUND = 1.5 * 2.0**23  # added to a float32, it leaves an integer in the low bits
_MOST = 80.0  # where a sigmoid has reached 0 or 1 in float32, and no power overflows

Floats = NDArray[np.float32]


@intrinsic
def _tile(typing_context, keys, at, weights, row, bias, last, last_bias, width, units, squashed, scores, to):  # type: ignore[no-untyped-def]
    """scores[to : to + TILE] = Σ_h last[h] · sigmoid(bias[row + h] + Σ_d weights[(row + h) · D + d] · keys[at + d · TILE + place]) + last_bias,
    and the sigmoid of that where `squashed`. Arrays are flat float32; `units` is a multiple of GROUP."""
    integer, number = types.int64, types.float32
    signature = types.void(keys, integer, weights, integer, bias, last, number, integer, integer, types.boolean, scores, integer)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        f32, i32, i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
        vector, whole = ir.VectorType(f32, LANES), ir.VectorType(i32, LANES)

        def pointer(place, offset):  # type: ignore[no-untyped-def]
            data = cgutils.create_struct_proxy(signature.args[place])(context, builder, args[place]).data
            return builder.gep(data, [offset])

        def constant(value):  # type: ignore[no-untyped-def]
            return ir.Constant(vector, [ir.Constant(f32, float(np.float32(value)))] * LANES)

        def spread(value):  # type: ignore[no-untyped-def]
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, i32(0))
            return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(whole, [i32(0)] * LANES))

        def multiply_add(a, b, c):  # type: ignore[no-untyped-def]
            return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

        def sigmoid(x):  # type: ignore[no-untyped-def]
            for comparison, bound in (("<", _MOST), (">", -_MOST)):  # unordered: what is not a number stays so
                x = builder.select(builder.fcmp_unordered(comparison, x, constant(bound)), x, constant(bound))
            rounded = multiply_add(x, constant(-np.log2(np.e)), constant(_ROUND))
            rest = multiply_add(x, constant(-np.log2(np.e)), builder.fsub(constant(_ROUND), rounded))
            power = constant(_POWERS[-1])
            for coefficient in reversed(_POWERS[:-1]):
                power = multiply_add(power, rest, constant(coefficient))
            exponent = builder.shl(builder.bitcast(rounded, whole), ir.Constant(whole, [i32(23)] * LANES))
            power = builder.bitcast(builder.add(builder.bitcast(power, whole), exponent), vector)
            return builder.fdiv(constant(1), builder.fadd(power, constant(1)))

        def load_vector(base, offset):  # type: ignore[no-untyped-def]
            return builder.load(builder.bitcast(builder.gep(base, [offset]), vector.as_pointer()), align=4)

        zero = ir.Constant(i64, 0)
        _, at, _, row, _, _, last_bias, width, units, squashed, _, to = args
        keys_at, weights_at = pointer(0, at), pointer(2, builder.mul(row, width))
        bias_at, last_at, scores_at = pointer(4, row), pointer(5, zero), pointer(10, to)
        totals = [cgutils.alloca_once_value(builder, spread(last_bias)) for _ in range(VECTORS)]
        with cgutils.for_range_slice(builder, zero, units, ir.Constant(i64, GROUP), intp=i64) as (unit, _):
            sums = [[cgutils.alloca_once(builder, vector) for _ in range(VECTORS)] for _ in range(GROUP)]
            rows = []
            for j in range(GROUP):
                h = builder.add(unit, i64(j))
                rows.append(builder.gep(weights_at, [builder.mul(h, width)]))
                start = spread(builder.load(builder.gep(bias_at, [h])))
                for place in sums[j]:
                    builder.store(start, place)
            with cgutils.for_range(builder, width, intp=i64) as loop:
                base = builder.mul(loop.index, i64(TILE))
                k = [load_vector(keys_at, builder.add(base, i64(LANES * v))) for v in range(VECTORS)]
                for j in range(GROUP):
                    w = spread(builder.load(builder.gep(rows[j], [loop.index])))
                    for v in range(VECTORS):
                        builder.store(multiply_add(w, k[v], builder.load(sums[j][v])), sums[j][v])
            for j in range(GROUP):
                w = spread(builder.load(builder.gep(last_at, [builder.add(unit, i64(j))])))
                for v in range(VECTORS):
                    builder.store(multiply_add(w, sigmoid(builder.load(sums[j][v])), builder.load(totals[v])), totals[v])
        for v in range(VECTORS):
            plain = builder.load(totals[v])
            place = builder.bitcast(builder.gep(scores_at, [i64(LANES * v)]), vector.as_pointer())
            builder.store(builder.select(squashed, sigmoid(plain), plain), place, align=4)
        return context.get_dummy_value()

    return signature, generate


def _kernel(function: Callable) -> Any:
    with contextlib.suppress(RuntimeError):  # numba finds no folder to keep it in: compiled again in each process
        return numba.njit(nogil=True, cache=True)(function)
    return numba.njit(nogil=True)(function)


@_kernel
def _scores(keys, n, weights, bias, last, last_bias, width, squashed, scores, candidates, length):  # type: ignore[no-untyped-def]
    """_tile for all events and candidates. Arrays are flat: slices would double the time it takes to compile."""
    tile, found = np.zeros(width * TILE, np.float32), np.empty(TILE, np.float32)
    for start in range(0, n, TILE):
        real = min(TILE, n - start)
        for j in range(real):
            for d in range(width):
                tile[d * TILE + j] = keys[(start + j) * width + d]
        for c in range(candidates):
            _tile(tile, 0, weights, c * len(last), bias, last, last_bias, width, len(last), squashed, found, 0)  # type: ignore[call-arg]
            for j in range(real):
                scores[c * length + start + j] = found[j]


def pair_scores(keys_LD: Floats, n: int, weights_CHD: Floats, bias_CH: Floats, last_H: Floats, last_bias: float, *, squashed: bool) -> Floats:
    """[C, L]: last · sigmoid(K w + b) + last_bias of the first `n` events, the sigmoid of that where `squashed`; 0 beyond them."""
    if spare := -len(last_H) % GROUP:  # units that count for nothing
        weights_CHD, bias_CH = np.pad(weights_CHD, ((0, 0), (0, spare), (0, 0))), np.pad(bias_CH, ((0, 0), (0, spare)))
        last_H = np.pad(last_H, (0, spare))
    scores_CL = np.empty((len(weights_CHD), len(keys_LD)), np.float32)
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
