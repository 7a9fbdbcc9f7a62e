"""Target attention by a small MLP over every (candidate, behaviour) pair, exactly factored.

B requests, C candidates, L history, D width, H hidden units.

The papers concatenate q, k, q - k, q * k and put the 4D numbers of each pair through a dense layer. Every such layer is linear in k once q is fixed,
z W + b = k · w(q) + b(q), so one matrix product of K [B, L, D] with w [B, C, H, D] gives the hidden layer of all candidates: neither the
history tiled to [B, C, L, D] nor the features [B, C, L, 4D] are ever built (the identity is checked in the tests).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

CHUNK_BYTES = 64 << 20  # hidden layer of one block of candidates, where no gradient is asked for


def pair_hidden(keys_BLD: Tensor, weights_BCHD: Tensor, bias_BCH: Tensor) -> Tensor:
    """[B, C, H, L]: k_l · w_ch + b_ch for every pair. L·C·H·D multiply-adds in one matrix product a request."""
    (B, C, H, D), L = weights_BCHD.shape, keys_BLD.shape[1]
    flat = torch.baddbmm(bias_BCH.reshape(B, C * H, 1), weights_BCHD.reshape(B, C * H, D), keys_BLD.transpose(1, 2))
    return flat.view(B, C, H, L)


def pair_dense(hidden_BCHL: Tensor, weights_OH: Tensor) -> Tensor:
    """[B, C, O, L]: a dense layer on every pair's hidden units, without the transposed copy that torch.matmul would make."""
    B, C, H, L = hidden_BCHL.shape
    return torch.bmm(weights_OH.expand(B * C, -1, -1), hidden_BCHL.reshape(B * C, H, L)).view(B, C, -1, L)


def blockwise(score: Callable[[Tensor, Tensor], Tensor], weights_BCHD: Tensor, bias_BCH: Tensor, length: int) -> Tensor:
    """`score(weights, bias)` → [B, C, L], over blocks of candidates small enough to hold their hidden layer in CHUNK_BYTES."""
    B, C, H, _ = weights_BCHD.shape
    block = max(1, CHUNK_BYTES // max(1, B * H * length * weights_BCHD.element_size()))
    if torch.is_grad_enabled() or block >= C:
        return score(weights_BCHD, bias_BCH)
    blocks = zip(weights_BCHD.split(block, dim=1), bias_BCH.split(block, dim=1), strict=True)
    return torch.cat([score(weights, bias) for weights, bias in blocks], dim=1)


def glorot(*shape: int, inputs: int, outputs: int) -> nn.Parameter:
    """Uniform in ±sqrt(6 / (inputs + outputs))."""
    return nn.Parameter(torch.empty(*shape).uniform_(-1, 1) * (6 / (inputs + outputs)) ** 0.5)
