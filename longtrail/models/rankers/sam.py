"""SAM: sparse attentive memory (Lin et al., CIKM 2022, arXiv 2208.04022); see docs/models/sam.md.

B requests, L history, C candidates, D width, H attention units, P passes, R compression units, T enhancement steps.

The query of each candidate reads the history P times. Pass i weighs every behaviour by what the candidate q and the memory m say of it, adds the
weighted behaviours up, and a GRU shared by all passes folds the sum into the memory, which the next pass attends with:

    z_ij = [q - k_j ; q * k_j ; m - k_j ; m * k_j]      a_ij = sigmoid(w2_i · sigmoid(z_ij W1_i + b1_i) + b2_i)      u_i = Σ_j a_ij k_j
    m_i = GRU(u_i, m_{i-1}), m_0 = q                    s_i = relu(a_i Wc_i + bc_i)                                  o = [s_1 ; m_1 ; … ; s_P ; m_P]

With enhancement (3P+), m_P is refined with the target into h_T (memory.py) and o = [s_P ; h_T].

The paper's: memory passes with feedback and attention that asks with target and memory at once. Its released code's: the equations in detail
(sigmoid weights, sum, compression of the weight vector, enhancement, output), the sizes (8 units, 16 compression units, D = 32), the GRU's flavour
and its gate bias 1; and passes that all attend with m = q, which is feedback=False here. An industrial re-implementation's: softmax, softmax_eps and
scaled_sigmoid weights. Ours: the whole candidate set in one matrix product a pass (attention/pointwise.py), newest-first ranks in the compression,
read_scale, attention_init, the action in the behaviours (models/embedding.py), the statistics in the head, whose BatchNorm is the only one.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtrail.config import SAMSettings
from longtrail.models.attention.alike import start_alike
from longtrail.models.attention.fused import PairLayer, SharedKeys, attend
from longtrail.models.attention.pointwise import Normaliser, glorot
from longtrail.models.contracts import Candidates, Context, History, Sizes
from longtrail.models.embedding import BehaviourEmbedding
from longtrail.models.head import Head
from longtrail.models.masks import padding_mask
from longtrail.models.order import newest_first, turned_places
from longtrail.models.rankers.memory import Enhancement, MemoryCell


class Weights(NamedTuple):
    """How scores l become weights: `kind` of them, divided by sqrt(D) where `scaled`. A softmax takes a bias away again, so it has none."""

    kind: Normaliser
    scaled: bool = False
    biased: bool = False


WEIGHTS = {
    "sigmoid": Weights("sigmoid", biased=True),
    "scaled_sigmoid": Weights("sigmoid", scaled=True, biased=True),
    "softmax": Weights("softmax"),
    "softmax_eps": Weights("softmax_eps"),
}


def _as_it_is(read_BCD: Tensor, weights_BCL: Tensor, lengths_B: Tensor) -> Tensor:
    return read_BCD


def _by_root_of_length(read_BCD: Tensor, weights_BCL: Tensor, lengths_B: Tensor) -> Tensor:
    return read_BCD / lengths_B.clamp(min=1).to(read_BCD.dtype).sqrt().view(-1, 1, 1)


def _by_sum_of_weights(read_BCD: Tensor, weights_BCL: Tensor, lengths_B: Tensor) -> Tensor:
    return read_BCD / (1 + weights_BCL.sum(-1, keepdim=True))


def _by_its_spread(read_BCD: Tensor, weights_BCL: Tensor, lengths_B: Tensor) -> Tensor:
    return functional.layer_norm(read_BCD, read_BCD.shape[-1:])


# What the GRU is given of a sum of n behaviours, which grows with n and saturates it: divided by sqrt(n) or 1 + Σa, or normalised to unit variance.
READ_SCALES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "none": _as_it_is,
    "sqrt": _by_root_of_length,
    "mean": _by_sum_of_weights,
    "norm": _by_its_spread,
}


class AttentionPass(nn.Module):
    """One pass's weights and compression. `first` holds W1 [4D, H] as its four blocks of D rows, in the order of z."""

    def __init__(self, settings: SAMSettings, width: int, compression: int) -> None:
        super().__init__()
        units = settings.attention_hidden
        self.weights = WEIGHTS[settings.attention_weights]
        self.scale = width**-0.5 if self.weights.scaled else 1.0
        self.first = glorot(4, width, units, inputs=4 * width, outputs=units)
        self.first_bias = nn.Parameter(torch.zeros(units))
        self.second = glorot(units, inputs=units, outputs=1)
        few = -math.log(max(1.0, settings.max_history / 8)) if settings.attention_init == "log_length" else 0.0
        self.second_bias = nn.Parameter(torch.full((), few / self.scale)) if self.weights.biased else None
        self.compress = glorot(settings.max_history, compression, inputs=settings.max_history, outputs=compression) if compression else None
        self.compress_bias = nn.Parameter(torch.zeros(compression)) if compression else None

    def layer(self, query_BCD: Tensor, memory_BCD: Tensor) -> PairLayer:
        """z W1 + b1 of all pairs as k · weights + bias."""
        minus_q, times_q, minus_m, times_m = self.first.transpose(1, 2)  # each [H, D]
        weights_BCHD = torch.addcmul(query_BCD.unsqueeze(2) * times_q - (minus_q + minus_m), memory_BCD.unsqueeze(2), times_m)
        bias_BCH = query_BCD @ minus_q.T + memory_BCD @ minus_m.T + self.first_bias
        return PairLayer(weights_BCHD, bias_BCH, self.second, self.second_bias, self.weights.kind, self.scale)

    def forward(self, keys: SharedKeys, mask_BL: Tensor, query_BCD: Tensor, memory_BCD: Tensor) -> tuple[Tensor, Tensor]:
        """a [B, C, L], exactly 0 on padding, and u [B, C, D]."""
        return attend(keys, mask_BL, self.layer(query_BCD, memory_BCD))

    def compressed(self, weights_BCL: Tensor) -> Tensor:
        """s [B, C, R]. Row j of Wc belongs to the j-th newest behaviour, whatever L is; older ones than Wc has rows for stay out."""
        assert self.compress is not None and self.compress_bias is not None
        ranks = min(weights_BCL.shape[2], len(self.compress))
        return torch.relu(weights_BCL[..., :ranks] @ self.compress[:ranks] + self.compress_bias)


