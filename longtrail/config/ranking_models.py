"""Settings of the models that rank a candidate set."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from longtrail.config.base import Count, HistoryLength, LearningRate, MeanDecay, Positive, PositiveFloat, Rate, Settings
from longtrail.config.slots import WithItems


class PopularityRankerSettings(Settings):
    """Candidates by a statistic of the item alone: its clicks, or its smoothed click rate."""

    stage: Literal["ranking"] = "ranking"
    kind: Literal["popularity"] = "popularity"
    by: Literal["clicks", "click_rate"] = Field(
        "clicks", description="clicks: their number in the training period; click_rate: clicks by impressions, smoothed"
    )


class RankerSettings(WithItems):
    """What every trained ranker shares."""

    stage: Literal["ranking"] = "ranking"
    width: Positive = Field(16, description="embedding width of each behaviour field (item, category)")
    hidden: tuple[Positive, ...] = Field((200, 80), description="units of the layers of the network over what was read, the head")
    dropout: Rate = Field(0.0, description="share of the network's units left out in training")
    max_history: HistoryLength = 200
    learning_rate: LearningRate = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's decay of matrices; biases and scales are spared")
    weight_average: MeanDecay = 0.99  # a pass over a large log is a few thousand steps, and the newest hundred already calm it
    batch_size: Positive = Field(256, description="requests per step")
    max_epochs: Positive = Field(8, description="passes over the training examples, at most")
    patience: Positive = Field(2, description="epochs without a better validation metric before training stops")
    item_start: Literal["cooccurrence", "random"] = Field(
        "cooccurrence",
        description="item vectors start from an SVD of who had to do with what in the training period (its older half where that tells clicks), "
        "or at random",
    )
    listwise: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of the listwise loss over a request's set beside the cross-entropy")
    sampled_candidates: Count = Field(
        0, description="training: unlabelled candidates that join each request's set, drawn from what was shown just before; for logs of single items"
    )

    def idle(self) -> Iterator[tuple[str, str]]:
        if not self.listwise and not self._looks_across():
            yield "sampled_candidates", "listwise: 0: no part of the loss looks at candidates without a label"

    def _looks_across(self) -> bool:
        """Whether a candidate's logit depends on the others."""
        return False


class DINSettings(RankerSettings):
    """Deep interest network (Zhou et al., KDD 2018) over the whole history."""

    kind: Literal["din"] = "din"
    attention_hidden: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        (32,), description="units of the layers of the network that weighs a behaviour for a candidate"
    )
    attention_weights: Literal["linear", "sigmoid", "softmax"] = Field(
        "linear", description="linear: the paper; softmax: its code; sigmoid: as in the DIN that SAM is compared with, whose sizes are others"
    )
    attention_init: Literal["random", "similarity"] = Field("random", description="similarity: half the units start as q · k (ours)")

    @model_validator(mode="after")
    def _one_layer_starts(self) -> "DINSettings":
        if self.attention_init == "similarity" and len(self.attention_hidden) > 1:
            raise ValueError(f"attention_init: similarity with {len(self.attention_hidden)} layers in attention_hidden; expected one")
        return self


