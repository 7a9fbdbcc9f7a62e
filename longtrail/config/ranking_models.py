"""Settings of the models that rank a candidate set."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

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
    listwise: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of the listwise loss over a request's set beside the cross-entropy")
    sampled_candidates: Count = Field(
        0, description="training: unlabelled candidates that join each request's set, drawn from what was shown just before; for logs of single items"
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
    enhancement: Count = Field(0, description="steps that refine the last memory with the target; 3 is SAM-3P+")
    attention_weights: Literal["sigmoid", "scaled_sigmoid", "softmax", "softmax_eps"] = Field(
        "sigmoid", description="sigmoid: the paper; scaled_sigmoid: sigmoid(l / sqrt(D)); softmax_eps: exp(l - max) / (sum + 0.01)"
    )
    read_scale: Literal["none", "sqrt", "mean", "norm"] = Field(
        "none", description="the read vector as it is (paper), divided by sqrt(n) or 1 + sum of weights, or normalised to unit variance"
    )
    attention_init: Literal["zero", "log_length"] = Field(
        "zero", description="first bias of the weights: 0 (paper), or -log(max_history / 8): few at first"
    )


class IFASettings(RankerSettings):
    """A reconstruction of interaction fidelity attention (Yu et al., 2024)."""

    kind: Literal["ifa"] = "ifa"
    layers: Positive = 1
    heads: Positive = Field(4, description="must divide twice the width")
    feature_map: Literal["elu1", "relu", "squared_relu", "shares", "efficient", "linrec", "softmax"] = Field(
        "elu1", description="of linear attention; softmax is exact attention, the oracle to compare with: no user state"
    )
    features: Positive | None = Field(None, description="features of a head; null is 2 · width / heads")
    temperature: PositiveFloat = Field(1.0, description="first sharpness of each head's feature map; learned")
    half_life_days: PositiveFloat | None = Field(None, description="first half-life of the slowest head's memory; null forgets nothing")
    recent_events: Count = Field(0, description="newest events that exact attention reads beside the sums")
    relation: Literal["softmax", "linear", "none"] = Field("softmax", description="attention among the candidates; linear for sets beyond some 500")
    relation_dropout: Rate = Field(0.15, description="share of training requests scored without the relation")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "IFASettings":
        if 2 * self.width % self.heads:
            raise ValueError(f"width is {self.width}, heads is {self.heads}; expected heads that divide twice the width")
        return self


RankerModel = Annotated[PopularityRankerSettings | DINSettings | SAMSettings | IFASettings, Field(discriminator="kind")]
