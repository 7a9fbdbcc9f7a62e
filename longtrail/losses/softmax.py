"""The full softmax over the catalogue, with its gradient taken in the same pass. T targets (real places only, of any user), D width, N items.

Plain cross-entropy writes logits [T, N], reads them for the softmax, keeps them, and comes back for the gradient: gigabytes at
T = 25,000, N = 3,416. Here a block of targets at a time is scored, turned into probabilities in place, and used at once for both gradients

    d/d state = (softmax - onehot) · items        d/d items = (softmax - onehot)ᵀ · states

so that the logits of a block never leave the cache and nothing of size N is kept a target. Three matrix products, as in plain training; the
trick is known from fused cross-entropy kernels on GPUs; the form is ours.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrail.models.precision import at_least_float32, product_dtype

BLOCK_ROWS = 256  # targets of a block, for each thread of a CPU: matrix products are at full speed, and 3,416 items make 3.5 MB
MAX_LOGITS = 1 << 25  # of a block, on any device: 128 MB in float32


def softmax_loss(states_TD: Tensor, items_ND: Tensor, targets_T: Tensor) -> Tensor:
    """Mean of -log softmax(⟨state, item_1..N⟩)[target] over the whole catalogue; `items_ND` is [N + 1, D], row 0 is padding and no choice.

    Under autocast the matrix products are in half precision, softmax and sums in float32. Differentiable once.
    """
    if len(targets_T) == 0:
        return at_least_float32(states_TD).sum() * 0
    loss: Tensor = _Softmax.apply(states_TD, items_ND, targets_T)  # type: ignore[no-untyped-call]
    return loss


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_TD: Tensor, items_ND: Tensor, targets_T: Tensor) -> Tensor:
        dtype, keep = product_dtype(states_TD), ctx.needs_input_grad[:2]
        states, items = states_TD.detach().to(dtype), items_ND.detach()[1:].to(dtype)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        by_state = torch.empty(states.shape, dtype=exact, device=states.device) if keep[0] else None
        by_item = torch.zeros(items_ND.shape, dtype=exact, device=states.device) if keep[1] else None
        (T, N), total = (len(states), len(items)), torch.zeros((), dtype=exact, device=states.device)
        rows = max(1, min(MAX_LOGITS // N, BLOCK_ROWS * torch.get_num_threads() if states.device.type == "cpu" else T))
        room = torch.empty(min(rows, T), N, dtype=dtype, device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, T, rows):  # over blocks, not over targets
                block, own = states[start : start + rows], targets_T[start : start + rows, None] - 1
                p = torch.mm(block, items.T, out=room[: len(block)]).to(exact)
                total += _to_probabilities(p, own)
                p.scatter_add_(1, own, p.new_full((1, 1), -1).expand(own.shape))
                p = p.to(dtype)
                if by_state is not None:
                    by_state[start : start + rows] = p @ items
                if by_item is not None and dtype == exact:
                    by_item[1:].addmm_(p.T, block)
                elif by_item is not None:
                    by_item[1:] += p.T @ block
        ctx.gradients, ctx.dtypes, ctx.targets = (by_state, by_item), (states_TD.dtype, items_ND.dtype), T
        return total / T

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        scale = gradient / ctx.targets
        by_state, by_item = (None if g is None else (g * scale).to(dtype) for g, dtype in zip(ctx.gradients, ctx.dtypes, strict=True))
        return by_state, by_item, None


def _to_probabilities(logits_tN: Tensor, own_t1: Tensor) -> Tensor:
    """Sum of -log softmax at `own`; the logits become softmax(logits) in place."""
    own_logit, highest = logits_tN.gather(1, own_t1), logits_tN.amax(1, keepdim=True)
    torch.softmax(logits_tN, dim=1, out=logits_tN)
    # log Σ e^l = max l - log max p: one exponential a logit, and max p is at least 1 / N, so its logarithm is exact where that of a small p is not.
    return (highest - logits_tN.amax(1, keepdim=True).log() - own_logit).sum()
