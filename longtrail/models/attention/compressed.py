"""Attention to one key and one value a block. N rows, L places, M query heads of a key/value head, d head width, n blocks of b = L / n places."""

from torch import Tensor
from torch.nn import functional


def compressed_attention(q_NLMd: Tensor, keys_Nnd: Tensor, values_Nnd: Tensor, real_Nn: Tensor | None = None) -> Tensor:
    """[N, L, M, d]: softmax(q · key / √d) value over the blocks before the query's own, or all real ones; with a slot "nothing" of score and value 0.

    Causal (`real_Nn` None) without a mask of L × n: the queries at one place of each block see 0, 1, … n - 1 blocks, and "nothing" makes that the
    triangle that `is_causal` is, b·M times over. O(L·n·M·d) time, memory linear in L.
    """
    (N, L, M, d), n = q_NLMd.shape, keys_Nnd.shape[1]
    keys, values = (functional.pad(x, (0, 0, 1, 0)).unsqueeze(1) for x in (keys_Nnd, values_Nnd))
    if real_Nn is not None:
        seen_N11n = functional.pad(real_Nn, (1, 0), value=True).view(N, 1, 1, n + 1)
        return functional.scaled_dot_product_attention(q_NLMd.reshape(N, 1, L * M, d), keys, values, attn_mask=seen_N11n).view(N, L, M, d)
    alike = L // n * M
    queries = q_NLMd.reshape(N, n, alike, d).transpose(1, 2)
    keys, values = (x[:, :, :n].expand(N, alike, n, d) for x in (keys, values))
    return functional.scaled_dot_product_attention(queries, keys, values, is_causal=True).transpose(1, 2).reshape(N, L, M, d)


def block_means(values_NLd: Tensor, block: int, real_NL: Tensor | None) -> Tensor:
    """[N, n, d]: the mean of each block's (real) values."""
    if real_NL is None:
        return values_NLd.unflatten(1, (-1, block)).mean(2)
    real = real_NL.unflatten(1, (-1, block)).unsqueeze(-1)
    return values_NLd.unflatten(1, (-1, block)).masked_fill(~real, 0).sum(2) / real.sum(2).clamp(min=1)
