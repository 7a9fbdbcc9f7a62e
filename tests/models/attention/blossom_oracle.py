"""Blossom attention as its equations are written: dense, one history at a time, place by place. Shares no code with the fast one.

L places, n of them real, H heads, G key/value heads, d head width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longtrail.models.attention.blossom import BlossomAttention


@dataclass
class Parts:
    """What the paths gave and, for each key/value head, which keys the long one allowed; `margin`: how clearly the last block was chosen."""

    long_HLd: Tensor
    short_HLd: Tensor
    compressed_HLd: Tensor
    allowed_GLL: Tensor
    margin: float
    output_LD: Tensor


def turned(x_Ld: Tensor, offset: int = 0) -> Tensor:
    """(x0, x1) → (x0 cos a - x1 sin a, x0 sin a + x1 cos a), pair by pair."""
    L, d = x_Ld.shape
    rows = []
    for t in range(L):
        row = []
        for j in range(d // 2):
            a = (t + offset) * 10_000.0 ** (-2 * j / d)
            x0, x1 = x_Ld[t, 2 * j], x_Ld[t, 2 * j + 1]
            row += [x0 * math.cos(a) - x1 * math.sin(a), x0 * math.sin(a) + x1 * math.cos(a)]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def dense(q_Ld: Tensor, k_Ld: Tensor, v_Ld: Tensor, mask_LL: Tensor, factor_LL: Tensor | float = 1.0) -> Tensor:
    """Softmax attention under an explicit mask; zeros for a row without keys."""
    scores = q_Ld @ k_Ld.T / math.sqrt(q_Ld.shape[1]) * factor_LL
    some = mask_LL.any(1)
    weights = scores[some].masked_fill(~mask_LL[some], -torch.inf).softmax(1)
    return torch.zeros(len(q_Ld), v_Ld.shape[1], dtype=v_Ld.dtype).masked_scatter(some.unsqueeze(1), weights @ v_Ld)


def short_mask(L: int, window: int, *, causal: bool) -> Tensor:
    mask = torch.zeros(L, L, dtype=torch.bool)
    for t in range(L):
        for j in range(L):
            distance = t - j if causal else abs(t - j)
            mask[t, j] = distance >= 0 and (distance < window or (distance > 0 and math.log2(distance).is_integer()))
    return mask


def blossom(layer: BlossomAttention, x_LD: Tensor) -> Parts:
    """The n real places of one history, n ≥ 1."""
    s = layer.settings
    n, D = x_LD.shape
    H, G, d = layer.heads, s.kv_heads, D // layer.heads
    filled = torch.cat([x_LD, x_LD.new_zeros(-n % s.block, D)])
    L = len(filled)
    real = torch.arange(L) < n
    qkv = filled @ layer.inputs.weight.T
    q = torch.stack([turned(qkv[:, h * d : (h + 1) * d]) for h in range(H)])
    k = torch.stack([turned(qkv[:, (H + g) * d : (H + g + 1) * d]) for g in range(G)])
    v = torch.stack([qkv[:, (H + G + g) * d : (H + G + g + 1) * d] for g in range(G)])
    allowed = torch.zeros(G, L, L, dtype=torch.bool)
    long, short, compressed, margin = [], [], [], math.inf
    near = short_mask(L, s.window, causal=layer.causal) & real
    for g in range(G):
        heads = range(g * (H // G), (g + 1) * (H // G))
        keys = torch.stack(block_keys(layer, g, k[g] * real.unsqueeze(1), n))
        means = torch.stack([v[g, c * s.block : (c + 1) * s.block][real[c * s.block : (c + 1) * s.block]].sum(0) for c in range(L // s.block)])
        sizes = real.view(-1, s.block).sum(1, keepdim=True).clamp(min=1)
        factor_LL = torch.ones(L, L, dtype=x_LD.dtype)
        for t in range(n):
            own = t // s.block
            visible = [c for c in range(L // s.block) if ((c + 1) * s.block - 1 < t if layer.causal else c != own and c * s.block < n)]
            allowed[g, t] = real & (torch.arange(L) // s.block == own) & ((torch.arange(L) <= t) | (not layer.causal))
            if visible:
                scores = torch.stack([torch.stack([q[h, t] @ keys[c] / math.sqrt(d) for h in heads]).mean() for c in visible])
                p = torch.cat([scores.new_tensor([-1000.0]), scores]).softmax(0)[1:]
                order = p.detach().argsort(descending=True)
                if len(order) > s.selected:
                    margin = min(margin, float((scores[order[s.selected - 1]] - scores[order[s.selected]]).detach()))
                for i in order[: s.selected].tolist():
                    margin = min(margin, abs(math.log(max(float(p[i].detach()), 1e-300) / 1e-10)))
                    if p[i] > 1e-10:
                        columns = slice(visible[i] * s.block, (visible[i] + 1) * s.block)
                        allowed[g, t, columns] = real[columns]
                        if s.selector == "straight_through":
                            row = torch.zeros(L, L, dtype=x_LD.dtype)
                            row[t, columns] = 1
                            factor_LL = factor_LL + row * (p[i] - p[i].detach())
        sees = torch.zeros(L, L // s.block + 1, dtype=torch.bool)
        for t in range(L):
            sees[t] = torch.tensor([True] + [(c + 1) * s.block - 1 < t if layer.causal else c * s.block < n for c in range(L // s.block)])
        nothing = torch.zeros(1, d, dtype=x_LD.dtype)
        for h in heads:
            long.append(dense(q[h], k[g], v[g], allowed[g], factor_LL))
            short.append(dense(q[h], k[g], v[g], near))
            compressed.append(dense(q[h], torch.cat([nothing, keys]), torch.cat([nothing, means / sizes]), sees))
    paths = [torch.stack(path) for path in (long, short, compressed)][: layer.paths]
    gates = torch.sigmoid(filled @ layer.gate.weight.T + layer.gate.bias).view(L, H, layer.paths)
    mixed = sum(gates[:, :, i].T.unsqueeze(-1) * path for i, path in enumerate(paths))
    out = mixed.transpose(0, 1).reshape(L, D) @ layer.output.weight.T + layer.output.bias
    full = [torch.stack(path)[:, :n] for path in (long, short, compressed)]
    return Parts(full[0], full[1], full[2], allowed[:, :n, :n], margin, out[:n])


def block_keys(layer: BlossomAttention, g: int, k_Ld: Tensor, n: int) -> list[Tensor]:
    """One key a block; `k` is zero in padded places."""
    s, (L, d) = layer.settings, k_Ld.shape
    first, _, last = layer.block_keys.network
    windows = []
    for c in range(L // s.stride):
        places = range((c + 1) * s.stride - s.compression, (c + 1) * s.stride)
        window = torch.stack([k_Ld[j] if j >= 0 else k_Ld.new_zeros(d) for j in places]) + layer.block_keys.places[g]
        windows.append(last.weight @ torch.relu(first.weight @ window.flatten() + first.bias) + last.bias)
    each = s.block // s.stride
    blocks = []
    for c in range(0, len(windows), each):
        real = [windows[c + i] for i in range(each) if layer.causal or (c + i) * s.stride < n]
        blocks.append(torch.stack(real).mean(0) if real else torch.zeros(d, dtype=k_Ld.dtype))
    return blocks
