"""Target attention by a small MLP over every (candidate, behaviour) pair, exactly factored.

B requests, C candidates, L history, D width, H hidden units.

The papers concatenate q, k, q - k, q * k and put the 4D numbers of each pair through a dense layer. Every such layer is linear in k once q is fixed,
z W + b = k · w(q) + b(q), so one matrix product of K [B, L, D] with w [B, C, H, D] gives the hidden layer of all candidates: neither the
history tiled to [B, C, L, D] nor the features [B, C, L, 4D] are ever built (the identity is checked in the tests).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from longtrail.models.precision import at_least_float32

Normaliser = Literal["linear", "sigmoid", "softmax", "softmax_eps"]

SOFTMAX_EPSILON = 0.01
CHUNK_BYTES = 64 << 20  # what one block of candidates may take, where no gradient is asked for
CACHE_BYTES = 1 << 20  # the same on a CPU: what stays in a core's cache; 200 candidates and 1,000 behaviours took a quarter less than in one block


def pair_hidden(keys_BLD: Tensor, weights_BCHD: Tensor, bias_BCH: Tensor) -> Tensor:
    """[B, C, H, L]: sigmoid(k_l · w_ch + b_ch) for every pair. L·C·H·D multiply-adds in one matrix product a request."""
    (B, C, H, D), L = weights_BCHD.shape, keys_BLD.shape[1]
    flat = torch.baddbmm(bias_BCH.reshape(B, C * H, 1), weights_BCHD.reshape(B, C * H, D), keys_BLD.transpose(1, 2))
    return flat.sigmoid_().view(B, C, H, L)  # in place before it is a view: after it autograd would copy the gradient, twice


def pair_dense(hidden_BCHL: Tensor, weights_OH: Tensor) -> Tensor:
    """[B, C, O, L]: a dense layer on every pair's hidden units, without the transposed copy that torch.matmul would make."""
    B, C, H, L = hidden_BCHL.shape
    return torch.bmm(weights_OH.expand(B * C, -1, -1), hidden_BCHL.reshape(B * C, H, L)).view(B, C, len(weights_OH), L)


def pair_hidden_again(hidden_BCHL: Tensor, weights_OH: Tensor, bias_O1: Tensor) -> Tensor:
    """[B, C, O, L]: sigmoid of a dense layer with a bias, on every pair's hidden units."""
    B, C, H, L = hidden_BCHL.shape
    flat = torch.baddbmm(bias_O1.expand(B * C, -1, 1), weights_OH.expand(B * C, -1, -1), hidden_BCHL.reshape(B * C, H, L))
    return flat.sigmoid_().view(B, C, len(weights_OH), L)


def candidate_blocks(candidates: int, bytes_of_one: int, *, most: int | None = None) -> list[slice]:
    """Candidates cut so that a block takes CHUNK_BYTES at most (or `most`, if less); all at once where a gradient is asked for, which would keep
    every block anyway."""
    limit = CHUNK_BYTES if most is None else min(CHUNK_BYTES, most)
    block = candidates if torch.is_grad_enabled() else min(candidates, limit // max(1, bytes_of_one))
    return [slice(start, start + max(1, block)) for start in range(0, max(1, candidates), max(1, block))]


def blockwise(score: Callable[[Tensor, Tensor], Tensor], weights_BCHD: Tensor, bias_BCH: Tensor, length: int) -> Tensor:
    """`score(weights, bias)` → [B, C, L], over blocks of candidates small enough to hold their hidden layer in CHUNK_BYTES, or a CPU's cache."""
    B, C, H, _ = weights_BCHD.shape
    most = CACHE_BYTES if weights_BCHD.device.type == "cpu" else None
    blocks = candidate_blocks(C, B * H * length * weights_BCHD.element_size(), most=most)
    if len(blocks) == 1:
        return score(weights_BCHD, bias_BCH)
    return torch.cat([score(weights_BCHD[:, block], bias_BCH[:, block]) for block in blocks], dim=1)


def normalised(scores_BCL: Tensor, mask_BL: Tensor, kind: Normaliser, scale: float = 1.0) -> Tensor:
    """Weights of `scale` times the scores, in float32 at least: exactly 0 on padding, and all 0 (neither NaN nor uniform) for an empty history.

    linear: the scores themselves; sigmoid: independent weights in (0, 1); softmax: of sum 1; softmax_eps: exp(l - max) / (Σ exp(l - max) + 0.01).
    """
    scores_BCL, padded_B1L = at_least_float32(scores_BCL) * scale, ~mask_BL.unsqueeze(1)
    if kind == "linear":
        return scores_BCL.masked_fill_(padded_B1L, 0)
    if kind == "sigmoid":
        return scores_BCL.masked_fill_(padded_B1L, -math.inf).sigmoid_()
    scores_BCL = scores_BCL.masked_fill_(padded_B1L, torch.finfo(scores_BCL.dtype).min)
    if kind == "softmax":
        return scores_BCL.softmax(-1).masked_fill(padded_B1L, 0)
    powers_BCL = (scores_BCL - scores_BCL.amax(-1, keepdim=True).detach()).exp().masked_fill(padded_B1L, 0)
    return powers_BCL / (powers_BCL.sum(-1, keepdim=True) + SOFTMAX_EPSILON)


def scores_gradient(grad_BCL: Tensor, a_BCL: Tensor, mask_BL: Tensor, kind: Normaliser) -> Tensor:
    """From a gradient by the weights to one by the scores, in place; padding gets none."""
    if kind == "linear":
        return grad_BCL.masked_fill_(~mask_BL.unsqueeze(1), 0)
    if kind == "sigmoid":
        return torch.ops.aten.sigmoid_backward(grad_BCL, a_BCL)
    return a_BCL * (grad_BCL - (a_BCL * grad_BCL).sum(-1, keepdim=True))


def pooled(weights_BCL: Tensor, keys_BLD: Tensor) -> Tensor:
    """u [B, C, D] = Σ_l a_l k_l, in float32 at least: a sum over thousands of events, all of one sign, is what half precision is worst at."""
    with torch.autocast(keys_BLD.device.type, enabled=False):
        return at_least_float32(weights_BCL) @ at_least_float32(keys_BLD)


def glorot(*shape: int, inputs: int, outputs: int) -> nn.Parameter:
    """Uniform in ±sqrt(6 / (inputs + outputs))."""
    return nn.Parameter(torch.empty(*shape).uniform_(-1, 1) * (6 / (inputs + outputs)) ** 0.5)
