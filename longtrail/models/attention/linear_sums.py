"""The sums over a history that linear attention (linear.py) keeps, as one step of autograd. B users, L history, D width, X features of all heads."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrail.models.attention.feature_maps import inner, over_length

BLOCK = 1 << 13  # behaviours projected at once: what is made of them stays in a core's cache


class Sums(torch.autograd.Function):
    """Σ w φ(s W) sᵀ [B, X, D] and Σ w φ(s W) [B, X] over the real s, X = G · F, in blocks of users whose features stay in a core's cache.

    With a bias, φ(s W / |s| + b) in place of φ(s W). Padding is masked after φ, which is not zero there: by s = 0 in the first sum, by the mask in
    the second. Backward adds the gradients of s up in place. Where its gradient follows from φ (`slopes`), features are kept, a share X / D of the
    inputs' memory; otherwise backward makes them again, block by block: autograd's own way kept every step of φ and moved twice the memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        keys_BLD: Tensor,
        weights_DX: Tensor,
        bias_X: Tensor | None,
        mask_BL: Tensor,
        days_BL: Tensor,
        rates_G: Tensor | None,
        features: Callable[..., Tensor],
        slopes: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        sums_BXD = keys_BLD.new_empty(len(keys_BLD), weights_DX.shape[1], keys_BLD.shape[2])
        norms_BX = keys_BLD.new_empty(sums_BXD.shape[:2])
        kept_BLX = None if slopes is None else keys_BLD.new_empty(*keys_BLD.shape[:2], weights_DX.shape[1])
        for rows in _blocks(keys_BLD):
            features_BLX = features(inner(keys_BLD[rows], weights_DX, bias_X), days_BL[rows], rates_G)
            torch.bmm(features_BLX.transpose(1, 2), keys_BLD[rows], out=sums_BXD[rows])
            torch.bmm(mask_BL[rows].unsqueeze(1).to(keys_BLD.dtype), features_BLX, out=norms_BX[rows].unsqueeze(1))
            if kept_BLX is not None:
                kept_BLX[rows] = features_BLX
        ctx.save_for_backward(keys_BLD, weights_DX, bias_X, mask_BL, days_BL, rates_G, kept_BLX)
        ctx.features, ctx.slopes = features, slopes
        return sums_BXD, norms_BX

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, sums_BXD: Tensor, norms_BX: Tensor) -> Any:
        with torch.autocast(sums_BXD.device.type, enabled=False):  # which is on where a caller's backward stands within it
            return _backward(ctx, sums_BXD, norms_BX)


def _backward(ctx: Any, sums_BXD: Tensor, norms_BX: Tensor) -> Any:
    keys_BLD, weights_DX, bias_X, mask_BL, days_BL, rates_G, kept_BLX = ctx.saved_tensors
    keys_grad_BLD = torch.empty_like(keys_BLD, memory_format=torch.contiguous_format)  # in other strides `flatten` would be a copy
    weights_grad_XD = torch.zeros_like(weights_DX.T, memory_format=torch.contiguous_format)
    rates_grad_G = None if rates_G is None else torch.zeros_like(rates_G)
    bias_grad_X = None if bias_X is None else torch.zeros_like(bias_X)
    for rows in _blocks(keys_BLD):
        grad_BLX = (mask_BL[rows].unsqueeze(-1) * norms_BX[rows].unsqueeze(1)).baddbmm_(keys_BLD[rows], sums_BXD[rows].transpose(1, 2))
        if kept_BLX is not None:
            features_BLX = kept_BLX[rows]
            grad_BLX = ctx.slopes(features_BLX, grad_BLX)
        else:
            inner_BLX = inner(keys_BLD[rows], weights_DX, bias_X).requires_grad_()
            rates = None if rates_G is None else rates_G.detach().requires_grad_()
            with torch.enable_grad():
                features_BLX = ctx.features(inner_BLX, days_BL[rows], rates)
            grad_BLX, *rest = torch.autograd.grad(features_BLX, [inner_BLX] if rates is None else [inner_BLX, rates], grad_BLX)
            if rates_grad_G is not None:
                rates_grad_G += rest[0]
        torch.bmm(features_BLX.detach(), sums_BXD[rows], out=keys_grad_BLD[rows])
        if bias_grad_X is None:
            keys_grad_BLD[rows].flatten(0, 1).addmm_(grad_BLX.flatten(0, 1), weights_DX.T)
        else:
            bias_grad_X += grad_BLX.sum((0, 1))
            over_BL1 = over_length(keys_BLD[rows])
            grad_BLX = grad_BLX * over_BL1
            directions_BLD = grad_BLX @ weights_DX.T  # by s / |s|, over |s|: what of it points along s changes nothing
            along_BL1 = (directions_BLD * keys_BLD[rows]).sum(-1, keepdim=True) * over_BL1.square()
            keys_grad_BLD[rows].add_(directions_BLD).addcmul_(keys_BLD[rows], along_BL1, value=-1)
        weights_grad_XD.addmm_(grad_BLX.flatten(0, 1).T, keys_BLD[rows].flatten(0, 1))
    return keys_grad_BLD, weights_grad_XD.T, bias_grad_X, None, None, rates_grad_G, None, None


def _blocks(keys_BLD: Tensor) -> list[slice]:
    """Users whose behaviours together are about BLOCK; on a GPU all of them at once."""
    B, L, _ = keys_BLD.shape
    rows = max(1, (BLOCK if keys_BLD.device.type == "cpu" else B * L) // max(1, L))
    return [slice(start, start + rows) for start in range(0, B, rows)]
