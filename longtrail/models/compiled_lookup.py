"""Looking rows of tables up by id on a CPU, and adding their gradients up, compiled by numba. R look-ups, W and D >= W widths of two tables.

A step of training at B = 256, L = 1,000 looks 256,000 rows up: what it costs is memory traffic. So both tables are read, and learn, in one pass
over the look-ups, and rows that are due a little later are already on their way to the cache. They are added in order: the same bits every time.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from longtrail.kernels import kernel

MADE_WITH = {"kernels.py": "be9794c4dfea49a5"}

_AHEAD = 16  # look-ups
_LINE, _LANES = 16, 8  # float32 of a cache line, and moved at a time


@intrinsic
def _fetch(typing_context, table, place):  # type: ignore[no-untyped-def]
    """Asks for the cache line of table[place], and does not wait for it."""
    signature = types.void(table, types.int64)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)
        builder.call(function, [builder.bitcast(builder.gep(data, [args[1]]), pointer), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return signature, generate


def _rows(added: bool) -> Any:
    """An intrinsic that copies or adds a row. In plain loops numba looks at every index whether it is negative, which took five times as long."""

    @intrinsic
    def row(typing_context, table, to, rows, at, width):  # type: ignore[no-untyped-def]
        """table[to + d] = rows[at + d], or += where `added`, for d < width."""
        signature = types.void(table, types.int64, rows, types.int64, types.int64)

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            number = ir.IntType(64)
            out, given = (builder.gep(cgutils.create_struct_proxy(signature.args[i])(context, builder, args[i]).data, [args[i + 1]]) for i in (0, 2))

            def move(offset, kind):  # type: ignore[no-untyped-def]
                to, at = (builder.bitcast(builder.gep(base, [offset]), kind.as_pointer()) for base in (out, given))
                value = builder.load(at, align=4)
                builder.store(builder.fadd(builder.load(to, align=4), value) if added else value, to, align=4)

            whole = builder.and_(args[4], number(-_LANES))
            with cgutils.for_range_slice(builder, number(0), whole, number(_LANES), intp=number) as (offset, _):
                move(offset, ir.VectorType(ir.FloatType(), _LANES))
            with cgutils.for_range(builder, args[4], start=whole, intp=number) as loop:
                move(loop.index, ir.FloatType())
            return context.get_dummy_value()

        return signature, generate

    return row


_copy_row, _add_row = _rows(False), _rows(True)


@kernel
def _sums(first, ids, second, others, out, width, wide):  # type: ignore[no-untyped-def]
    """out[r] = second[others[r]], and to its first columns first[ids[r]]."""
    for i in range(len(ids)):
        for line in range(0, width, _LINE):
            _fetch(first, ids[min(i + _AHEAD, len(ids) - 1)] * width + line)  # type: ignore[call-arg]
        _copy_row(out, i * wide, second, others[i] * wide, wide)
        _add_row(out, i * wide, first, ids[i] * width, width)


@kernel
def _learn(first, ids, second, others, rows, width, wide, stride):  # type: ignore[no-untyped-def]
    """The other way: rows[r] to second[others[r]], where that is not empty, and its first columns to first[ids[r]]."""
    for i in range(len(ids)):
        for line in range(0, width, _LINE):
            _fetch(first, ids[min(i + _AHEAD, len(ids) - 1)] * width + line)  # type: ignore[call-arg]
        _add_row(first, ids[i] * width, rows, i * stride, width)
        if wide:
            _add_row(second, others[i] * wide, rows, i * stride, wide)


def sums_of_rows(first_NW: Tensor, ids_R: Tensor, second_PD: Tensor, others_R: Tensor, out_RD: Tensor) -> None:
    """out[r] = second[others[r]] with first[ids[r]] added to its first columns. All contiguous."""
    first, ids, second, others, out = (x.detach().view(-1).numpy() for x in (first_NW, ids_R, second_PD, others_R, out_RD))
    _sums(first, ids, second, others, out, first_NW.shape[1], second_PD.shape[1])


def add_rows(table_NW: Tensor, ids_R: Tensor, rows_RW: Tensor) -> None:
    """table[ids[r]] += rows[r], in place. The table is contiguous; rows may be columns of a wider array."""
    _add(table_NW, ids_R, rows_RW, table_NW.new_zeros(0), ids_R, 0)


def add_rows_twice(first_NW: Tensor, ids_R: Tensor, second_PD: Tensor, others_R: Tensor, rows_RD: Tensor) -> None:
    """second[others[r]] += rows[r], and first[ids[r]] += its first columns, in place."""
    _add(first_NW, ids_R, rows_RD, second_PD, others_R, second_PD.shape[1])


def _add(first_NW: Tensor, ids_R: Tensor, rows: Tensor, second: Tensor, others_R: Tensor, wide: int) -> None:
    if not len(ids_R):
        return
    (R, columns), stride, width = rows.shape, rows.stride(0), first_NW.shape[1]
    flat = rows.as_strided(((R - 1) * stride + columns,), (1,))
    _learn(first_NW.view(-1).numpy(), ids_R.numpy(), second.view(-1).numpy(), others_R.numpy(), flat.numpy(), width, wide, stride)
