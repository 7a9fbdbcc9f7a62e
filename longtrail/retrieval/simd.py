"""Instructions that numba does not offer: bits of a word, and AVX-512 VBMI's look-up of 64 bytes at once.

numba's cache on disk does not notice changes of this file: longtrail.retrieval.kernels names its hash (a test compares), so that it changes too.
"""

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

BLOCK = 512  # items
CODES = 256  # places a table has for each split
GROUP = BLOCK // 64  # vectors of 64 bytes
_chosen = getattr(numba.config, "CPU_FEATURES", None)  # NUMBA_CPU_FEATURES
_FEATURES: str = llvmlite.binding.get_host_cpu_features().flatten() if _chosen is None else _chosen
BYTE_SHUFFLES = {"+avx512vbmi", "+avx512bw"} <= set(_FEATURES.split(","))


@intrinsic
def ones(typing_context, bits):  # type: ignore[no-untyped-def]
    """How many bits of a uint64 are set."""
    return types.int64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


@intrinsic
def lowest(typing_context, bits):  # type: ignore[no-untyped-def]
    """The place of the lowest set bit of a uint64."""
    return types.int64(types.uint64), lambda context, builder, signature, args: builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))


@intrinsic
def byte_sums(typing_context, codes, start, tables, table, splits, low, high, masks):  # type: ignore[no-untyped-def]
    """Saturating sums of 8-bit table entries of the 512 items of the block at `codes[start]`: bit i of `masks` is set where item i's is at least
    `low`, bit i of `masks[8:]` where it is at least `high`. Without VBMI all bits are set."""
    signature = types.void(codes, types.int64, tables, types.int64, types.int64, types.uint8, types.uint8, masks)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i8, i32, i64 = (ir.IntType(bits) for bits in (8, 32, 64))
        bytes64, zeros = ir.VectorType(i8, 64), ir.Constant(ir.VectorType(i8, 64), [0] * 64)

        def pointer(place):  # type: ignore[no-untyped-def]
            data = cgutils.create_struct_proxy(signature.args[place])(context, builder, args[place]).data
            return builder.bitcast(data, i8.as_pointer())

        def load(base, offset):  # type: ignore[no-untyped-def]
            return builder.load(builder.bitcast(builder.gep(base, [offset]), bytes64.as_pointer()), align=1)

        def store_mask(bits, place):  # type: ignore[no-untyped-def]
            builder.store(bits, builder.bitcast(builder.gep(masks_at, [i64(8 * place)]), i64.as_pointer()), align=8)

        def function(name, *arguments):  # type: ignore[no-untyped-def]
            return cgutils.get_or_insert_function(builder.module, ir.FunctionType(bytes64, list(arguments)), name)

        codes_at, tables_at, masks_at = pointer(0), pointer(2), pointer(7)
        if not BYTE_SHUFFLES:
            for place in range(2 * GROUP):
                store_mask(i64(-1), place)
            return context.get_dummy_value()
        shuffle = function("llvm.x86.avx512.vpermi2var.qi.512", bytes64, bytes64, bytes64)
        add = function("llvm.uadd.sat.v64i8", bytes64, bytes64)
        sums = [cgutils.alloca_once(builder, bytes64) for _ in range(GROUP)]
        for part in sums:
            builder.store(zeros, part)
        with cgutils.for_range(builder, args[4]) as loop:
            entry = builder.add(args[3], builder.mul(loop.index, i64(CODES)))
            quarters = [load(tables_at, builder.add(entry, i64(64 * quarter))) for quarter in range(4)]
            split = builder.add(args[1], builder.mul(loop.index, i64(BLOCK)))
            for place, part in enumerate(sums):
                picks = load(codes_at, builder.add(split, i64(64 * place)))
                lower, upper = (builder.call(shuffle, [quarters[half], picks, quarters[half + 1]]) for half in (0, 2))
                values = builder.select(builder.icmp_signed("<", picks, zeros), upper, lower)  # a shuffle sees 7 bits, the sign is the eighth
                builder.store(builder.call(add, [builder.load(part), values]), part)
        nothing = ir.Constant(bytes64, ir.Undefined)
        for which, bound in enumerate(args[5:7]):
            first = builder.insert_element(nothing, bound, i32(0))
            bounds = builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(i32, 64), [0] * 64))
            for place, part in enumerate(sums):
                passed = builder.icmp_unsigned(">=", builder.load(part), bounds)
                store_mask(builder.bitcast(passed, i64), which * GROUP + place)
        return context.get_dummy_value()

    return signature, generate
