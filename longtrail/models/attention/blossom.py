"""BlossomRec attention (Ma et al., WWW 2026, arXiv 2512.13368): the blocks that matter, long-term, and power-of-two distances, short-term.

B users, L history, D width, H query heads, G key/value heads, M = H / G heads a key/value head, d = D / H, N = B·G rows, n blocks, K chosen blocks.

    q, k, v = x W_q, x W_k, x W_v      q and k rotated (rope.py)
    long:   c_i = W2 relu(W1 vec(keys of window i + P) + b1) + b2      score of block i = mean over a group's heads of q · c_i / √d
            softmax(q k^T / √d) v over the best K blocks that end before the query, and its own block up to it
    short:  softmax(q k^T / √d) v over the distances 0 … window - 1 and the powers of two
    gate:   [g_long, g_short] = sigmoid(x W_g + b_g) for each head      result = W_o [g_long · long + g_short · short]

The released code's: the equations, its causal visibility, its threshold on a block's share. Neither path makes an L×L tensor; the scores of
blocks are L × L/block, made in chunks. `selector`: in the released code scores only pick blocks, so W1, b1, W2, b2 and P get no gradient and stay as
they were drawn ("frozen"): their start is the selector. "straight_through" is the switch that it leaves off: keys of a chosen block are multiplied
by 1 + p - stop(p). "compressed" is ours, after NSA: a third gated path that attends to the c_i, with the mean of each block's values and a slot
"nothing".

Ours too: what linear layers start from, the frozen selector's among them (torch's uniform numbers, biases too; the release draws N(0, 0.02) with
biases of zero), gates start at ½ (the release's effective start), a bias in W_o (its block has a second linear layer there), and the bidirectional
form, of which no code was released: every real block but the own one can be chosen, the own block is fully visible, distances count to both sides,
padding is masked everywhere. Histories are filled up with padding to whole blocks, so short ones need no special case.

On a CPU in float32, where the selector needs no gradient and 16 divides d, both paths are blossom_layer.py's: the same numbers, compiled. What is
written here is for all else, and what the tests hold that to.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtrail.config.slots import BlossomSettings
from longtrail.models.attention.block_sparse import block_sparse_attention
from longtrail.models.attention.compressed import block_means, compressed_attention
from longtrail.models.attention.rope import rotate
from longtrail.models.attention.selection import best_blocks
from longtrail.models.attention.short_term import distances, shifted_attention
from longtrail.models.masks import padding_mask

COMPILED_WIDTH = 16  # what compiled_blossom.py takes d in


class BlockKeys(nn.Module):
    """Compresses overlapping windows of keys into one key a block. Weights are shared by blocks and key/value heads; P is each head's own."""

    def __init__(self, settings: BlossomSettings, d: int) -> None:
        super().__init__()
        self.settings = settings
        inputs = settings.compression * d
        self.places = nn.Parameter(torch.zeros(settings.kv_heads, settings.compression, d))
        self.network = nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(inplace=True), nn.Linear(inputs, d))

    def forward(self, k_BGLd: Tensor, real_BL: Tensor | None) -> Tensor:
        """[B, G, n, d]: the window of block c ends at its last place and begins before it, with zeros before place 0.

        Where a block is longer than the stride it gets the mean of its (real) windows: the mean of scores is the score of the mean.
        """
        if real_BL is not None:
            k_BGLd = k_BGLd.masked_fill(~real_BL[:, None, :, None], 0)
        length, stride, each = self.settings.compression, self.settings.stride, self.settings.block // self.settings.stride
        windows = functional.pad(k_BGLd, (0, 0, length - stride, 0)).unfold(2, length, stride).transpose(3, 4)
        keys = self.network((windows + self.places.unsqueeze(1)).flatten(3)).unflatten(2, (-1, each))
        if each == 1 or real_BL is None:
            return keys.mean(3)
        real = real_BL[:, None, ::stride, None].unflatten(2, keys.shape[2:4])
        return keys.masked_fill(~real, 0).sum(3) / real.sum(3).clamp(min=1)


