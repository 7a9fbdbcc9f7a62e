"""One hidden layer of attention and the sum it weighs, with a backward pass of its own.

B requests, C candidates, L history, D width, H hidden units, G = C·H.

The same function of the same numbers as its parts in pointwise.py, which the tests hold it to. Autograd's backward of the parts makes two gradients
of K [B, L, D] a call, one of them transposed, and adds them up; here one matrix product over H + 1 rows makes their sum. With L = 1,000 that was a
quarter of SAM's step on a CPU.

On a CPU, batches that are large enough are trained by compiled_layer.py, and what scores one request within `serving()` is compiled.py's: the same
function again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrail.models.attention.pointwise import Normaliser, blockwise, normalised, pair_dense, pair_hidden, pooled, scores_gradient

COMPILED_WIDTH, COMPILED_UNITS = 32, 4  # what compiled.py takes D and H in
COMPILED_PAIRS = 1 << 15  # of candidate and place, from which on a batch is trained by it

_compiled = ContextVar("compiled", default=False)


class PairLayer(NamedTuple):
    """a = normalised(scale · (last · sigmoid(K w + b) + last_bias)), the first layer factored as pointwise.py says."""

    weights_BCHD: Tensor
    bias_BCH: Tensor
    last_H: Tensor
    last_bias: Tensor | None  # None where the normaliser takes it away again
    kind: Normaliser
    scale: float = 1.0


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        keys_BLD: Tensor,
        weights_BCHD: Tensor,
        bias_BCH: Tensor,
        last_H: Tensor,
        last_bias: Tensor | None,
        mask_BL: Tensor,
        layer: PairLayer,
    ) -> tuple[Tensor, Tensor]:
        hidden_BCHL = pair_hidden(keys_BLD, weights_BCHD, bias_BCH)
        scores_BCL = pair_dense(hidden_BCHL, last_H.unsqueeze(0)).squeeze(2)
        a_BCL = normalised(scores_BCL if last_bias is None else scores_BCL.add_(last_bias), mask_BL, layer.kind, layer.scale)
        ctx.save_for_backward(keys_BLD, weights_BCHD, last_H, hidden_BCHL, a_BCL, mask_BL)
        ctx.kind, ctx.scale, ctx.has_bias = layer.kind, layer.scale, last_bias is not None
        return a_BCL, a_BCL @ keys_BLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCL: Tensor, read_BCD: Tensor) -> tuple[Tensor | None, ...]:
        keys_BLD, weights_BCHD, last_H, hidden_BCHL, a_BCL, mask_BL = ctx.saved_tensors
        (B, C, H, D), L = weights_BCHD.shape, keys_BLD.shape[1]
        scores_BCL = scores_gradient(torch.baddbmm(grad_BCL, read_BCD, keys_BLD.transpose(1, 2)), a_BCL, mask_BL, ctx.kind).mul_(ctx.scale)
        last_grad_H = torch.bmm(hidden_BCHL.view(B * C, H, L), scores_BCL.view(B * C, L, 1)).sum((0, 2))
        rows_BRL = keys_BLD.new_empty(B, C * H + C, L)  # those of the hidden layer, then those of the weights
        inner_BCHL = torch.ops.aten.sigmoid_backward(scores_BCL.unsqueeze(2) * last_H.unsqueeze(-1), hidden_BCHL)
        rows_BRL[:, : C * H] = inner_BCHL.view(B, C * H, L)
        rows_BRL[:, C * H :] = a_BCL
        keys_grad_BLD = torch.bmm(rows_BRL.transpose(1, 2), torch.cat([weights_BCHD.reshape(B, C * H, D), read_BCD], dim=1))
        weights_grad_BCHD = torch.bmm(inner_BCHL.view(B, C * H, L), keys_BLD).view(B, C, H, D)
        last_bias_grad = scores_BCL.sum() if ctx.has_bias else None
        return keys_grad_BLD, weights_grad_BCHD, inner_BCHL.sum(-1), last_grad_H, last_bias_grad, None, None


@contextmanager
def serving() -> Iterator[None]:
    """Score by what is compiled, where it applies. The first call compiles: seconds, or less where numba has kept it on disk."""
    token = _compiled.set(True)
    try:
        yield
    finally:
        _compiled.reset(token)


def attention_weights(keys_BLD: Tensor, mask_BL: Tensor, layer: PairLayer) -> Tensor:
    """a [B, C, L]."""
    if _compiled.get() and len(keys_BLD) == 1 and _plain(keys_BLD, layer.weights_BCHD):
        return _compiled_weights(keys_BLD, mask_BL, layer)

    def score(weights: Tensor, bias: Tensor) -> Tensor:
        return pair_dense(pair_hidden(keys_BLD, weights, bias), layer.last_H.unsqueeze(0)).squeeze(2)

    scores_BCL = blockwise(score, layer.weights_BCHD, layer.bias_BCH, keys_BLD.shape[1])
    return normalised(scores_BCL if layer.last_bias is None else scores_BCL.add_(layer.last_bias), mask_BL, layer.kind, layer.scale)


def _plain(*tensors: Tensor) -> bool:
    """Whether these are numbers on a CPU, to be used as they stand."""
    return torch.is_inference_mode_enabled() and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)


def _compiled_weights(keys_1LD: Tensor, mask_1L: Tensor, layer: PairLayer) -> Tensor:
    """attention_weights of one request."""
    from longtrail.models.attention.compiled import pair_scores  # numba takes half a second, and training does without

    squashed, last_H = layer.kind == "sigmoid", layer.last_H
    last_bias = 0.0 if layer.last_bias is None else layer.last_bias.item()
    if squashed and layer.scale != 1:
        last_H, last_bias = last_H * layer.scale, last_bias * layer.scale
    keys_LD, weights_CHD, bias_CH = (x[0].numpy() for x in (keys_1LD, layer.weights_BCHD, layer.bias_BCH))
    scores_CL = pair_scores(keys_LD, int(mask_1L.sum()), weights_CHD, bias_CH, last_H.numpy(), last_bias, squashed=squashed)
    scores_1CL = torch.from_numpy(scores_CL).unsqueeze(0)
    return scores_1CL if squashed else normalised(scores_1CL, mask_1L, layer.kind, layer.scale)


class SharedKeys:
    """Keys that several layers read: what is compiled adds all of their gradients up in one place."""

    def __init__(self, keys_BLD: Tensor) -> None:
        self.keys_BLD = keys_BLD
        self._shared: Any = None

    def compiled(self) -> Any:
        """Of compiled_layer.py."""
        if self._shared is None:
            from longtrail.models.attention.compiled_layer import Shared  # numba takes half a second, and small batches do without

            self._shared = Shared(self.keys_BLD)
        return self._shared


def attend(keys: Tensor | SharedKeys, mask_BL: Tensor, layer: PairLayer) -> tuple[Tensor, Tensor]:
    """a [B, C, L] and u = Σ_l a_l k_l [B, C, D], both in float32 at least. Once differentiable where no autocast is on. Real places stand first."""
    shared = keys if isinstance(keys, SharedKeys) else SharedKeys(keys)
    keys_BLD = shared.keys_BLD
    if torch.is_grad_enabled() and not torch.is_autocast_enabled(keys_BLD.device.type):
        if _worth_compiling(keys_BLD, layer):
            from longtrail.models.attention.compiled_layer import attend as compiled

            return compiled(shared.compiled(), mask_BL, layer)
        return _Attend.apply(keys_BLD, layer.weights_BCHD, layer.bias_BCH, layer.last_H, layer.last_bias, mask_BL, layer)
    a_BCL = attention_weights(keys_BLD, mask_BL, layer)
    return a_BCL, pooled(a_BCL, keys_BLD)


def _worth_compiling(keys_BLD: Tensor, layer: PairLayer) -> bool:
    """Whether compiled_layer.py can train this, and the batch is large enough for what loading it costs."""
    (_, C, H, D), plain = layer.weights_BCHD.shape, keys_BLD.device.type == "cpu"
    fits = plain and D % COMPILED_WIDTH == 0 and H % COMPILED_UNITS == 0 and keys_BLD.shape[0] * keys_BLD.shape[1] * C >= COMPILED_PAIRS
    return fits and all(x.dtype == torch.float32 for x in (keys_BLD, layer.weights_BCHD, layer.bias_BCH, layer.last_H))
