"""Attention to a few fixed distances: each is one shifted, element-wise pass over the history, so no place is gathered and no mask is made.

N rows (users × key/value heads), L places, M query heads of a key/value head, d head width, S shifts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 17  # of queries at once: their passes then stay in a core's cache


def distances(places: int, window: int) -> list[int]:
    """0 … window - 1 and the powers of two, below `places`: the rule of BlossomRec's code (the paper's figure shows 2^n - 1)."""
    powers = [1 << n for n in range(places.bit_length()) if 1 << n >= window]
    return [distance for distance in (*range(window), *powers) if distance < places]


def shifted_attention(q_NLMd: Tensor, k_NLd: Tensor, v_NLd: Tensor, shifts: list[int], real_NL: Tensor | None = None) -> Tensor:
    """[N, L, M, d]: place t attends to the places t - shift that exist (and are `real`), softmax(q · k / √d); zeros where there is none.

    S·L·M·d multiply-adds; memory linear in L: the weights [S, N, L, M] are what the backward pass keeps.
    """
    out: Tensor = _Shifted.apply(q_NLMd, k_NLd, v_NLd, tuple(shifts), real_NL)
    return out


def _slices(shift: int, places: int) -> tuple[slice, slice]:
    """Queries and the keys `shift` places before them."""
    return slice(max(shift, 0), places + min(shift, 0)), slice(max(-shift, 0), places - max(shift, 0))


def _weights(q: Tensor, k: Tensor, shifts: tuple[int, ...], real_NL: Tensor | None) -> Tensor:
    N, L, M, d = q.shape
    scores_SNLM = q.new_full((len(shifts), N, L, M), -torch.inf)
    for scores_NLM, shift in zip(scores_SNLM, shifts, strict=True):
        queries, keys = _slices(shift, L)
        torch.sum(q[:, queries] * k[:, keys].unsqueeze(2), -1, out=scores_NLM[:, queries])
        if real_NL is not None:
            scores_NLM[:, queries].masked_fill_(~real_NL[:, keys].unsqueeze(2), -torch.inf)
    scores_SNLM *= d**-0.5
    largest = scores_SNLM.amax(0).clamp_(min=torch.finfo(q.dtype).min)  # finite, so that a place without keys gets weights of zero, not NaN
    weights = scores_SNLM.sub_(largest).exp_()
    return weights.div_(weights.sum(0).clamp_(min=torch.finfo(q.dtype).tiny))


class _Shifted(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, shifts: tuple[int, ...], real_NL: Tensor | None) -> Tensor:
        out = torch.zeros_like(q)
        kept = q.new_empty(len(shifts), *q.shape[:3]) if any(ctx.needs_input_grad) else None
        for rows in _chunks(q):
            weights_SNLM = _weights(q[rows], k[rows], shifts, None if real_NL is None else real_NL[rows])
            for weights_NLM, shift in zip(weights_SNLM, shifts, strict=True):
                queries, keys = _slices(shift, q.shape[1])
                out[rows, queries].addcmul_(weights_NLM[:, queries].unsqueeze(-1), v[rows, keys].unsqueeze(2))
            if kept is not None:
                kept[:, rows] = weights_SNLM
        ctx.shifts = shifts
        ctx.save_for_backward(q, k, v, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, kept = ctx.saved_tensors
        grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows in _chunks(q):
            _backward((q[rows], k[rows], v[rows]), grad_out[rows], kept[:, rows], ctx.shifts, tuple(grad[rows] for grad in grads))
        return *grads, None, None


def _backward(inputs: tuple[Tensor, ...], grad_out: Tensor, weights_SNLM: Tensor, shifts: tuple[int, ...], grads: tuple[Tensor, ...]) -> None:
    """Adds to the gradients of q, k and v in place."""
    (q, k, v), (grad_q, grad_k, grad_v) = inputs, grads
    L, d = q.shape[1], q.shape[3]
    grad_scores = torch.zeros_like(weights_SNLM)
    for i, shift in enumerate(shifts):
        queries, keys = _slices(shift, L)
        torch.sum(grad_out[:, queries] * v[:, keys].unsqueeze(2), -1, out=grad_scores[i, :, queries])
        grad_v[:, keys] += (weights_SNLM[i, :, queries].unsqueeze(-1) * grad_out[:, queries]).sum(2)
    grad_scores -= (weights_SNLM * grad_scores).sum(0)
    grad_scores *= weights_SNLM
    grad_scores *= d**-0.5
    for i, shift in enumerate(shifts):
        queries, keys = _slices(shift, L)
        weights_NLM1 = grad_scores[i, :, queries].unsqueeze(-1)
        grad_q[:, queries].addcmul_(weights_NLM1, k[:, keys].unsqueeze(2))
        grad_k[:, keys] += (weights_NLM1 * q[:, queries]).sum(2)


def _chunks(q_NLMd: Tensor) -> list[slice]:
    """Rows in slices of about CHUNK_ELEMENTS on a CPU, all at once elsewhere."""
    N = len(q_NLMd)
    step = max(1, CHUNK_ELEMENTS // max(1, q_NLMd[0].numel())) if q_NLMd.device.type == "cpu" and N else max(1, N)
    return [slice(start, min(start + step, N)) for start in range(0, N, step)]
