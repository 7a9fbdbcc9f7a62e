"""The block that SASRec and BERT4Rec are made of. B users, L history, D width."""

from torch import Tensor, nn

from longtrail.models.dropout import Dropout


class Block(nn.Module):
    """x + attention(LN x), then x + FFN(LN x): the standard pre-norm block (our choice for both; BERT4Rec's paper norms after the sum).

    `attention(x_BLD, lengths_B) -> [B, L, D]` is a filled attention slot; `feed_width` units of `activation` are the FFN's.
    """

    def __init__(self, width: int, attention: nn.Module, *, feed_width: int, activation: nn.Module, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, feed_width), activation, Dropout(dropout), nn.Linear(feed_width, width))
        self.dropout = Dropout(dropout)

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """[B, L, D]. What stands in padded places is undefined."""
        return self.feed_on(self.mix(x_BLD, lengths_B))

    def mix(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """The first half, in which places look at each other."""
        return self.dropout.added(x_BLD, self.attention(self.attention_norm(x_BLD), lengths_B))

    def feed_on(self, x: Tensor) -> Tensor:
        """The second half, [..., D] → [..., D]: each place by itself, so it may be given only those places that somebody asks for."""
        return self.dropout.added(x, self.feed(self.feed_norm(x)))
