"""The attention slot of the encoders: settings → a module `attention(x_BLD, lengths_B) -> [B, L, D]`."""

from typing import Protocol

from torch import Tensor, nn

from longtrail.config.slots import AttentionSettings, FullAttentionSettings
from longtrail.models.attention.blossom import BlossomAttention
from longtrail.models.attention.full import FullAttention


class SelfAttention(Protocol):
    """Mixes the places of each history. What stands in padded places, in x and in the result, is undefined but finite."""

    def __call__(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """[B, L, D] of x [B, L, D] and the real places of each row, 0..L. A causal one is bit-equal at t whatever stands after t."""
        ...


def make_attention(settings: AttentionSettings, width: int, heads: int, *, causal: bool) -> nn.Module:
    """A SelfAttention with fresh weights. Raises ValueError where the head counts do not divide the width."""
    if isinstance(settings, FullAttentionSettings):
        return FullAttention(width, heads, causal=causal, rotary=knows_order(settings))
    return BlossomAttention(settings, width, heads, causal=causal)


def knows_order(settings: AttentionSettings) -> bool:
    """Whether the attention itself tells places apart (RoPE): its encoder then has no position table."""
    return settings.kind == "blossom" or settings.positions == "rotary"


def reach_of(settings: AttentionSettings, max_history: int) -> int | None:
    """Events that an encoder reads of a history, None for all: full attention over a whole history would cost its square."""
    return None if settings.kind == "blossom" else max_history
