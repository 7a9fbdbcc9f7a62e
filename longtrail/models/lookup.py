"""Rows of a table by id, with a gradient that is quick on a CPU. N rows, R look-ups, M rows of one look-up, D width."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

COMPILED_ROWS = 1 << 15  # look-ups, from which on their gradient is compiled


class _Rows(torch.autograd.Function):
    """functional.embedding's own CPU backward took 33 ms for 256,000 rows of a table [100,000, 16], index_add_ 11 ms; both add in a fixed order."""

    @staticmethod
    def forward(ctx: Any, table_ND: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = len(table_ND)
        return table_ND.index_select(0, ids.flatten()).view(*ids.shape, table_ND.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        grad_ND = _added(ctx.rows, ids, grad)
        grad_ND[0] = 0
        return grad_ND, None


class _Both(torch.autograd.Function):
    """Rows of a table, with rows of another added to their first columns, as compiled_lookup.py makes them and their gradients."""

    @staticmethod
    def forward(ctx: Any, table_ND: Tensor, ids: Tensor, part_MW: Tensor, part_ids: Tensor) -> Tensor:
        from longtrail.models.compiled_lookup import sums_of_rows

        ids, part_ids = ids.contiguous(), part_ids.contiguous()
        out = table_ND.new_empty(*ids.shape, table_ND.shape[1])
        sums_of_rows(part_MW, part_ids, table_ND.contiguous(), ids, out)
        ctx.save_for_backward(ids, part_ids)
        ctx.shapes = table_ND.shape, part_MW.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        from longtrail.models.compiled_lookup import add_rows_twice

        ids, part_ids = ctx.saved_tensors
        table_ND, part_MW = (grad.new_zeros(shape) for shape in ctx.shapes)
        add_rows_twice(part_MW, part_ids.flatten(), table_ND, ids.flatten(), grad.reshape(ids.numel(), grad.shape[-1]).contiguous())
        part_MW[0] = 0
        return table_ND, None, part_MW, None


class _Sum(torch.autograd.Function):
    """Rows of a table, with `part` added to their first columns: one pass over what is as large as a batch's histories, forward and backward."""

    @staticmethod
    def forward(ctx: Any, table_ND: Tensor, ids: Tensor, part: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = table_ND.shape, part.shape[-1]
        rows = table_ND.index_select(0, ids.flatten()).view(*ids.shape, table_ND.shape[1])
        rows[..., : part.shape[-1]].add_(part)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (ids,) = ctx.saved_tensors
        (rows, _), width = ctx.shape
        return _added(rows, ids, grad), None, grad[..., :width]


def _added(rows: int, ids: Tensor, grad: Tensor) -> Tensor:
    """[rows, D]: the sum of the gradients [..., D] of each row's look-ups."""
    table_ND, rows_RD = grad.new_zeros(rows, grad.shape[-1]), grad.reshape(ids.numel(), grad.shape[-1])
    if worth_compiling(grad, ids) and rows_RD.stride(1) == 1:
        from longtrail.models.compiled_lookup import add_rows  # numba takes half a second, and small batches do without

        add_rows(table_ND, ids.flatten(), rows_RD)
        return table_ND
    return table_ND.index_add_(0, ids.flatten(), rows_RD.contiguous())  # three times as long over a slice of a concatenation


def worth_compiling(table: Tensor, ids: Tensor) -> bool:
    """Whether compiled_lookup.py knows such numbers, and the look-ups are so many that loading it pays."""
    return table.device.type == "cpu" and table.dtype == torch.float32 and ids.numel() >= COMPILED_ROWS


def look_up_both(table_ND: Tensor, ids: Tensor, part_MW: Tensor, part_ids: Tensor) -> Tensor:
    """table[ids] [..., D] with part[part_ids] [..., W <= D] added to its first W columns. Row 0 of `part` gets no gradient."""
    if torch.is_grad_enabled() and table_ND.dtype == part_MW.dtype and worth_compiling(part_MW, ids):
        return _Both.apply(table_ND, ids, part_MW, part_ids)
    return look_up_and_add(table_ND, ids, look_up(part_MW, part_ids))


class _Bags(torch.autograd.Function):
    """Sums of rows, of which nothing of size R · M · D is ever made, forward or backward."""

    @staticmethod
    def forward(ctx: Any, table_ND: Tensor, ids_RM: Tensor) -> Tensor:
        ctx.save_for_backward(ids_RM)
        ctx.rows = len(table_ND)
        return functional.embedding_bag(ids_RM, table_ND, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        (ids_RM,) = ctx.saved_tensors
        grad_RD = grad_RD.contiguous()
        grad_ND = grad_RD.new_zeros(ctx.rows, grad_RD.shape[-1])
        for ids_R in ids_RM.unbind(1):
            grad_ND.index_add_(0, ids_R, grad_RD)
        return grad_ND, None


def look_up_sum(table_ND: Tensor, ids: Tensor) -> Tensor:
    """int64 [..., M] → [..., D]: the sum of M rows. Every row learns, row 0 too; second derivatives there are none."""
    return _Bags.apply(table_ND, ids.reshape(-1, ids.shape[-1])).view(*ids.shape[:-1], table_ND.shape[1])


def look_up_and_add(table_ND: Tensor, ids: Tensor, part: Tensor) -> Tensor:
    """table[ids] [..., D] with `part` [..., W <= D] added to its first W columns. Every row learns, row 0 too."""
    return _Sum.apply(table_ND, ids, part)


def look_up(table_ND: Tensor, ids: Tensor) -> Tensor:
    """int64 [...] → [..., D]: functional.embedding with padding_idx=0. Row 0 gets no gradient; second derivatives there are none on a CPU."""
    if ids.device.type == "cpu" and torch.is_grad_enabled() and table_ND.requires_grad:
        return _Rows.apply(table_ND, ids)
    return functional.embedding(ids, table_ND, padding_idx=0)
