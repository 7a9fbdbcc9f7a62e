"""Settings of the models that search the whole catalogue."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from longtrail.config.base import HistoryLength, LearningRate, MeanDecay, Positive, PositiveFloat, Rate, Settings, Share
from longtrail.config.slots import AttentionSettings, BlossomSettings, FullAttentionSettings, WithItems


class PopularityRetrieverSettings(Settings):
    """Items by their interactions in the training period, the same list for everyone."""

    stage: Literal["retrieval"] = "retrieval"
    kind: Literal["popularity"] = "popularity"


class MarkovSettings(Settings):
    """What people did right after the last item, smoothed towards popularity: the baseline of every sequence model."""

    stage: Literal["retrieval"] = "retrieval"
    kind: Literal["markov"] = "markov"
    smoothing: PositiveFloat = Field(10.0, description="weight of popularity, in observed transitions")


class EncoderSettings(WithItems):
    """What every trained encoder of histories shares."""

    stage: Literal["retrieval"] = "retrieval"
    dropout: Rate = Field(0.2, description="share of the network's values left out in training")
    max_history: HistoryLength = 200
    loss: Literal["softmax", "sampled_softmax", "gbce", "bce", "lambdarank"] = Field(
        "softmax", description="softmax: over the whole catalogue; bce: one negative; lambdarank: GRU4Rec's in the RecJPQ paper"
    )
    negatives: Positive = Field(256, description="gbce and sampled_softmax: sampled negatives per target")
    gbce_t: Share = Field(0.75, description="gbce: calibration, 0 is plain BCE, 1 fully calibrated")
    gbce_prior: bool = Field(True, description="gbce: logits start at the odds of a positive (ours; ranks alike, learns at once); false: the paper")
    learning_rate: LearningRate = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's decay of matrices; biases and scales are spared")
    weight_average: MeanDecay = 0.999
    batch_size: Positive = Field(128, description="windows per step")
    max_epochs: Positive = Field(40, description="passes over the training windows, at most")
    patience: Positive = Field(5, description="epochs without a better validation metric before training stops")

    def idle(self) -> Iterator[tuple[str, str]]:
        if self.loss not in ("gbce", "sampled_softmax"):
            yield "negatives", f"loss: {self.loss}"
        if self.loss != "gbce":
            yield "gbce_t", f"loss: {self.loss}"
            yield "gbce_prior", f"loss: {self.loss}"


class TransformerSettings(EncoderSettings):
    """Encoders made of transformer blocks."""

    attention: AttentionSettings = FullAttentionSettings()
    blocks: Positive = Field(2, description="transformer blocks, one after the other")
    heads: Positive = Field(2, description="of the attention; must divide the width")

    @model_validator(mode="after")
    def _heads_fit(self) -> "TransformerSettings":
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, heads is {self.heads}; expected a width that the heads divide")
        if self.attention.knows_order and self.width // self.heads % 2:
            raise ValueError(f"width is {self.width}, heads is {self.heads}; expected heads of an even width: rotary positions turn pairs of numbers")
        if isinstance(self.attention, BlossomSettings) and self.heads % self.attention.kv_heads:
            raise ValueError(f"heads is {self.heads}, attention.kv_heads is {self.attention.kv_heads}; expected kv_heads that divide the heads")
        return self


class SASRecSettings(TransformerSettings):
    """Self-attentive sequential recommendation (Kang & McAuley, ICDM 2018). With `loss: gbce` it is gSASRec (Petrov & Macdonald, RecSys 2023), but
    for `gbce_prior` and for negatives that neighbouring targets share (losses/sampled.py), which are ours."""

    kind: Literal["sasrec"] = "sasrec"


class BERT4RecSettings(TransformerSettings):
    """Bidirectional encoder trained by filling in masked events (Sun et al., CIKM 2019)."""

    kind: Literal["bert4rec"] = "bert4rec"
    max_history: Annotated[int, Field(ge=2, le=1_000_000, description="events read and the mask after them")] = 200
    mask_share: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="share of a window's events that are masked, at least one")
    max_masked: Positive = Field(20, description="most events masked in a window")


class GRU4RecSettings(EncoderSettings):
    """Recurrent encoder (Hidasi et al., ICLR 2016)."""

    kind: Literal["gru4rec"] = "gru4rec"
    layers: Positive = Field(1, description="GRU layers, one over the other")


RetrieverModel = Annotated[
    PopularityRetrieverSettings | MarkovSettings | SASRecSettings | BERT4RecSettings | GRU4RecSettings, Field(discriminator="kind")
]
