"""Blossom's two paths as one step of autograd on a CPU, by the passes of compiled_blossom.py, from the input to what the output matrix takes.

B users, L places, D width, H query heads, G key/value heads, d head width, W = (H + 2G) · d, n blocks, K chosen blocks.

Kept for backward: the rotated q, k and v, the gates and the numbers of the chosen blocks, some 2 · D + K numbers a place. Neither path's result, no
weights, no log-sums. Blocks that no real query can choose get no key, and padded places nothing at all: zeros.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from longtrail.config.slots import BlossomSettings
from longtrail.models.attention.compiled_blossom import backward, forward, turned, windows
from longtrail.models.attention.compiled_layer import in_threads
from longtrail.models.attention.rope import THETA, turns
from longtrail.models.attention.short_term import distances
from longtrail.models.attention.vector_code import LANES

WINDOWS = 128  # whose keys are made at once: 1 MB of inputs and hidden units at the default sizes
LEAST_PLACES = 1024  # of a batch, from which on several threads share it


class Layer:
    """The sizes of a call, and what is not learnt in it."""

    def __init__(self, settings: BlossomSettings, heads: int, *, causal: bool, places: Tensor, network: nn.Module) -> None:
        """`places` [G, l, d] and `network` make block keys."""
        self.settings, self.heads, self.causal, self.network = settings, heads, causal, network
        self.places = places.detach().contiguous()
        self.width = places.shape[2]

    def sizes(self, L: int) -> tuple[int, ...]:
        """As compiled_blossom.py takes them."""
        s = self.settings
        return L, self.heads, s.kv_heads, self.width, s.block, s.selected, int(self.causal)

    def shifts(self, L: int) -> np.ndarray:
        reach = distances(L, self.settings.window)
        return np.array(reach if self.causal else sorted({sign * distance for distance in reach for sign in (1, -1)}), np.int64)

    def block_keys(self, rows_BLW: Tensor, counts_B: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Keys [·, d] of each user's first `seen` blocks, group by group, and room behind them; `seen` [B]; the first of each user's rows [B]."""
        s, each = self.settings, self.settings.block // self.settings.stride
        seen_B = np.maximum(counts_B - 1, 0) // s.block if self.causal else np.where(counts_B > s.block, -(-counts_B // s.block), 0)
        rows_B = seen_B * s.kv_heads * each
        firsts_B = np.cumsum(rows_B) - rows_B
        user_R = np.repeat(np.arange(len(rows_B)), rows_B)
        group_R, number_R = np.divmod(np.arange(len(user_R)) - firsts_B[user_R], np.maximum(seen_B * each, 1)[user_R])
        keys_Rd = rows_BLW.new_empty(len(user_R), self.width)
        rows, sizes, inputs = _flat(rows_BLW), self.sizes(rows_BLW.shape[1]), rows_BLW.new_empty(min(WINDOWS, len(user_R)), self.places[0].numel())
        for start in range(0, len(user_R), WINDOWS):
            part = slice(start, start + WINDOWS)
            given = user_R[part], group_R[part], number_R[part]
            windows(rows, counts_B, *given, sizes, s.stride, _flat(self.places), _flat(inputs))
            keys_Rd[part] = self.network(inputs[: len(given[0])])
        if each > 1:  # the mean of a block's (real) windows
            real = torch.from_numpy(number_R * s.stride < counts_B[user_R]).view(-1, each, 1)
            keys_Rd = keys_Rd.view(-1, each, self.width).masked_fill(~real, 0).sum(1) / real.sum(1)
        return functional.pad(keys_Rd, (0, 0, 0, LANES)), seen_B, firsts_B // each


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, weight_WD: Tensor, gates_BLC: Tensor, lengths_B: Tensor, layer: Layer) -> Tensor:
        (B, L, _), s = x_BLD.shape, layer.settings
        counts_B, sizes, gates_BLC = lengths_B.clamp(max=L).numpy().astype(np.int64), layer.sizes(L), gates_BLC.contiguous()
        rows_BLW = functional.linear(x_BLD, weight_WD).contiguous()
        _turn(rows_BLW, counts_B, sizes, layer.width, 1)
        keys_Rd, seen_B, firsts_B = layer.block_keys(rows_BLW, counts_B)
        kept = any(ctx.needs_input_grad)
        chosen = torch.empty((B, L, s.kv_heads, s.selected), dtype=torch.int32) if kept else None
        out_BLD = x_BLD.new_zeros(B, L, layer.heads * layer.width)
        rows, gates, keys, out = (_flat(x) for x in (rows_BLW, gates_BLC, keys_Rd, out_BLD))

        def work(first: int, stop: int) -> None:
            found = np.empty(s.selected, np.int32) if chosen is None else _flat(chosen)
            forward(rows, counts_B, gates, keys, seen_B, firsts_B, layer.shifts(L), sizes, first, stop, out, found, kept)

        _shared(work, B * -(-L // s.block), B * L)
        ctx.save_for_backward(x_BLD, weight_WD, gates_BLC, rows_BLW, chosen)
        ctx.layer, ctx.counts_B = layer, counts_B
        return out_BLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, weight_WD, gates_BLC, rows_BLW, chosen = ctx.saved_tensors
        layer, counts_B, (B, L, _) = ctx.layer, ctx.counts_B, rows_BLW.shape
        sizes, rows_grad_BLW, gates_grad_BLC = layer.sizes(L), torch.zeros_like(rows_BLW), torch.zeros_like(gates_BLC)
        given = [_flat(x) for x in (rows_BLW, gates_BLC, chosen, grad_BLD.contiguous())]
        found = [_flat(x) for x in (rows_grad_BLW, gates_grad_BLC)]

        def work(first: int, stop: int) -> None:
            rows, gates, blocks, grad = given
            backward(rows, counts_B, gates, blocks, layer.shifts(L), sizes, first, stop, grad, *found)

        _shared(work, B * layer.settings.kv_heads, B * L)
        _turn(rows_grad_BLW, counts_B, sizes, layer.width, -1)
        weight_grad_WD = rows_grad_BLW.flatten(0, 1).T @ x_BLD.flatten(0, 1)
        return rows_grad_BLW @ weight_WD, weight_grad_WD, gates_grad_BLC, None, None


def _turn(rows_BLW: Tensor, counts_B: np.ndarray, sizes: tuple[int, ...], width: int, sign: int) -> None:
    """Rotates q and k of all real places in place, or back."""
    B, L, _ = rows_BLW.shape
    angles = _flat(torch.view_as_real(turns(L, width, THETA, torch.complex64, rows_BLW.device)))
    rows = _flat(rows_BLW)
    _shared(lambda first, stop: turned(rows, angles, counts_B, first, stop, sizes, np.float32(sign)), B, B * L)


def _flat(x: Tensor) -> Any:
    """The numbers of a contiguous tensor as a flat array of the same memory."""
    return x.detach().view(-1).numpy()


def _shared(work: Callable[[int, int], None], count: int, places: int) -> None:
    """`work(first, stop)` for all of `count`, by threads where there is enough of it."""
    if places < LEAST_PLACES:
        work(0, count)
    else:
        in_threads(work, count)


def mixed(x_BLD: Tensor, weight_WD: Tensor, gates_BLC: Tensor, lengths_B: Tensor, layer: Layer) -> Tensor:
    """[B, L, D]: gate · long + gate · short of x [B, L, D], the projection's `weight` [W, D] and gates [B, L, 2H], all float32 on a CPU.

    d is a multiple of 16. Zeros in padded places. Once differentiable, but for block keys, which get no gradient.
    """
    out: Tensor = _Mixed.apply(x_BLD, weight_WD, gates_BLC, lengths_B, layer)
    return out
