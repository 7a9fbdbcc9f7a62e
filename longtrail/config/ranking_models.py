"""Settings of the models that rank a candidate set."""

from typing import Annotated, Literal

from pydantic import Field

from longtrail.config.base import Count, Positive, PositiveFloat, Rate, Settings
from longtrail.config.slots import WithItems


class PopularityRankerSettings(Settings):
    """Candidates by a statistic of the item alone: its clicks, or its smoothed click rate."""

    stage: Literal["ranking"] = "ranking"
    kind: Literal["popularity"] = "popularity"
    by: Literal["clicks", "click_rate"] = "clicks"


class RankerSettings(WithItems):
    """What every trained ranker shares."""

    stage: Literal["ranking"] = "ranking"
    width: Positive = Field(16, description="embedding width of each behaviour field (item, category)")
    hidden: tuple[Positive, ...] = (200, 80)
    dropout: Rate = 0.0
    max_history: Positive = 200
    learning_rate: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Positive = Field(256, description="requests per step")
    max_epochs: Positive = 8
    patience: Positive = Field(2, description="epochs without a better validation metric before training stops")
    item_start: Literal["cooccurrence", "random"] = Field(
        "cooccurrence", description="item vectors start from an SVD of who had to do with what in the training period, or at random"
    )


class DINSettings(RankerSettings):
    """Deep interest network (Zhou et al., KDD 2018) over the whole history."""

    kind: Literal["din"] = "din"
    attention_hidden: Annotated[tuple[Positive, ...], Field(min_length=1)] = (32,)
    attention_weights: Literal["linear", "sigmoid", "softmax"] = Field(
        "linear", description="linear: the paper; softmax: its code; sigmoid: SAM's DIN"
    )


class SAMSettings(RankerSettings):
    """Sparse attentive memory (Lin et al., CIKM 2022)."""

    kind: Literal["sam"] = "sam"
    passes: Positive = 3
    attention_hidden: Positive = 8
    compression: Count = Field(16, description="units of the attention-vector compression; 0 leaves it out")
    feedback: bool = Field(True, description="later passes attend with the updated memory (the paper); False is the released code")
    read_scale: Literal["none", "sqrt", "mean"] = Field("none", description="divide the read vector by 1 (paper), sqrt(n) or 1 + sum of weights")
    attention_init: Literal["zero", "log_length"] = Field(
        "zero", description="first bias of the weights: 0 (paper), or -log(max_history / 8): few at first"
    )


RankerModel = Annotated[PopularityRankerSettings | DINSettings | SAMSettings, Field(discriminator="kind")]
