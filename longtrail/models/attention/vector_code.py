"""Vector code for numba's intrinsics, whose arrays are flat float32: what compiled.py is written in.

numba keeps compiled.py's kernels on disk and notices changes of that file alone: whoever changes this one changes that one's date too.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils

_chosen = getattr(numba.config, "CPU_FEATURES", None)  # NUMBA_CPU_FEATURES
_WIDE = "+avx512f" in (llvmlite.binding.get_host_cpu_features().flatten() if _chosen is None else _chosen).split(",")
LANES, VECTORS = (16, 4) if _WIDE else (8, 2)  # as many sums as fit in the registers, less some for what is multiplied
TILE = LANES * VECTORS  # events
GROUP = 4  # hidden units, or events
PAIR = 2 * LANES  # columns of keys or weights at a time
# 2^f for |f| <= 1/2, from f^0 on: interpolated at Chebyshev's points, relative error below 1e-8
_POWERS = (1.0, 0.69314718, 0.24022651, 0.055503272, 0.0096180569, 0.0013400428, 0.00015461445)
_ROUND = 1.5 * 2.0**23  # added to a float32, it leaves an integer in the low bits
_MOST = 80.0  # where a sigmoid has reached 0 or 1 in float32, and no power overflows

F32, I8, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
VECTOR, WHOLE = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


class Emit:
    """Writes the code of one intrinsic."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.context, self.builder, self.signature, self.args = context, builder, signature, args

    def pointer(self, place: int, offset: Any) -> Any:
        """To the element `offset` of the array that is argument `place`."""
        data = cgutils.create_struct_proxy(self.signature.args[place])(self.context, self.builder, self.args[place]).data
        return self.builder.gep(data, [offset])

    def number(self, value: int) -> Any:
        return ir.Constant(I64, value)

    def constant(self, value: float) -> Any:
        return ir.Constant(VECTOR, [ir.Constant(F32, float(np.float32(value)))] * LANES)

    def spread(self, value: Any) -> Any:
        """A float in all lanes."""
        one = self.builder.insert_element(ir.Constant(VECTOR, ir.Undefined), value, I32(0))
        return self.builder.shuffle_vector(one, ir.Constant(VECTOR, ir.Undefined), ir.Constant(WHOLE, [I32(0)] * LANES))

    def at(self, base: Any, offset: Any) -> Any:
        """The float there, in all lanes."""
        return self.spread(self.builder.load(self.builder.gep(base, [offset])))

    def _place(self, base: Any, offset: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(base, [offset]), VECTOR.as_pointer())

    def load(self, base: Any, offset: Any) -> Any:
        return self.builder.load(self._place(base, offset), align=4)

    def store(self, vector: Any, base: Any, offset: Any) -> None:
        self.builder.store(vector, self._place(base, offset), align=4)

    def fetch(self, base: Any, offset: Any) -> None:
        """Asks for the cache line there, and does not wait for it: else memory would rest while a tile is worked on."""
        pointer = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        function = self.builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)
        self.builder.call(function, [self.builder.bitcast(self.builder.gep(base, [offset]), pointer), I32(0), I32(3), I32(1)])

    def sums(self, *shape: int) -> Any:
        """Places of vectors, nested by shape: they become registers."""
        if len(shape) > 1:
            return [self.sums(*shape[1:]) for _ in range(shape[0])]
        return [cgutils.alloca_once(self.builder, VECTOR) for _ in range(shape[0])]

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return self.builder.fadd(self.builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    def add_product(self, a: Any, b: Any, place: Any) -> None:
        self.builder.store(self.multiply_add(a, b, self.builder.load(place)), place)

    def offset(self, *parts: Any) -> Any:
        """The sum of integers; of (a, b) in it the product."""
        total = self.number(0)
        for part in parts:
            total = self.builder.add(total, self.builder.mul(*part) if isinstance(part, tuple) else part)
        return total

    def sigmoid(self, x: Any) -> Any:
        for comparison, bound in (("<", _MOST), (">", -_MOST)):  # unordered: what is not a number stays so
            x = self.builder.select(self.builder.fcmp_unordered(comparison, x, self.constant(bound)), x, self.constant(bound))
        return self.builder.fdiv(self.constant(1), self.builder.fadd(self._power(x, -1), self.constant(1)))

    def exponential(self, x: Any) -> Any:
        """e^x for x <= 0; 0 below -80."""
        seen = self.builder.fcmp_unordered(">", x, self.constant(-_MOST))
        return self.builder.select(seen, self._power(self.builder.select(seen, x, self.constant(0)), 1), self.constant(0))

    def _power(self, x: Any, sign: int) -> Any:
        """e^(sign · x) for |x| <= 80."""
        builder, constant, multiply_add, factor = self.builder, self.constant, self.multiply_add, sign * np.log2(np.e)
        rounded = multiply_add(x, constant(factor), constant(_ROUND))
        rest = multiply_add(x, constant(factor), builder.fsub(constant(_ROUND), rounded))
        power = constant(_POWERS[-1])
        for coefficient in reversed(_POWERS[:-1]):
            power = multiply_add(power, rest, constant(coefficient))
        exponent = builder.shl(builder.bitcast(rounded, WHOLE), ir.Constant(WHOLE, [I32(23)] * LANES))
        return builder.bitcast(builder.add(builder.bitcast(power, WHOLE), exponent), VECTOR)

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """Lanes of `a`, and of `b` counted from LANES on."""
        return self.builder.shuffle_vector(a, b, ir.Constant(WHOLE, [I32(lane) for lane in lanes]))

    def across(self, vector: Any, operation: Callable[[Any, Any], Any]) -> Any:
        """The operation over all lanes, in all lanes."""
        for bit in (1 << n for n in range(LANES.bit_length() - 1)):
            vector = operation(vector, self.shuffle(vector, vector, [lane ^ bit for lane in range(LANES)]))
        return vector

    def lane_sums(self, rows: list[Any]) -> Any:
        """The sum of the lanes of LANES vectors, one a lane: pairs of vectors are added half by half, a bit of row and lane at a time."""
        for bit in (1 << n for n in range(LANES.bit_length() - 1)):
            kept = [LANES + c if c & bit else c for c in range(LANES)]
            moved = [LANES + (c ^ bit) if c & bit else c ^ bit for c in range(LANES)]
            rows = [self.builder.fadd(self.shuffle(a, b, kept), self.shuffle(a, b, moved)) for a, b in zip(rows[::2], rows[1::2], strict=True)]
        return rows[0]

    def hidden(self, keys: Any, weights: Any, bias: Any, first: Any, width: Any, following: Any = None) -> list[list[Any]]:
        """Pre-activations [GROUP][VECTORS] of units `first` on, of a turned tile of keys; meanwhile the tile at `following` is asked for."""
        builder, sums, places = self.builder, self.sums(GROUP, VECTORS), []
        for j in range(GROUP):
            h = self.offset(first, self.number(j))
            places.append(builder.gep(weights, [builder.mul(h, width)]))
            start = self.at(bias, h)
            for place in sums[j]:
                builder.store(start, place)
        self.add_products(keys, places, width, sums, following)
        return [[builder.load(place) for place in row] for row in sums]

    def add_products(self, keys: Any, rows: list[Any], width: Any, sums: Any, following: Any = None) -> None:
        """To sums[j][v] Σ_d rows[j][d] · (vector v of the turned tile's column d)."""
        with cgutils.for_range(self.builder, width, intp=I64) as loop:
            base = self.builder.mul(loop.index, self.number(TILE))
            for v in range(VECTORS if following is not None else 0):
                self.fetch(following, self.offset(base, self.number(LANES * v)))
            k = [self.load(keys, self.offset(base, self.number(LANES * v))) for v in range(VECTORS)]
            for row, places in zip(rows, sums, strict=True):
                w = self.at(row, loop.index)
                for vector, place in zip(k, places, strict=True):
                    self.add_product(w, vector, place)

    def load_one(self, base: Any, offset: Any) -> Any:
        return self.builder.load(self.builder.gep(base, [offset]))

    def store_one(self, value: Any, base: Any, offset: Any) -> None:
        self.builder.store(value, self.builder.gep(base, [offset]))

    def along(self, count: Any, vector: Callable[[Any], None], one: Callable[[Any], None]) -> None:
        """vector(i) for all whole vectors of `count` places, one(i) for the rest."""
        whole = self.builder.and_(count, self.number(-LANES))
        with self.steps(whole, LANES) as (i, _):
            vector(i)
        with cgutils.for_range(self.builder, count, start=whole, intp=I64) as loop:
            one(loop.index)

    def steps(self, stop: Any, step: int) -> Any:
        return cgutils.for_range_slice(self.builder, self.number(0), stop, self.number(step), intp=I64)