class SAM(nn.Module):
    """Ranker. O(P · C · L · D) time; its largest tensor is the hidden layer [B, C, H, L] of one pass."""

    def __init__(self, settings: SAMSettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings, self.scaled = settings, READ_SCALES[settings.read_scale]
        self.embedding = BehaviourEmbedding(sizes, settings.width, items=settings.items)
        width, last = self.embedding.width, settings.passes - 1
        used = [settings.compression if i == last or not settings.enhancement else 0 for i in range(settings.passes)]
        self.passes = nn.ModuleList(AttentionPass(settings, width, compression) for compression in used)
        self.cell = MemoryCell(width)
        self.enhance = Enhancement(width, settings.enhancement) if settings.enhancement else None
        memories = 1 if settings.enhancement else settings.passes
        self.head = Head(width + sum(used) + memories * width + self.embedding.recent_width, settings.hidden, settings.dropout)

    def start_attention(self, items_n: Tensor, categories_n: Tensor) -> None:
        """attention_init: similarity, once item vectors have their start. Items int64 [n], as often as people meet them, and their categories."""
        if self.settings.attention_init == "similarity":
            similarity = self.embedding.similarity(items_n, categories_n)
            for layer in self.passes:
                assert isinstance(layer, AttentionPass)
                first, last = (layer.first, layer.first_bias), (layer.second, layer.second_bias)
                start_alike(*first, *last, similarity, product=1, squashed=True, scale=layer.scale)

    def forward(self, history: History, candidates: Candidates, context: Context) -> Tensor:
        """Logits [B, C]."""
        mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])
        keys_BLD, mask_BL, query_BCD = self._embedded(history, candidates)
        parts = [query_BCD, *self.read(keys_BLD, mask_BL, history.lengths_B, query_BCD), self.embedding.recent(history, mask_BC.shape[1])]
        return self.head(parts, candidates.statistics_BCF, context.statistics_BG, mask_BC)

    def attention_weights(self, history: History, candidates: Candidates, context: Context) -> list[Tensor]:
        """a_1 … a_P, [B, C, L] each, in the history's own order (oldest first); 0 on padding."""
        turn_BL = turned_places(history.lengths_B, history.items_BL.shape[1])
        keys_BLD, mask_BL, query_BCD = self._embedded(history, candidates)
        passes = self._passes(keys_BLD, mask_BL, history.lengths_B, query_BCD)
        return [a.gather(2, turn_BL.unsqueeze(1).expand_as(a)) * mask_BL.unsqueeze(1) for a, _ in passes]

    @torch.no_grad()
    def health(self, history: History, candidates: Candidates, context: Context) -> dict[str, float]:
        """Of each pass, the mean over candidates of people with a history: entropy in bits of a / Σa [C: computed, never used] and mass Σa (ours)."""
        real_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1]) & (history.lengths_B > 0).unsqueeze(1)
        found: dict[str, float] = {}
        if not real_BC.any():
            return found
        keys_BLD, mask_BL, query_BCD = self._embedded(history, candidates)
        for i, (a_BCL, _) in enumerate(self._passes(keys_BLD, mask_BL, history.lengths_B, query_BCD), start=1):
            share_BCL = a_BCL / (a_BCL.sum(-1, keepdim=True) + 1e-12)
            entropy_BC = -torch.xlogy(share_BCL, share_BCL).sum(-1) / math.log(2)
            found[f"attention_entropy_{i}"] = float(entropy_BC[real_BC].mean())
            found[f"attention_mass_{i}"] = float(a_BCL.sum(-1)[real_BC].mean())
        return found

    def read(self, keys_BLD: Tensor, mask_BL: Tensor, lengths_B: Tensor, query_BCD: Tensor) -> list[Tensor]:
        """[s_1, m_1, …, s_P, m_P], or [s_P, h_T] with enhancement: [B, C, R] and [B, C, D] in turn. Keys stand newest first."""
        parts: list[Tensor] = []
        for attention, (weights_BCL, memory_BCD) in zip(self.passes, self._passes(keys_BLD, mask_BL, lengths_B, query_BCD), strict=True):
            assert isinstance(attention, AttentionPass)
            if attention.compress is not None:
                parts.append(attention.compressed(weights_BCL))
            parts.append(memory_BCD)
        if self.enhance is None:
            return parts
        return [*parts[self.settings.passes - 1 : -1], self.enhance(parts[-1], query_BCD)]

    def _embedded(self, history: History, candidates: Candidates) -> tuple[Tensor, Tensor, Tensor]:
        mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
        return self.embedding.keys(newest_first(history), mask_BL), mask_BL, self.embedding.queries(candidates)

    def _passes(self, keys_BLD: Tensor, mask_BL: Tensor, lengths_B: Tensor, query_BCD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(a_i, m_i) of each pass."""
        memory_BCD, keys = query_BCD, SharedKeys(keys_BLD)
        for attention in self.passes:
            weights_BCL, read_BCD = attention(keys, mask_BL, query_BCD, memory_BCD if self.settings.feedback else query_BCD)
            memory_BCD = self.cell(self.scaled(read_BCD, weights_BCL, lengths_B), memory_BCD)
            yield weights_BCL, memory_BCD
