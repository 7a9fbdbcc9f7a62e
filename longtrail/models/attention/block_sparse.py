"""Attention to the own block of keys and to a few chosen ones, turned inside out: for each block of keys, the queries that chose it.

N rows (users × key/value heads), L places, M query heads of a key/value head, d head width, b places of a block, K chosen blocks; F = N·L queries
and G = N·L / b blocks of all rows, laid end to end; T tiles of R query places that read one block.

Gathering K blocks for each query would hold F·K·b·d numbers. Here queries are sorted by the block they chose and cut into tiles, so one batched
matrix product reads each block once for R queries: F·K·M·d numbers, in chunks of queries. Each (query, block) pair gives a partial result and its
log-sum; they are joined as in flash attention, whose backward pass, by recomputation, this one follows too. The way round is ours, as is the code.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

TILE = 16  # R; 16 to 64 take the same time on a CPU, and less is left empty
CHUNKS = 16  # of queries, one after the other: then a chunk's tiles take a tenth of what is kept of all queries
LEAST_ELEMENTS, MOST_ELEMENTS = 1 << 15, 1 << 18  # of a chunk's queries; smaller ones pay for their calls, larger ones leave the cache
# On a GPU each chunk asks three times for a number (of pairs, of blocks, of tiles), and waits: few, large chunks. Not measured there.
DEVICE_ELEMENTS = 1 << 23


def block_sparse_attention(
    q_NLMd: Tensor,
    k_NLd: Tensor,
    v_NLd: Tensor,
    chosen_NLK: Tensor,
    *,
    block: int,
    factor_NLK: Tensor | None = None,
    real_NL: Tensor | None = None,
) -> Tensor:
    """[N, L, M, d]: softmax(q · k / √d) v over the `chosen` blocks (-1: none) and the query's own. L is a multiple of `block`.

    Causal (`real_NL` None): of the own block the places up to the query; chosen blocks must lie before it. Bidirectional: the real places. A
    query that sees nothing gets something finite. The keys of a chosen block are multiplied by `factor`, whose value must be 1: it is there for
    its gradient. F·(K + 1)·b·M·d multiply-adds; memory linear in L.
    """
    out: Tensor = _BlockSparse.apply(q_NLMd, k_NLd, v_NLd, chosen_NLK, factor_NLK, block, real_NL)
    return out


@dataclass(frozen=True)
class _Tiles:
    """Who reads what: tile t reads block `block_T[t]` for R queries of `query_X`; pair (f, k) is row `row_FK[f, k]` of all tiles' rows."""

    block_T: Tensor
    query_X: Tensor  # [T·R], 0 where a tile is not full
    full_X: Tensor  # bool [T·R]
    row_FK: Tensor  # 0 where no block was chosen


