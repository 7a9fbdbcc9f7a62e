"""Settings of the models that search the whole catalogue."""

from typing import Annotated, Literal

from pydantic import Field

from longtrail.config.base import Positive, PositiveFloat, Rate, Settings, Share
from longtrail.config.slots import AttentionSettings, FullAttentionSettings, WithItems


class PopularityRetrieverSettings(Settings):
    """Items by their interactions in the training period, the same list for everyone."""

    stage: Literal["retrieval"] = "retrieval"
    kind: Literal["popularity"] = "popularity"


class SASRecSettings(WithItems):
    """Self-attentive sequential recommendation (Kang & McAuley, ICDM 2018)."""

    stage: Literal["retrieval"] = "retrieval"
    kind: Literal["sasrec"] = "sasrec"
    attention: AttentionSettings = FullAttentionSettings()
    width: Positive = 64
    blocks: Positive = 2
    heads: Positive = 2
    dropout: Rate = 0.2
    max_history: Positive = 200
    loss: Literal["gbce", "softmax"] = "softmax"
    negatives: Positive = Field(256, description="gBCE: sampled negatives per position")
    gbce_t: Share = Field(0.75, description="gBCE: calibration, 0 is plain BCE, 1 fully calibrated")
    learning_rate: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Positive = Field(128, description="users per step")
    max_epochs: Positive = 40
    patience: Positive = Field(5, description="epochs without a better validation metric before training stops")


RetrieverModel = Annotated[PopularityRetrieverSettings | SASRecSettings, Field(discriminator="kind")]
