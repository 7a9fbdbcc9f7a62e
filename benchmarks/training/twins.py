"""Textbook training of the same models, as most repositories have it: what the figures are compared with.

B users or samples, L history, D width, N items. A SASRec over rows that are all padded to L at the left, with an explicit mask and cross-entropy over
[B · L, N + 1] logits, padding among them and then ignored; a DIN that is given one row a sample, history and all, and builds [B, L, 4D].
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtrail.models.contracts import Sizes

Rows = tuple[Tensor, Tensor, Tensor]  # items, categories and actions of histories, [B, L] each


class PaddedSASRec(nn.Module):
    """Every user a row of L places, padding at the left."""

    def __init__(self, sizes: Sizes, *, width: int, blocks: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.items = nn.Embedding(sizes.items + 1, width, padding_idx=0)
        self.positions = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, width, dropout, activation="relu", batch_first=True, norm_first=True) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.items.weight, std=0.02)

    def loss(self, items_BL: Tensor, targets_BL: Tensor) -> Tensor:
        L = items_BL.shape[1]
        x_BLD = self.dropout(self.items(items_BL) * self.items.embedding_dim**0.5 + self.positions.weight[:L])
        future_LL = torch.ones(L, L, dtype=torch.bool).triu(1)
        for block in self.blocks:
            x_BLD = block(x_BLD, src_mask=future_LL)
        logits_BLN = self.norm(x_BLD) @ self.items.weight.T
        return functional.cross_entropy(logits_BLN.flatten(0, 1), targets_BL.flatten(), ignore_index=0)


class TiledDIN(nn.Module):
    """One row a sample: its history is embedded anew for each candidate, and the pair features are concatenated."""

    def __init__(self, sizes: Sizes, *, width: int, attention_hidden: tuple[int, ...], hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.items, self.categories = nn.Embedding(sizes.items + 1, width, padding_idx=0), nn.Embedding(sizes.categories + 1, width, padding_idx=0)
        self.actions = nn.Embedding(sizes.actions + 1, 2 * width, padding_idx=0)
        self.attention = _mlp(8 * width, attention_hidden, nn.Sigmoid)
        self.head = _mlp(6 * width + 6, hidden, nn.PReLU)

    def loss(self, history_BL: Rows, lengths_B: Tensor, candidate_B: tuple[Tensor, Tensor], rest_BS: Tensor, clicks_B: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(self.logits(history_BL, lengths_B, candidate_B, rest_BS), clicks_B)

    def logits(self, history_BL: Rows, lengths_B: Tensor, candidate_B: tuple[Tensor, Tensor], rest_BS: Tensor) -> Tensor:
        """[B]: of one candidate for each row."""
        items_BL, categories_BL, actions_BL = history_BL
        k_BLD = torch.cat([self.items(items_BL), self.categories(categories_BL)], dim=-1) + self.actions(actions_BL)
        q_BD = torch.cat([self.items(candidate_B[0]), self.categories(candidate_B[1])], dim=-1)
        q_BLD = q_BD.unsqueeze(1).expand_as(k_BLD)
        a_BL = self.attention(torch.cat([q_BLD, k_BLD, q_BLD - k_BLD, q_BLD * k_BLD], dim=-1)).squeeze(-1)
        a_BL = a_BL.masked_fill(torch.arange(a_BL.shape[1]) >= lengths_B.unsqueeze(1), 0)
        read_BD = (a_BL.unsqueeze(1) @ k_BLD).squeeze(1)
        logits_B: Tensor = self.head(torch.cat([q_BD, read_BD, q_BD * read_BD, rest_BS], dim=-1)).squeeze(-1)
        return logits_B


def _mlp(inputs: int, hidden: tuple[int, ...], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for units in hidden:
        layers += [nn.Linear(inputs, units), activation()]
        inputs = units
    return nn.Sequential(*layers, nn.Linear(inputs, 1))