def _tiles(chosen_FK: Tensor) -> _Tiles:
    """Queries stay in order within a block, so a later query never moves an earlier one: results of the past do not depend on the future."""
    F, K = chosen_FK.shape
    pair = (chosen_FK.view(-1) >= 0).nonzero().squeeze(1)
    block, order = chosen_FK.view(-1).index_select(0, pair).sort(stable=True)
    pair = pair.index_select(0, order)
    present, counts = block.unique_consecutive(return_counts=True)
    tiles = (counts + TILE - 1) // TILE
    skipped = (tiles.cumsum(0) - tiles) * TILE - (counts.cumsum(0) - counts)  # rows left free in the tiles of earlier blocks
    row = torch.arange(len(pair), device=pair.device) + skipped.repeat_interleave(counts, output_size=len(pair))
    block_T = present.repeat_interleave(tiles)
    query_X, full_X = pair.new_zeros(len(block_T) * TILE), pair.new_zeros(len(block_T) * TILE, dtype=torch.bool)
    query_X.scatter_(0, row, pair // K)
    full_X.scatter_(0, row, True)
    row_FK = pair.new_zeros(F * K).scatter_(0, pair, row).view(F, K)
    return _Tiles(block_T=block_T, query_X=query_X, full_X=full_X, row_FK=row_FK)


@dataclass(frozen=True)
class _Inputs:
    """Queries, keys and values with rows laid end to end, and slices of them."""

    q_FMd: Tensor
    k_Gbd: Tensor
    v_Gbd: Tensor
    chosen_FK: Tensor  # in 0..G - 1
    real_Gb: Tensor | None

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Queries, and the blocks that these are. How many there are at once changes no result but for rounding."""
        (F, M, d), b = self.q_FMd.shape, self.k_Gbd.shape[1]
        elements = min(max(F * M * d // CHUNKS, LEAST_ELEMENTS), MOST_ELEMENTS) if self.q_FMd.device.type == "cpu" else DEVICE_ELEMENTS
        step = max(1, elements // (M * d * b)) * b
        for start in range(0, F, step):
            stop = min(start + step, F)
            yield slice(start, stop), slice(start // b, stop // b)

    def own_scores(self, queries: slice, blocks: slice) -> Tensor:
        """[blocks, b·M, b]."""
        k = self.k_Gbd[blocks]
        b, d = k.shape[1:]
        scores = torch.bmm(self.q_FMd[queries].reshape(len(k), -1, d), k.transpose(1, 2)).mul_(d**-0.5)
        if self.real_Gb is not None:
            return scores.masked_fill_(~self.real_Gb[blocks].unsqueeze(1), torch.finfo(k.dtype).min)
        places = torch.arange(b, device=k.device)
        scores.view(len(k), b, -1, b).masked_fill_((places > places.unsqueeze(1)).unsqueeze(1), torch.finfo(k.dtype).min)
        return scores

    def chosen_scores(self, rows_TRd: Tensor, k_Tbd: Tensor, block_T: Tensor) -> Tensor:
        """[T, R·M, b] of gathered queries [T, R·M, d] and keys."""
        scores = torch.bmm(rows_TRd, k_Tbd.transpose(1, 2)).mul_(rows_TRd.shape[2] ** -0.5)
        if self.real_Gb is not None:
            scores.masked_fill_(~self.real_Gb[block_T].unsqueeze(1), torch.finfo(scores.dtype).min)
        return scores


def _laid_end_to_end(q_NLMd: Tensor, k_NLd: Tensor, v_NLd: Tensor, chosen_NLK: Tensor, block: int, real_NL: Tensor | None) -> _Inputs:
    (N, L, M, d), K = q_NLMd.shape, chosen_NLK.shape[2]
    first_N11 = torch.arange(N, device=chosen_NLK.device).view(N, 1, 1) * (L // block)
    return _Inputs(
        q_FMd=q_NLMd.reshape(N * L, M, d),
        k_Gbd=k_NLd.reshape(-1, block, d),
        v_Gbd=v_NLd.reshape(-1, block, d),
        chosen_FK=torch.where(chosen_NLK >= 0, chosen_NLK + first_N11, -1).view(N * L, K),
        real_Gb=None if real_NL is None else real_NL.reshape(-1, block),
    )


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis and the log-sum: the largest weight is exp(largest score - log-sum)."""
    weights = scores.softmax(-1)
    return weights, scores.amax(-1) - weights.amax(-1).log()


def _rows(x_FE: Tensor, tiles: _Tiles) -> Tensor:
    """[T, R·M, ...] of the tiles' queries, x [F, M, ...]; some query's where a tile is not full."""
    return x_FE.index_select(0, tiles.query_X).view(len(tiles.block_T), -1, *x_FE.shape[2:])


class _BlockSparse(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, factor: Tensor | None, block: int, real_NL: Tensor | None) -> Tensor:
        x = _laid_end_to_end(q, k, v, chosen, block, real_NL)
        out_FMd, log_sums_FM = torch.empty_like(x.q_FMd), x.q_FMd.new_empty(x.q_FMd.shape[:2])
        for queries, blocks in x.chunks():
            out_FMd[queries], log_sums_FM[queries] = _forward(x, queries, blocks)
        ctx.save_for_backward(q, k, v, chosen, real_NL, out_FMd, log_sums_FM)
        ctx.block, ctx.needs_factor = block, factor is not None
        return out_FMd.view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, chosen, real_NL, out_FMd, log_sums_FM = ctx.saved_tensors
        x = _laid_end_to_end(q, k, v, chosen, ctx.block, real_NL)
        grads = _Gradients(
            q=torch.zeros_like(x.q_FMd),
            k=torch.zeros_like(x.k_Gbd),
            v=torch.zeros_like(x.v_Gbd),
            factor=q.new_zeros(x.chosen_FK.shape) if ctx.needs_factor else None,
        )
        grad_FMd = grad_out.reshape(x.q_FMd.shape)
        for queries, blocks in x.chunks():
            _backward(x, queries, blocks, grad_FMd[queries], out_FMd[queries], log_sums_FM[queries], grads)
        factor = None if grads.factor is None else grads.factor.view(chosen.shape)
        return grads.q.view(q.shape), grads.k.view(k.shape), grads.v.view(v.shape), None, factor, None, None


def _forward(x: _Inputs, queries: slice, blocks: slice) -> tuple[Tensor, Tensor]:
    """Result [F, M, d] and log-sums [F, M] of a chunk's queries."""
    q = x.q_FMd[queries]
    F, M, d = q.shape
    weights, own_sums = _softmax(x.own_scores(queries, blocks))
    own_FMd, own_sums = torch.bmm(weights, x.v_Gbd[blocks]).view(F, M, d), own_sums.view(F, M)
    tiles = _tiles(x.chosen_FK[queries])
    if not len(tiles.block_T):
        return own_FMd, own_sums
    k_Tbd, v_Tbd = x.k_Gbd.index_select(0, tiles.block_T), x.v_Gbd.index_select(0, tiles.block_T)
    weights, row_sums = _softmax(x.chosen_scores(_rows(q, tiles), k_Tbd, tiles.block_T))
    chosen_Yd = torch.bmm(weights, v_Tbd).view(-1, d)  # Y = T·R·M
    row_FKM = tiles.row_FK.unsqueeze(-1) * M + torch.arange(M, device=q.device)
    row_FMK = row_FKM.transpose(1, 2).reshape(F * M, -1)
    sums_FMK = row_sums.view(-1).index_select(0, row_FMK.view(-1)).view(F, M, -1)
    sums_FMK.masked_fill_((x.chosen_FK[queries] < 0).unsqueeze(1), -torch.inf)
    total_FM = torch.logaddexp(sums_FMK.logsumexp(-1), own_sums)
    shares_FMK = sums_FMK.sub_(total_FM.unsqueeze(-1)).exp_()
    chosen_FMd = functional.embedding_bag(row_FMK, chosen_Yd, per_sample_weights=shares_FMK.view(row_FMK.shape), mode="sum").view(F, M, d)
    return chosen_FMd.addcmul_(own_FMd, (own_sums - total_FM).exp_().unsqueeze(-1)), total_FM


@dataclass(frozen=True)
class _Gradients:
    q: Tensor  # [F, M, d]
    k: Tensor  # [G, b, d]
    v: Tensor
    factor: Tensor | None  # [F, K]


def _backward(x: _Inputs, queries: slice, blocks: slice, grad: Tensor, out: Tensor, log_sums: Tensor, grads: _Gradients) -> None:
    """Adds a chunk's gradients."""
    q = x.q_FMd[queries]
    F, M, d = q.shape
    dots_FM = (grad * out).sum(-1)
    scores = x.own_scores(queries, blocks)
    shape = len(scores), -1
    own = _Part(q.reshape(*shape, d), grad.reshape(*shape, d), log_sums.reshape(shape), dots_FM.reshape(shape))
    grad_scores = own.scores(scores, x.v_Gbd[blocks], grads.v[blocks])
    grads.q[queries] = torch.bmm(grad_scores, x.k_Gbd[blocks]).view(F, M, d)
    grads.k[blocks].baddbmm_(grad_scores.transpose(1, 2), own.q)
    tiles = _tiles(x.chosen_FK[queries])
    if not len(tiles.block_T):
        return
    k_Tbd, v_Tbd = x.k_Gbd.index_select(0, tiles.block_T), x.v_Gbd.index_select(0, tiles.block_T)
    log_sums_X = log_sums.index_select(0, tiles.query_X).masked_fill_(~tiles.full_X.unsqueeze(1), torch.inf)
    part = _Part(_rows(q, tiles), _rows(grad, tiles), log_sums_X.view(len(k_Tbd), -1), _rows(dots_FM, tiles))
    scores = x.chosen_scores(part.q, k_Tbd, tiles.block_T)
    grad_v = torch.zeros_like(v_Tbd)
    grad_scores = part.scores(scores, v_Tbd, grad_v)
    present_FK = (x.chosen_FK[queries] >= 0).to(q.dtype)
    if grads.factor is not None:
        by_row = (grad_scores * scores).mul_(d**0.5).view(len(tiles.query_X), -1).sum(-1)
        grads.factor[queries] = by_row[tiles.row_FK] * present_FK
    grad_rows = torch.bmm(grad_scores, k_Tbd).view(-1, M * d)
    grads.q[queries] += functional.embedding_bag(tiles.row_FK, grad_rows, per_sample_weights=present_FK, mode="sum").view(F, M, d)
    grads.k.index_add_(0, tiles.block_T, torch.bmm(grad_scores.transpose(1, 2), part.q))
    grads.v.index_add_(0, tiles.block_T, grad_v)


@dataclass(frozen=True)
class _Part:
    """What a group of queries brings to the backward pass: [T, R, d], [T, R, d], [T, R], [T, R]. A log-sum of +inf makes all of its weights 0."""

    q: Tensor
    grad: Tensor
    log_sums: Tensor
    dots: Tensor

    def scores(self, scores: Tensor, v: Tensor, grad_v: Tensor) -> Tensor:
        """Gradient of q·k, i.e. of the scores times 1 / √d; adds to the gradient of v."""
        weights = (scores - self.log_sums.unsqueeze(-1)).exp_()
        grad_v.baddbmm_(weights.transpose(1, 2), self.grad)
        grad_weights = torch.bmm(self.grad, v.transpose(1, 2)).sub_(self.dots.unsqueeze(-1))
        return grad_weights.mul_(weights).mul_(self.q.shape[2] ** -0.5)
