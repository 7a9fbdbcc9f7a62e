"""The attention layer of fused.py for training on a CPU: compiled.py's passes over the keys as one step of autograd.

B requests, C candidates, L history, D width, H hidden units.

The keys of a batch, 64 MB at B = 256, L = 1,000, D = 64, are many times what a cache holds, so time goes by how often they and their gradient are
read and written. Here forward reads them once, and backward reads them once and adds to their gradient once; what lies between, the hidden layer
too, stays in the innermost cache and is made again rather than kept. All layers that read the same keys add to one gradient (`Shared`), where
autograd would make one each and add them up.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrail.models.attention.compiled import backward, forward
from longtrail.models.attention.fused import PairLayer
from longtrail.models.attention.pointwise import normalised, scores_gradient

_KINDS = {"linear": 1, "sigmoid": 2}  # as compiled.backward calls them; others are normalised over places: 0


class _Gradient:
    """Where the layers that read the same keys add up the keys' gradient."""

    def __init__(self) -> None:
        self._found: Tensor | None = None
        self._task = -1

    def like(self, keys_BLD: Tensor) -> tuple[Tensor, bool]:
        """What to add to, and whether it holds nothing yet in this call of autograd: an earlier call may have ended after some of the layers."""
        task = torch._C._current_graph_task_id()
        fresh = self._found is None or task != self._task
        if self._found is None or fresh:
            self._found, self._task = torch.empty_like(keys_BLD), task
        return self._found, fresh

    def taken(self) -> Tensor | None:
        """It, which is forgotten here."""
        found, self._found = self._found, None
        return found


class _Token(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys_BLD: Tensor, gradient: _Gradient) -> Tensor:
        ctx.gradient = gradient
        return keys_BLD.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.gradient.taken(), None


class Shared:
    """Keys for several layers. `token` is what autograd sees of them, so that it waits for all layers before it takes the gradient."""

    def __init__(self, keys_BLD: Tensor) -> None:
        self.keys_BLD, self.gradient = keys_BLD.detach().contiguous(), _Gradient()
        self.token: Tensor = _Token.apply(keys_BLD, self.gradient)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        keys_BLD: Tensor,
        weights_BCHD: Tensor,
        bias_BCH: Tensor,
        last_H: Tensor,
        last_bias: Tensor | None,
        mask_BL: Tensor,
        layer: PairLayer,
        gradient: _Gradient,
    ) -> tuple[Tensor, Tensor]:
        kind = _KINDS.get(layer.kind, 0)
        (B, L, D), C = keys_BLD.shape, weights_BCHD.shape[1]
        counts_B, scale = mask_BL.sum(1), layer.scale if kind else 1.0
        weights_BCHD, bias_BCH, last_H = (x.detach().contiguous() for x in (weights_BCHD, bias_BCH, last_H))
        scores_BCL, reads_BCD = keys_BLD.new_empty(B, C, L), keys_BLD.new_zeros(B, C, D)
        keys, weights, bias, scores, reads, last = _flat(keys_BLD, weights_BCHD, bias_BCH, scores_BCL, reads_BCD, last_H * scale)
        added = torch.zeros(()) if last_bias is None else last_bias.detach() * scale
        start = added.numpy()[()]

        def rows(first: int, stop: int) -> None:
            counts = counts_B[first:stop].numpy()
            forward(keys, counts, first, weights, bias, last, start, D, L, kind == 2, kind > 0, scores, reads)

        in_threads(rows, B)
        if not kind:
            scores_BCL = normalised(scores_BCL, mask_BL, layer.kind, layer.scale)
            reads_BCD = scores_BCL @ keys_BLD
        ctx.save_for_backward(keys_BLD, weights_BCHD, bias_BCH, last_H, mask_BL, scores_BCL)
        ctx.gradient, ctx.layer, ctx.has_bias = gradient, layer, last_bias is not None
        return scores_BCL, reads_BCD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCL: Tensor, read_BCD: Tensor) -> tuple[Tensor | None, ...]:
        keys_BLD, weights_BCHD, bias_BCH, last_H, mask_BL, a_BCL = ctx.saved_tensors
        kind, scale = _KINDS.get(ctx.layer.kind, 0), ctx.layer.scale
        (B, L, D), counts_B = keys_BLD.shape, mask_BL.sum(1)
        if not kind:
            by_weights = torch.baddbmm(grad_BCL, read_BCD, keys_BLD.transpose(1, 2))
            grad_BCL = scores_gradient(by_weights, a_BCL, mask_BL, ctx.layer.kind).mul_(scale)
        scale = scale if kind else 1.0
        keys_grad_BLD, fresh = ctx.gradient.like(keys_BLD)
        weights_grad_BCHD, (bias_grad_BCH, last_grad_BCH) = torch.zeros_like(weights_BCHD), torch.empty(2, *bias_BCH.shape)
        sums_BC = torch.empty(bias_BCH.shape[:2])
        given = _flat(a_BCL, read_BCD.contiguous(), grad_BCL.contiguous())
        found = _flat(keys_grad_BLD, weights_grad_BCHD, bias_grad_BCH, last_grad_BCH, sums_BC)
        keys, weights, bias, last = _flat(keys_BLD, weights_BCHD, bias_BCH, last_H * scale)

        def rows(first: int, stop: int) -> None:
            backward(keys, counts_B[first:stop].numpy(), first, weights, bias, last, D, L, *given, kind, fresh, *found)

        in_threads(rows, B)
        last_bias_grad = sums_BC.sum() * scale if ctx.has_bias else None
        last_grad_H = last_grad_BCH.sum((0, 1)) * scale
        return keys_BLD.new_zeros(()), None, weights_grad_BCHD, bias_grad_BCH, last_grad_H, last_bias_grad, None, None, None


def _flat(*tensors: Tensor) -> list[Any]:
    """The numbers of contiguous tensors as flat arrays of the same memory."""
    return [x.view(-1).numpy() for x in tensors]


def in_threads(work: Callable[[int, int], None], count: int) -> None:
    """`work(first, stop)` for all of `count` in as many parts as torch may use threads. Their results must not depend on the parts."""
    threads = max(1, min(torch.get_num_threads(), count))
    parts = list(pairwise(count * i // threads for i in range(threads + 1)))
    if threads == 1:
        work(0, count)
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work, *part) for part in parts[1:]]
        work(*parts[0])
        for other in others:
            other.result()


def attend(shared: Shared, mask_BL: Tensor, layer: PairLayer) -> tuple[Tensor, Tensor]:
    """fused.attend in float32. D is a multiple of compiled.PAIR, H of compiled.GROUP; real places stand first."""
    inputs = layer.weights_BCHD, layer.bias_BCH, layer.last_H, layer.last_bias
    a_BCL, read_BCD = _Attend.apply(shared.token, shared.keys_BLD, *inputs, mask_BL, layer, shared.gradient)
    return a_BCL, read_BCD
