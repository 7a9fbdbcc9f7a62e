"""Which blocks of keys each query reads: scores of all blocks, made in chunks of queries, of which the best k and the log-sum stay.

N rows (users × key/value heads), L places, d head width, n blocks of `block` places, K blocks selected by a query.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 18  # scores held at once on a CPU: they stay in a core's cache
DEVICE_ELEMENTS = 1 << 25  # and elsewhere, where each chunk is a handful of kernels to start: 128 MB in float32, not measured on a GPU
NOTHING = -1000.0  # score of the extra slot "none of them", as in BlossomRec's code
LEAST_SHARE = 1e-10  # a block below this share of the softmax is not read, even where it is among the best K; its code's


def best_blocks(q_NLd: Tensor, keys_Nnd: Tensor, selected: int, block: int, real_Nn: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `selected` best blocks of each query, int64 [N, L, K], -1 for "none"; their shares p of the softmax over [NOTHING, visible blocks].

    The score of a block is q · key / √d. Causal (`real_Nn` None): query t sees the blocks that end before t. Bidirectional: the real blocks other
    than its own. L is a multiple of `block`. Shares have a gradient, in all scores. O(L·n·d) time, memory linear in L + n.
    """
    scores_NLK, blocks_NLK, total_NL = _BlockScores.apply(q_NLd, keys_Nnd, selected, block, real_Nn)
    shares_NLK = (scores_NLK - total_NL.unsqueeze(-1)).exp()
    return blocks_NLK.masked_fill(shares_NLK.detach() <= LEAST_SHARE, -1), shares_NLK


def _chunks(q_NLd: Tensor, n: int, block: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """Slices of queries, a multiple of `block` long, and the number of blocks that the last of them sees. How long they are changes no result."""
    N, L, _ = q_NLd.shape
    elements = CHUNK_ELEMENTS if q_NLd.device.type == "cpu" else DEVICE_ELEMENTS
    step = max(1, elements // max(1, N * n * block)) * block
    for start in range(0, L, step):
        stop = min(start + step, L)
        yield slice(start, stop), (stop - 1) // block if causal else n


def _scores(q_NLd: Tensor, keys_Nnd: Tensor, queries: slice, seen: int, block: int, real_Nn: Tensor | None) -> Tensor:
    """[N, queries, seen], -inf where a query does not see a block."""
    scores = torch.bmm(q_NLd[:, queries], keys_Nnd[:, :seen].transpose(1, 2)).mul_(q_NLd.shape[2] ** -0.5)
    own_L1 = torch.arange(queries.start, queries.stop, device=scores.device).div(block, rounding_mode="floor").unsqueeze(1)
    blocks_n = torch.arange(seen, device=scores.device)
    if real_Nn is None:
        first = queries.start // block  # all of the chunk see the blocks before it
        scores[..., first:].masked_fill_(blocks_n[first:] >= own_L1, -torch.inf)
        return scores
    return scores.masked_fill_(blocks_n == own_L1, -torch.inf).masked_fill_(~real_Nn.unsqueeze(1), -torch.inf)


class _BlockScores(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, keys: Tensor, selected: int, block: int, real_Nn: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        (N, L, _), n = q.shape, keys.shape[1]
        best = q.new_full((N, L, selected), -torch.inf)
        blocks = q.new_zeros(N, L, selected, dtype=torch.int64)
        total = q.new_full((N, L), NOTHING)
        for queries, seen in _chunks(q, n, block, real_Nn is None):
            if seen:
                scores = _scores(q, keys, queries, seen, block, real_Nn)
                K = min(selected, seen)
                best[:, queries, :K], blocks[:, queries, :K] = scores.topk(K, dim=-1)
                total[:, queries] = _log_sum(scores, best[:, queries, 0])
        ctx.mark_non_differentiable(blocks)
        ctx.save_for_backward(q, keys, blocks, total, real_Nn)
        ctx.block = block
        return best, blocks, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_best: Tensor, _: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, blocks, total, real_Nn = ctx.saved_tensors
        d, n = q.shape[2], keys.shape[1]
        grad_q, grad_keys = torch.zeros_like(q), torch.zeros_like(keys)
        for queries, seen in _chunks(q, n, ctx.block, real_Nn is None):
            if seen:
                K = min(blocks.shape[2], seen)
                scores = _scores(q, keys, queries, seen, ctx.block, real_Nn)
                grad = scores.sub_(total[:, queries].unsqueeze(-1)).exp_().mul_(grad_total[:, queries].unsqueeze(-1))
                grad.scatter_add_(2, blocks[:, queries, :K], grad_best[:, queries, :K]).mul_(d**-0.5)
                grad_q[:, queries] = torch.bmm(grad, keys[:, :seen])
                grad_keys[:, :seen].baddbmm_(grad.transpose(1, 2), q[:, queries])
        return grad_q, grad_keys, None, None, None


def _log_sum(scores: Tensor, largest: Tensor) -> Tensor:
    """log of exp(NOTHING) + the sum of exp(scores) over the last axis; overwrites `scores`."""
    largest = largest.clamp(min=NOTHING)
    return scores.sub_(largest.unsqueeze(-1)).exp_().sum(-1).add_((NOTHING - largest).exp_()).log_().add_(largest)