class SAMSettings(RankerSettings):
    """Sparse attentive memory (Lin et al., CIKM 2022)."""

    kind: Literal["sam"] = "sam"
    passes: Positive = Field(3, description="times the memory reads the history")
    attention_hidden: Positive = Field(8, description="units of the network that weighs a behaviour")
    compression: Count = Field(16, description="units of the attention-vector compression; 0 leaves it out")
    feedback: bool = Field(True, description="later passes attend with the updated memory (the paper); False is the released code")
    enhancement: Count = Field(0, description="steps that refine the last memory with the target; 3 is SAM-3P+")
    attention_weights: Literal["sigmoid", "scaled_sigmoid", "softmax", "softmax_eps"] = Field(
        "sigmoid", description="sigmoid: the released code; scaled_sigmoid: sigmoid(l / sqrt(D)); softmax_eps: exp(l - max) / (sum + 0.01)"
    )
    read_scale: Literal["none", "norm", "sqrt", "mean"] = Field(
        "norm",
        description="none: the read vector as it is (the released code; the default of softmax weights, whose sum is a mean already); "
        "norm: to unit variance; sqrt: divided by sqrt(n); mean: by 1 + sum of weights (all three ours)",
    )
    attention_init: Literal["zero", "log_length", "similarity"] = Field(
        "similarity",
        description="zero: the released code; log_length: the weights' bias starts at -log(max_history / 8), few at first; "
        "similarity: half the units start as q · k (both ours)",
    )

    @model_validator(mode="before")
    @classmethod
    def _a_mean_is_not_scaled(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "read_scale" not in values and str(values.get("attention_weights")).startswith("softmax"):
            return {**values, "read_scale": "none"}
        return values

    def idle(self) -> Iterator[tuple[str, str]]:
        yield from super().idle()
        if self.attention_init == "log_length" and self.attention_weights in ("softmax", "softmax_eps"):
            yield "attention_init", f"attention_weights: {self.attention_weights}, which takes a bias away again"
        if self.passes == 1:
            yield "feedback", "passes: 1: there is no later pass"


class IFASettings(RankerSettings):
    """A reconstruction of interaction fidelity attention (Yu et al., 2024)."""

    kind: Literal["ifa"] = "ifa"
    listwise: Annotated[float, Field(ge=0)] = Field(0.05, description="weight of the listwise loss over a request's set beside the cross-entropy")
    layers: Positive = Field(1, description="times that the candidates read the history, one layer after the other")
    heads: Positive = Field(1, description="of linear attention, each with features of its own; must divide twice the width")
    exact_heads: Positive = Field(
        4, description="of attention to candidates, to newest events, and of feature_map softmax; must divide twice the width"
    )
    feature_map: Literal["clusters", "elu1", "relu", "squared_relu", "shares", "efficient", "linrec", "softmax"] = Field(
        "clusters",
        description="of linear attention. clusters: memberships that start as clusters of the items' vectors; the others start at random; "
        "softmax is exact attention, the oracle to compare with: no user state",
    )
    features: Positive = Field(32, description="features of a head: more see finer differences, and cost as much more")
    prior_events: PositiveFloat = Field(1.0, description="clusters: what is read of m alike events counts m / (m + this); learned")
    temperature: PositiveFloat = Field(6.0, description="first sharpness of each head's feature map; learned")
    half_life_days: PositiveFloat | None = Field(None, description="first half-life of the slowest head's memory; null forgets nothing")
    recent_events: Count = Field(0, description="newest events that exact attention reads beside the sums; all, where max_history is less")
    relation: Literal["softmax", "linear", "none"] = Field("softmax", description="attention among the candidates; linear for sets beyond some 500")
    relation_dropout: Rate = Field(0.15, description="share of training requests scored without the relation")

    @model_validator(mode="after")
    def _parts_fit(self) -> "IFASettings":
        idle = dict(self.idle())
        for name in ("heads", "exact_heads"):
            if name not in idle and 2 * self.width % getattr(self, name):
                raise ValueError(f"width is {self.width}, {name} is {getattr(self, name)}; expected {name} that divide twice the width")
        if self.half_life_days is not None and self.feature_map in ("linrec", "softmax"):
            raise ValueError(f"half_life_days with feature_map {self.feature_map}; expected a feature map that divides by the sum of its weights")
        return self

    def _looks_across(self) -> bool:
        return self.relation != "none"

    def idle(self) -> Iterator[tuple[str, str]]:
        yield from super().idle()
        for name in ("heads", "features", "temperature") if self.feature_map == "softmax" else ():
            yield name, "feature_map: softmax"
        if self.feature_map != "clusters":
            yield "prior_events", f"feature_map: {self.feature_map}"
        if self.relation == "none":
            yield "relation_dropout", "relation: none"
        if self.relation == "none" and self.feature_map != "softmax" and not self.recent_events:
            yield "exact_heads", f"feature_map: {self.feature_map}, recent_events: 0 and relation: none"


class MeanPoolingSettings(RankerSettings):
    """The mean of the behaviours, the same for every candidate (as YouTube's DNN, Covington et al., RecSys 2016)."""

    kind: Literal["mean_pooling"] = "mean_pooling"


class DIENSettings(RankerSettings):
    """Deep interest evolution network (Zhou et al., AAAI 2019): step by step through the history, for short ones."""

    kind: Literal["dien"] = "dien"
    max_history: HistoryLength = 50
    attention_hidden: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        (80, 40), description="units of the layers of the network that weighs a state for a candidate"
    )


class TwoStageSettings(RankerSettings):
    """What the two-stage family shares: a search picks `top_k` behaviours for each candidate, multi-head attention reads them."""

    top_k: Positive = Field(50, description="behaviours that each candidate reads, at most max_history")
    heads: Positive = Field(4, description="of the attention; must divide twice the width")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if 2 * self.width % self.heads:
            raise ValueError(f"width is {self.width}, heads is {self.heads}; expected heads that divide twice the width")
        return self

    def beyond(self) -> Iterator[tuple[str, str]]:
        yield "top_k", "max_history"


class SIMSettings(TwoStageSettings):
    """Search-based interest model (Pi et al., CIKM 2020)."""

    kind: Literal["sim"] = "sim"
    search: Literal["hard", "soft"] = Field("hard", description="hard: the newest of the candidate's category; soft: by a learned inner product")


class ETASettings(TwoStageSettings):
    """End-to-end target attention (Chen et al., 2021): search by Hamming distance of SimHashes."""

    kind: Literal["eta"] = "eta"
    bits: Annotated[int, Field(gt=0, le=64)] = Field(32, description="bits of a SimHash")


class TWINSettings(TwoStageSettings):
    """Two-stage interest network (Chang et al., KDD 2023): search by the very score of the attention."""

    kind: Literal["twin"] = "twin"


class SDIMSettings(RankerSettings):
    """Sampling-based deep interest modelling (Cao et al., CIKM 2022): attention to the behaviours whose hashes collide with the candidate's."""

    kind: Literal["sdim"] = "sdim"
    hashes: Positive = Field(16, description="signatures of each item")
    bits: Annotated[int, Field(gt=0, le=10)] = Field(3, description="bits of a signature: with each one, half as many behaviours collide")


RankerModel = Annotated[
    PopularityRankerSettings
    | MeanPoolingSettings
    | DINSettings
    | DIENSettings
    | SIMSettings
    | ETASettings
    | TWINSettings
    | SDIMSettings
    | SAMSettings
    | IFASettings,
    Field(discriminator="kind"),
]
