"""The attention slot of the encoders: settings → a module `attention(x_BLD, lengths_B) -> [B, L, D]`."""

from typing import Protocol

from torch import Tensor, nn

from longtrail.config.slots import AttentionSettings, AttentionSlotSettings, BlossomSettings, FullAttentionSettings
from longtrail.errors import ModelError
from longtrail.models.attention.blossom import BlossomAttention
from longtrail.models.attention.full import FullAttention


class SelfAttention(Protocol):
    """Mixes the places of each history. What stands in padded places, in x and in the result, is undefined but finite."""

    def __call__(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """[B, L, D] of x [B, L, D] and the real places of each row, 0..L. A causal one is bit-equal at t whatever stands after t."""
        ...


def make_attention(settings: AttentionSettings, width: int, heads: int, *, causal: bool) -> nn.Module:
    """A SelfAttention with fresh weights. Raises ValueError where the head counts do not divide the width, ModelError for settings that it
    does not know."""
    if isinstance(settings, FullAttentionSettings):
        return FullAttention(width, heads, causal=causal, rotary=knows_order(settings))
    if isinstance(settings, BlossomSettings):
        return BlossomAttention(settings, width, heads, causal=causal)
    raise ModelError(f"no attention of {type(settings).__name__}; expected it in make_attention ({__name__})")


def knows_order(settings: AttentionSlotSettings) -> bool:
    """Whether the attention itself tells places apart (RoPE): its encoder then has no position table."""
    return settings.knows_order


def reach_of(settings: AttentionSlotSettings, max_history: int) -> int | None:
    """Events that an encoder reads of a history, None for all: full attention over a whole history would cost its square."""
    return None if settings.reads_all else max_history
