"""Settings of the parts that models are composed of: the table of items and the attention over a history."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from longtrail.config.base import Positive, Settings


class DenseItemsSettings(Settings):
    """One vector an item."""

    kind: Literal["dense"] = "dense"


class RecJPQItemsSettings(Settings):
    """RecJPQ (Petrov & Macdonald, WSDM 2024): an item is `splits` codes, and its vector is put together from the pieces that they name."""

    kind: Literal["recjpq"] = "recjpq"
    splits: Positive = Field(8, description="codes of an item; must divide the width where pieces are concatenated")
    codes: Annotated[int, Field(ge=2, le=256)] = Field(256, description="codes to choose from in each split: one byte")
    assignment: Literal["svd", "bpr", "random"] = Field(
        "svd", description="where codes come from: who had to do with what in the training period, or chance"
    )
    composition: Literal["concat", "sum"] = Field(
        "concat", description="concat: pieces of width / splits, one after the other (the paper's); sum: pieces as wide as the item, added up (ours)"
    )
    binary: bool = Field(False, description="svd, bpr: True counts repeated interactions once (the paper's figure), False each time (its code's SVD)")

    def idle(self) -> Iterator[tuple[str, str]]:
        if self.assignment == "random":
            yield "binary", "assignment: random"


ItemsSettings = Annotated[DenseItemsSettings | RecJPQItemsSettings, Field(discriminator="kind")]


class WithItems(Settings):
    """What every model with an item slot has: `items`, and a width that its splits divide where its pieces are concatenated."""

    items: ItemsSettings = DenseItemsSettings()
    width: Positive = Field(64, description="numbers of an item's vector")

    @model_validator(mode="after")
    def _splits_divide_width(self) -> "WithItems":
        items = self.items
        if isinstance(items, RecJPQItemsSettings) and items.composition == "concat" and self.width % items.splits:
            raise ValueError(f"width is {self.width}, items.splits is {items.splits}; expected a width that the splits divide")
        return self


class AttentionSlotSettings(Settings):
    """What an encoder must know of the attention it is given, whichever that is: the class of a new one says so too."""

    @property
    def knows_order(self) -> bool:
        """Whether it tells places apart by rotary positions, in heads of an even width; else its encoder has a table of max_history positions."""
        return False

    @property
    def reads_all(self) -> bool:
        """Whether it is given a whole history, as one can be whose work does not grow with the square; else the newest max_history events."""
        return False


class FullAttentionSettings(AttentionSlotSettings):
    """Every event looks at every earlier one, or, in a bidirectional encoder, at every other."""

    kind: Literal["full"] = "full"
    positions: Literal["rotary", "learned"] = Field(
        "rotary", description="rotary: RoPE in each layer, as in blossom; learned: a table of max_history vectors (the encoders' papers)"
    )

    @property
    def knows_order(self) -> bool:
        return self.positions == "rotary"


class BlossomSettings(AttentionSlotSettings):
    """BlossomRec (Ma et al., WWW 2026): the blocks that matter (long-term) and power-of-two distances (short-term), mixed by a learned gate."""

    kind: Literal["blossom"] = "blossom"
    kv_heads: Positive = Field(1, description="key/value heads; must divide the query heads (the released code: 2 for 8)")
    window: Positive = Field(8, description="w: newest keys that the short-term path always sees")
    block: Positive = Field(16, description="l': keys of a selected block; a multiple of the stride")
    compression: Positive = Field(32, description="l: keys that one compressed block summarises")
    stride: Positive = Field(16, description="s: keys between two compressed blocks")
    selected: Positive = Field(4, description="k: blocks each query and key/value head selects")
    selector: Literal["frozen", "straight_through", "compressed"] = Field(
        "frozen", description="frozen: the released code, whose selector gets no gradient; straight_through and compressed train it"
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.block % self.stride:
            raise ValueError(f"block {self.block} must be a multiple of stride {self.stride}")
        if self.compression < self.stride:
            raise ValueError(f"compression {self.compression} must be at least stride {self.stride}: keys between windows would be in none")
        return self

    @property
    def knows_order(self) -> bool:
        return True

    @property
    def reads_all(self) -> bool:
        return True


AttentionSettings = Annotated[FullAttentionSettings | BlossomSettings, Field(discriminator="kind")]
