"""Linear attention of a few candidates to a batch of histories on a CPU: compiled_linear.py's passes over the events as one step of autograd.

B requests, C candidates, L history, D width, H heads of a layer, F features of a head, X = H · F.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrail.models.attention.compiled_layer import in_threads
from longtrail.models.attention.compiled_linear import ELU1, SOFT, backward, forward

KINDS = {"clusters": SOFT, "shares": SOFT, "elu1": ELU1}
_PART = 8  # requests whose gradients by the weights are added up in order, so that they do not depend on threads


class _Reads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keys_BLD: Tensor, weights_XD: Tensor, bias_X: Tensor | None, features_BCX: Tensor, counts_B: Tensor, kind: int, heads: int
    ) -> tuple[Tensor, Tensor]:
        (B, L, D), (_, C, X) = keys_BLD.shape, features_BCX.shape
        keys_BLD, weights_XD, features_BCX = (x.contiguous() for x in (keys_BLD, weights_XD, features_BCX))
        bias = keys_BLD.new_zeros(X) if bias_X is None else bias_X
        sizes = L, D, heads, X // heads, C, kind, int(bias_X is not None)
        reads_BCHD, norms_BCH = keys_BLD.new_zeros(B, C, heads, D), keys_BLD.new_empty(B, C, heads)
        given, counts = _flat(keys_BLD, weights_XD, bias, features_BCX), counts_B.numpy()
        keys, weights, shift, queries = given
        reads, norms = _flat(reads_BCHD, norms_BCH)
        _shared(lambda first, stop: forward(keys, counts, weights, shift, queries, sizes, first, stop, reads, norms), B)
        ctx.save_for_backward(keys_BLD, weights_XD, bias, features_BCX, counts_B)
        ctx.sizes = sizes
        return reads_BCHD, norms_BCH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reads_BCHD: Tensor, norms_BCH: Tensor) -> tuple[Tensor | None, ...]:
        keys_BLD, weights_XD, bias_X, features_BCX, counts_B = ctx.saved_tensors
        parts, sizes = -(-len(keys_BLD) // _PART), ctx.sizes
        keys_grad_BLD, features_grad_BCX = torch.empty_like(keys_BLD), torch.empty_like(features_BCX)
        weights_grad_PXD, bias_grad_PX = weights_XD.new_zeros(parts, *weights_XD.shape), bias_X.new_empty(parts, len(bias_X))
        keys, weights, bias, queries, reads, norms = _flat(
            keys_BLD, weights_XD, bias_X, features_BCX, reads_BCHD.contiguous(), norms_BCH.contiguous()
        )
        counts, found = counts_B.numpy(), _flat(keys_grad_BLD, features_grad_BCX, weights_grad_PXD, bias_grad_PX)
        _shared(lambda first, stop: backward(keys, counts, weights, bias, queries, reads, norms, sizes, _PART, first, stop, *found), parts)
        bias_grad_X = bias_grad_PX.sum(0) if sizes[-1] else None
        return keys_grad_BLD, weights_grad_PXD.sum(0), bias_grad_X, features_grad_BCX, None, None, None


def _flat(*tensors: Tensor) -> list[Any]:
    """The numbers of contiguous tensors as flat arrays of the same memory."""
    return [x.detach().view(-1).numpy() for x in tensors]


def _shared(work: Callable[[int, int], None], count: int) -> None:
    if count:
        in_threads(work, count)


def reads(
    keys_BLD: Tensor, weights_XD: Tensor, bias_X: Tensor | None, features_BCX: Tensor, counts_B: Tensor, *, kind: int, heads: int
) -> tuple[Tensor, Tensor]:
    """Σ_l w_l k_l [B, C, H, D] and Σ_l w_l [B, C, H] over each history's first `counts` events, w = φ(q) · φ(k) in each head.

    φ(q) is given, `features`; φ(k) is of x W^T, or with a bias of x W^T / |x| + b. float32 on a CPU; D is a multiple of PAIR, X of GROUP, real
    events stand first. Once differentiable.
    """
    found: tuple[Tensor, Tensor] = _Reads.apply(keys_BLD, weights_XD, bias_X, features_BCX, counts_B, kind, heads)
    return found
