"""What fills a slot of an encoder: the settings say what it needs, and nothing that is not known is taken for something that is."""

from typing import Any, Literal, get_args

import pytest
from pydantic import ValidationError

from longtrail.config import BlossomSettings, EncoderSettings, FullAttentionSettings, Settings, TransformerSettings
from longtrail.config.slots import AttentionSlotSettings
from longtrail.errors import ModelError
from longtrail.losses.next_item import LOSSES
from longtrail.models.attention.factory import knows_order, make_attention, reach_of
from longtrail.models.items.factory import make_items


class WindowSettings(AttentionSlotSettings):
    """Somebody's own attention, which has no positions."""

    kind: Literal["window"] = "window"


class HashedSettings(Settings):
    """Somebody's own table of items."""

    kind: Literal["hashed"] = "hashed"


class OwnEncoderSettings(TransformerSettings):
    attention: Any = WindowSettings()


def test_an_encoder_asks_its_attention_and_not_its_name() -> None:
    assert OwnEncoderSettings(width=6, heads=2).attention.kind == "window"  # heads of an odd width: nothing is rotated
    with pytest.raises(ValidationError, match="expected heads of an even width"):
        OwnEncoderSettings(width=6, heads=2, attention=FullAttentionSettings())
    asked = [WindowSettings(), FullAttentionSettings(positions="learned"), FullAttentionSettings(), BlossomSettings()]
    assert [(knows_order(one), reach_of(one, 7)) for one in asked] == [(False, 7), (False, 7), (True, 7), (True, None)]


def test_an_unknown_filling_is_named_and_not_taken_for_another() -> None:
    unknown: Any = WindowSettings()
    with pytest.raises(ModelError, match=r"no attention of WindowSettings; expected it in make_attention \(longtrail.models.attention.factory\)"):
        make_attention(unknown, 8, 2, causal=True)
    unknown = HashedSettings()
    with pytest.raises(ModelError, match=r"no table of items of HashedSettings; expected it in make_items \(longtrail.models.items.factory\)"):
        make_items(unknown, 8, 2, std=0.1)


def test_every_loss_that_may_be_set_is_there() -> None:
    """tests/contracts tries each of LOSSES with each encoder."""
    assert set(LOSSES) == set(get_args(EncoderSettings.model_fields["loss"].annotation))
