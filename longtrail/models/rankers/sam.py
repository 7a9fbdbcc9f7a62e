"""SAM: sparse attentive memory (Lin et al., CIKM 2022, arXiv 2208.04022); see docs/models.md.

B requests, L history, C candidates, D width, H attention units, P passes, R compression units.

The query of each candidate reads the history P times. Pass i weighs every behaviour by what the candidate q and the memory m say of it, adds the
weighted behaviours up, and a GRU shared by all passes folds the sum into the memory, which the next pass attends with:

    z_ij = [q - k_j ; q * k_j ; m - k_j ; m * k_j]      a_ij = sigmoid(w2_i · sigmoid(z_ij W1_i + b1_i) + b2_i)      u_i = Σ_j a_ij k_j
    m_i = GRU(u_i, m_{i-1}), m_0 = q                    s_i = relu(a_i Wc_i + bc_i)                                  o = [s_1 ; m_1 ; … ; s_P ; m_P]

The paper's: memory passes with feedback and attention that asks with target and memory at once. Its released code's: the equations in detail
(sigmoid weights, sum, compression of the weight vector, output), the sizes (8 units, 16 compression units, D = 32), the GRU's flavour and its gate
bias 1; and passes that all attend with m = q, which is feedback=False here. Ours: the whole candidate set in one matrix product a pass
(attention/pointwise.py), newest-first ranks in the compression, read_scale, attention_init, the action in the behaviours (models/embedding.py),
the statistics in the head.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtrail.config import SAMSettings
from longtrail.models.attention.pointwise import blockwise, glorot, pair_dense, pair_hidden
from longtrail.models.contracts import Candidates, Context, History, Sizes
from longtrail.models.embedding import BehaviourEmbedding
from longtrail.models.head import Head
from longtrail.models.masks import padding_mask


class MemoryCell(nn.Module):
    """TF1's GRU cell [C]: gate bias 1, and the reset gate acts before the candidate's matrix product (torch.nn.GRUCell's acts after it)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates = glorot(2 * width, 2 * width, inputs=2 * width, outputs=2 * width)
        self.gates_bias = nn.Parameter(torch.ones(2 * width))
        self.candidate = glorot(2 * width, width, inputs=2 * width, outputs=width)
        self.candidate_bias = nn.Parameter(torch.zeros(width))

    def forward(self, read_BCD: Tensor, memory_BCD: Tensor) -> Tensor:
        gates = torch.cat([read_BCD, memory_BCD], dim=-1) @ self.gates + self.gates_bias
        reset_BCD, keep_BCD = gates.sigmoid_().chunk(2, dim=-1)
        candidate = torch.cat([read_BCD, reset_BCD * memory_BCD], dim=-1) @ self.candidate + self.candidate_bias
        return torch.lerp(candidate.tanh_(), memory_BCD, keep_BCD)


class AttentionPass(nn.Module):
    """One pass's weights and compression. `first` holds W1 [4D, H] as its four blocks of D rows, in the order of z."""

    def __init__(self, settings: SAMSettings, width: int) -> None:
        super().__init__()
        units, compression = settings.attention_hidden, settings.compression
        self.first = glorot(4, width, units, inputs=4 * width, outputs=units)
        self.first_bias = nn.Parameter(torch.zeros(units))
        self.second = glorot(units, inputs=units, outputs=1)
        few = -math.log(max(1.0, settings.max_history / 8)) if settings.attention_init == "log_length" else 0.0
        self.second_bias = nn.Parameter(torch.full((), few))
        self.compress = glorot(settings.max_history, compression, inputs=settings.max_history, outputs=compression) if compression else None
        self.compress_bias = nn.Parameter(torch.zeros(compression)) if compression else None

    def weights(self, keys_BLD: Tensor, mask_BL: Tensor, query_BCD: Tensor, memory_BCD: Tensor) -> Tensor:
        """a [B, C, L], in (0, 1); exactly 0 on padding."""
        minus_q, times_q, minus_m, times_m = self.first.transpose(1, 2)  # each [H, D]
        weights_BCHD = torch.addcmul(query_BCD.unsqueeze(2) * times_q - (minus_q + minus_m), memory_BCD.unsqueeze(2), times_m)
        bias_BCH = query_BCD @ minus_q.T + memory_BCD @ minus_m.T + self.first_bias

        def score(weights: Tensor, bias: Tensor) -> Tensor:
            hidden_BCHL = pair_hidden(keys_BLD, weights, bias).sigmoid_()
            return pair_dense(hidden_BCHL, self.second.unsqueeze(0)).squeeze(2)

        scores_BCL = blockwise(score, weights_BCHD, bias_BCH, keys_BLD.shape[1]).add_(self.second_bias)
        return scores_BCL.masked_fill_(~mask_BL.unsqueeze(1), -math.inf).sigmoid_()

    def compressed(self, weights_BCL: Tensor, lengths_B: Tensor) -> Tensor:
        """s [B, C, R]. Row j of Wc belongs to the j-th newest behaviour, whatever L is; older ones than Wc has rows for stay out."""
        assert self.compress is not None and self.compress_bias is not None
        rank_BL = lengths_B.unsqueeze(-1) - 1 - torch.arange(weights_BCL.shape[2], device=weights_BCL.device)
        inside_BL = (rank_BL >= 0) & (rank_BL < len(self.compress))
        rows_BLR = functional.embedding(rank_BL.clamp(0, len(self.compress) - 1), self.compress) * inside_BL.unsqueeze(-1)
        return torch.relu(weights_BCL @ rows_BLR + self.compress_bias)


class SAM(nn.Module):
    """Ranker. O(P · C · L · D) time; its largest tensor is the hidden layer [B, C, H, L] of one pass."""

    def __init__(self, settings: SAMSettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = BehaviourEmbedding(sizes, settings.width, items=settings.items)
        width = self.embedding.width
        self.passes = nn.ModuleList(AttentionPass(settings, width) for _ in range(settings.passes))
        self.cell = MemoryCell(width)
        read = settings.passes * (settings.compression + width)
        self.head = Head(width + read, settings.hidden, settings.dropout)

    def forward(self, history: History, candidates: Candidates, context: Context) -> Tensor:
        """Logits [B, C]."""
        mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
        mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])
        query_BCD = self.embedding.queries(candidates)
        read = self.read(self.embedding.keys(history, mask_BL), mask_BL, history.lengths_B, query_BCD)
        return self.head([query_BCD, *read], candidates.statistics_BCF, context.statistics_BG, mask_BC)

    def read(self, keys_BLD: Tensor, mask_BL: Tensor, lengths_B: Tensor, query_BCD: Tensor) -> list[Tensor]:
        """[s_1, m_1, …, s_P, m_P], [B, C, R] and [B, C, D] in turn."""
        memory_BCD, parts = query_BCD, []
        for attention in self.passes:
            assert isinstance(attention, AttentionPass)
            seen_BCD = memory_BCD if self.settings.feedback else query_BCD
            weights_BCL = attention.weights(keys_BLD, mask_BL, query_BCD, seen_BCD)
            memory_BCD = self.cell(self._scaled(weights_BCL @ keys_BLD, weights_BCL, lengths_B), memory_BCD)
            if attention.compress is not None:
                parts.append(attention.compressed(weights_BCL, lengths_B))
            parts.append(memory_BCD)
        return parts

    def _scaled(self, read_BCD: Tensor, weights_BCL: Tensor, lengths_B: Tensor) -> Tensor:
        """The unnormalised sum grows with L and saturates the GRU: optionally divided by sqrt(n) or 1 + Σa."""
        if self.settings.read_scale == "sqrt":
            return read_BCD / lengths_B.clamp(min=1).to(read_BCD.dtype).sqrt().view(-1, 1, 1)
        if self.settings.read_scale == "mean":
            return read_BCD / (1 + weights_BCL.sum(-1, keepdim=True))
        return read_BCD
