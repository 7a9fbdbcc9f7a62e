"""DIN: deep interest network (Zhou et al., KDD 2018, arXiv 1706.06978), over the whole history.

B requests, L history, C candidates, D width, H attention units.

Each candidate weighs every behaviour by a small MLP and adds the weighted behaviours up:

    z_j = [q ; k_j ; q - k_j ; q * k_j]      l_j = MLP(z_j)      u = Σ_j a_j k_j      with a_j = l_j, sigmoid(l_j) or softmax_j(l_j / sqrt(D))

The paper's: the MLP on the pair and unnormalised weights ("linear"), so that the intensity of an interest survives. Its released code's: the four
features, sigmoid hidden units, the softmax, and [u ; q ; u * q] in front of the last MLP. SAM's authors compare with sigmoid weights. Ours: the
candidate set without tiling (attention/pointwise.py), attention_init, the action in the behaviours (models/embedding.py), statistics in the head,
and the head's BatchNorm + PReLU (models/head.py).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from longtrail.config import DINSettings
from longtrail.models.attention.alike import start_alike
from longtrail.models.attention.fused import PairLayer, attend
from longtrail.models.attention.pointwise import Normaliser, blockwise, glorot, normalised, pair_dense, pair_hidden, pair_hidden_again, pooled
from longtrail.models.contracts import Candidates, Context, History, Sizes
from longtrail.models.embedding import BehaviourEmbedding
from longtrail.models.head import Head
from longtrail.models.masks import padding_mask


class TargetAttention(nn.Module):
    """Attention weights of every (candidate, behaviour) pair. `first` holds W1 [4D, H] as its four blocks of D rows, in the order of z."""

    def __init__(self, width: int, hidden: Sequence[int], kind: Normaliser) -> None:
        super().__init__()
        self.kind = kind
        self.scale = width**-0.5 if kind == "softmax" else 1.0
        self.first = glorot(4, width, hidden[0], inputs=4 * width, outputs=hidden[0])
        self.first_bias = nn.Parameter(torch.zeros(hidden[0]))
        pairs = list(pairwise(hidden))
        self.middle = nn.ParameterList(glorot(outputs, inputs, inputs=inputs, outputs=outputs) for inputs, outputs in pairs)
        self.middle_bias = nn.ParameterList(nn.Parameter(torch.zeros(outputs, 1)) for _, outputs in pairs)
        self.last = glorot(hidden[-1], inputs=hidden[-1], outputs=1)
        self.last_bias = nn.Parameter(torch.zeros(())) if kind != "softmax" else None  # a softmax takes it away again

    def forward(self, keys_BLD: Tensor, mask_BL: Tensor, query_BCD: Tensor) -> tuple[Tensor, Tensor]:
        """a [B, C, L], exactly 0 on padding and all 0 for an empty history, and u [B, C, D]."""
        plain_q, plain_k, minus, times = self.first.transpose(1, 2)  # each [H, D]
        weights_BCHD = query_BCD.unsqueeze(2) * times + (plain_k - minus)
        bias_BCH = query_BCD @ (plain_q + minus).T + self.first_bias
        if not self.middle:
            return attend(keys_BLD, mask_BL, PairLayer(weights_BCHD, bias_BCH, self.last, self.last_bias, self.kind, self.scale))

        def score(weights: Tensor, bias: Tensor) -> Tensor:
            hidden_BCHL = pair_hidden(keys_BLD, weights, bias)
            for middle, middle_bias in zip(self.middle, self.middle_bias, strict=True):
                hidden_BCHL = pair_hidden_again(hidden_BCHL, middle, middle_bias)
            return pair_dense(hidden_BCHL, self.last.unsqueeze(0)).squeeze(2)

        scores_BCL = blockwise(score, weights_BCHD, bias_BCH, keys_BLD.shape[1])
        a_BCL = normalised(scores_BCL if self.last_bias is None else scores_BCL.add_(self.last_bias), mask_BL, self.kind, self.scale)
        return a_BCL, pooled(a_BCL, keys_BLD)


class DIN(nn.Module):
    """Ranker. O(C · L · D) time; its largest tensor is the attention's hidden layer [B, C, H, L]."""

    def __init__(self, settings: DINSettings, sizes: Sizes) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = BehaviourEmbedding(sizes, settings.width, items=settings.items)
        width = self.embedding.width
        self.attention = TargetAttention(width, settings.attention_hidden, settings.attention_weights)
        self.head = Head(3 * width + self.embedding.recent_width, settings.hidden, settings.dropout)

    def start_attention(self, items_n: Tensor, categories_n: Tensor) -> None:
        """attention_init: similarity, once item vectors have their start. Items int64 [n], as often as people meet them, and their categories."""
        if self.settings.attention_init == "similarity":
            layer, similarity = self.attention, self.embedding.similarity(items_n, categories_n)
            first, last = (layer.first, layer.first_bias), (layer.last, layer.last_bias)
            start_alike(*first, *last, similarity, product=3, squashed=layer.kind != "linear", scale=layer.scale)

    def forward(self, history: History, candidates: Candidates, context: Context) -> Tensor:
        """Logits [B, C]."""
        mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
        mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])
        keys_BLD = self.embedding.keys(history, mask_BL)
        query_BCD = self.embedding.queries(candidates)
        _, read_BCD = self.attention(keys_BLD, mask_BL, query_BCD)
        parts = [query_BCD, read_BCD, query_BCD * read_BCD, self.embedding.recent(history, mask_BC.shape[1])]
        return self.head(parts, candidates.statistics_BCF, context.statistics_BG, mask_BC)

    def attention_weights(self, history: History, candidates: Candidates, context: Context) -> list[Tensor]:
        """[a], [B, C, L]; 0 on padding."""
        mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
        return [self.attention(self.embedding.keys(history, mask_BL), mask_BL, self.embedding.queries(candidates))[0]]