class BlossomAttention(nn.Module):
    """A SelfAttention. Time L·(window + log L + (K + 1)·block)·D, plus L·L/block·D/M for the scores of blocks; memory linear in L."""

    def __init__(self, settings: BlossomSettings, width: int, heads: int, *, causal: bool = True) -> None:
        """Raises ValueError where `heads` does not divide `width` into even parts, or `kv_heads` not `heads`."""
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} divided by heads {heads} is not an even number: positions rotate pairs")
        if heads % settings.kv_heads:
            raise ValueError(f"heads {heads} is not divisible by kv_heads {settings.kv_heads}")
        self.settings, self.causal, self.heads, self.d = settings, causal, heads, width // heads
        self.paths = 3 if settings.selector == "compressed" else 2
        self.inputs = nn.Linear(width, width + 2 * settings.kv_heads * self.d, bias=False)
        self.block_keys = BlockKeys(settings, self.d).requires_grad_(settings.selector != "frozen")
        self.gate = nn.Linear(width, self.paths * heads)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.output = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """[B, L, D]."""
        mixed = self._mixed_compiled if self._can_be_compiled(x_BLD) else self._mixed
        return self.output(mixed(x_BLD, lengths_B))

    def _can_be_compiled(self, x_BLD: Tensor) -> bool:
        """Whether compiled_blossom.py can make this: float32 on a CPU, of sizes that fit, and no gradient for a selector."""
        frozen = self.settings.selector == "frozen" or (self.settings.selector == "straight_through" and not torch.is_grad_enabled())
        fits = x_BLD.device.type == "cpu" and self.d % COMPILED_WIDTH == 0 and not torch.is_autocast_enabled("cpu")
        return frozen and fits and all(x.dtype == torch.float32 for x in (x_BLD, self.inputs.weight, self.gate.weight, self.block_keys.places))

    def _mixed_compiled(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        from longtrail.models.attention.blossom_layer import Layer, mixed  # numba takes half a second, and the general form does without

        keys = self.block_keys
        layer = Layer(self.settings, self.heads, causal=self.causal, places=keys.places, network=keys.network)
        return mixed(x_BLD, self.inputs.weight, self.gate(x_BLD).sigmoid(), lengths_B, layer)

    def _mixed(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """[B, L, D]: the paths, each times its gate, by torch alone."""
        B, L, _ = x_BLD.shape
        missing = -L % self.settings.block
        filled_BLD = functional.pad(x_BLD, (0, 0, 0, missing)) if missing else x_BLD
        gates = self.gate(filled_BLD).sigmoid()
        heads = self._heads(self.inputs(filled_BLD))
        with torch.autocast(x_BLD.device.type, enabled=False):  # the paths sum many small shares: never in half precision
            first, *others = self._paths(*heads, None if self.causal else lengths_B)
            shape = B, L + missing, *heads[0].shape[1:4:2], self.paths, 1
            gate, *other_gates = gates.to(first.dtype).view(shape).transpose(1, 2).flatten(0, 1).unbind(-2)
            mixed_NLMd = first * gate
            for path, gate in zip(others, other_gates, strict=True):
                mixed_NLMd = mixed_NLMd.addcmul(path, gate)
        mixed_BLD = mixed_NLMd.unflatten(0, (B, self.settings.kv_heads)).transpose(1, 2).flatten(2)
        return mixed_BLD[:, :L]

    def _heads(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, G, L, M, d], k and v [B, G, L, d], in float32 at least; q and k rotated."""
        G, wide = self.settings.kv_heads, torch.promote_types(projected.dtype, torch.float32)
        q, k, v = projected.unflatten(2, (-1, self.d)).split([self.heads, G, G], dim=2)
        q, k = rotate(q.to(wide)).unflatten(2, (G, -1)), rotate(k.to(wide))
        return q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), v.to(wide).transpose(1, 2).contiguous()

    def _paths(self, q_BGLMd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, lengths_B: Tensor | None) -> list[Tensor]:
        """Results [N, L, M, d] of the long, the short and, where there is one, the compressed path. `lengths`: bidirectional alone."""
        (_, G, L, _, _), settings = q_BGLMd.shape, self.settings
        real_BL = None if lengths_B is None else padding_mask(lengths_B, L)
        real_NL = None if real_BL is None else real_BL.repeat_interleave(G, dim=0)
        real_Nn = None if real_NL is None else real_NL[:, :: settings.block]
        with torch.set_grad_enabled(torch.is_grad_enabled() and settings.selector != "frozen"):
            keys_Nnd = self.block_keys(k_BGLd, real_BL).flatten(0, 1)
        q, k, v = q_BGLMd.flatten(0, 1), k_BGLd.flatten(0, 1), v_BGLd.flatten(0, 1)
        trained = settings.selector == "straight_through"
        group_q, keys = (x if trained else x.detach() for x in (q.mean(2), keys_Nnd))
        chosen_NLK, shares_NLK = best_blocks(group_q, keys, settings.selected, settings.block, real_Nn)
        factor = 1 + shares_NLK - shares_NLK.detach() if trained else None
        long = block_sparse_attention(q, k, v, chosen_NLK, block=settings.block, factor_NLK=factor, real_NL=real_NL)
        if real_NL is not None:
            long = long.masked_fill(~real_NL[:, :1, None, None], 0)  # an empty history reads zeros
        reach = distances(L, settings.window)
        short = shifted_attention(q, k, v, reach if self.causal else sorted({s * d for d in reach for s in (1, -1)}), real_NL)
        if settings.selector != "compressed":
            return [long, short]
        return [long, short, compressed_attention(q, keys_Nnd, block_means(v, settings.block, real_NL), real_Nn)]
