"""DIEN: deep interest evolution network (Zhou et al., AAAI 2019, arXiv 1809.03672), for short histories.

B requests, L history, C candidates, D width.

    s_t = GRU(k_t, s_{t-1})       a_t = softmax_t(MLP([q ; s_t ; q - s_t ; q * s_t]) / sqrt(D))
    r, z = sigmoid([s_t ; h_{t-1}] W + b)      c = tanh([s_t ; r * h_{t-1}] Wc + bc)      h_t = (1 - a_t z) * h_{t-1} + a_t z * c
    logit = head([q ; h_n ; Σ k ; q * Σ k ; newest actions ; statistics])

The paper's: the two recurrences and the gate that attention closes (AUGRU); a = 0 on padding leaves h as it is, so no other mask is needed. TF1's
cell, as in the released code: r before the product in the AUGRU (the paper, and torch's GRU for the interests: after it). The code of SAM's authors:
attention by the MLP 80-40-1 with a softmax (the paper's own is bilinear), and what goes into the head. Left out: the auxiliary loss that asks the GRU
for the next behaviour. Ours: 1 / sqrt(D); the GRU runs once a request and the AUGRU's products with s_t are shared by all candidates; only h U is per
candidate. Still O(C · L · D²) in L steps one after another: that is the model.
"""

import torch
from torch import Tensor, nn

from longtrail.config import DIENSettings
from longtrail.models.attention.pointwise import glorot
from longtrail.models.contracts import Candidates, Context, History, Sizes
from longtrail.models.embedding import BehaviourEmbedding
from longtrail.models.head import Head
from longtrail.models.masks import padding_mask
from longtrail.models.precision import at_least_float32
from longtrail.models.rankers.din import TargetAttention


class AttentionalGRU(nn.Module):
    """GRU whose update gate attention scales."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(width, 3 * width)
        self.gates = glorot(width, 2 * width, inputs=2 * width, outputs=2 * width)
        self.candidate = glorot(width, width, inputs=2 * width, outputs=width)

    def forward(self, states_BLD: Tensor, weights_BCL: Tensor) -> Tensor:
        """h_n [B, C, D], from zeros."""
        (B, _, D), C = states_BLD.shape, weights_BCL.shape[1]
        inputs_BLG = at_least_float32(self.inputs(states_BLD))
        h_BCD = inputs_BLG.new_zeros(B, C, D)
        # Unbound once: the gradient of inputs[:, t] is as large as all inputs, at each step.
        for inputs_BG, weights_BC in zip(inputs_BLG.unbind(1), weights_BCL.unbind(2), strict=True):
            gates, candidate = inputs_BG.unsqueeze(1).split((2 * D, D), dim=-1)
            reset_BCD, update_BCD = (at_least_float32(h_BCD @ self.gates) + gates).sigmoid().chunk(2, dim=-1)
            new_BCD = (at_least_float32((reset_BCD * h_BCD) @ self.candidate) + candidate).tanh()
            h_BCD = torch.lerp(h_BCD, new_BCD, update_BCD * weights_BC.unsqueeze(-1))
        return h_BCD


class DIEN(nn.Module):
    """Ranker."""

    def __init__(self, settings: DIENSettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = BehaviourEmbedding(sizes, settings.width, items=settings.items)
        width = self.embedding.width
        self.interest = nn.GRU(width, width, batch_first=True)
        self.attention = TargetAttention(width, settings.attention_hidden, "softmax")
        self.evolution = AttentionalGRU(width)
        self.head = Head(4 * width + self.embedding.recent_width, settings.hidden, settings.dropout)

    def forward(self, history: History, candidates: Candidates, context: Context) -> Tensor:
        """Logits [B, C]."""
        mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
        mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])
        keys_BLD, query_BCD = self.embedding.keys(history, mask_BL), self.embedding.queries(candidates)
        states_BLD, _ = self.interest(keys_BLD)  # padding stands behind what is real, which therefore does not see it
        weights_BCL, _ = self.attention(states_BLD, mask_BL, query_BCD)
        evolved_BCD = self.evolution(states_BLD, weights_BCL)
        sum_BCD = keys_BLD.sum(1, keepdim=True).expand_as(query_BCD)
        parts = [query_BCD, evolved_BCD, sum_BCD, query_BCD * sum_BCD, self.embedding.recent(history, mask_BC.shape[1])]
        return self.head(parts, candidates.statistics_BCF, context.statistics_BG, mask_BC)
