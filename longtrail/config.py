"""params.yaml as strict typed objects: an unknown key or a bad value is an error that names it. The one place settings are described.

This module imports neither torch nor a data-frame library, so that every command can read its settings at once.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic import ValidationError as PydanticError

from longtrail.errors import ConfigError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


class Settings(BaseModel):
    """Base of all settings: keyword-only, immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


# ---------------------------------------------------------------- datasets


class MovieLensDataset(Settings):
    """MovieLens in any of its official layouts. Each rating is an interaction and an impression whose click is `rating >= like_from`."""

    kind: Literal["movielens"] = "movielens"
    source: str = Field("ml-100k", description="a variant (ml-100k, ml-1m, ml-latest-small, ml-20m, ml-25m, ml-32m) or a path to its zip or folder")
    like_from: float = Field(4.0, description="a rating this high counts as a click")


class OpenBanditDataset(Settings):
    """ZOZO's Open Bandit Dataset: real impressions with true propensities."""

    kind: Literal["open_bandit"] = "open_bandit"
    source: str = Field("small", description="'small' (10,000 rows a file, from the package index), 'full' (11 GB), or a path to its folder or zip")
    policy: Literal["random", "bts"] = "random"
    campaign: Literal["all", "men", "women"] = "all"


class EventColumns(Settings):
    """Which column of a user's own log holds what. Only user, item and timestamp are needed."""

    user: str
    item: str
    timestamp: str
    written_at: str | None = Field(None, description="when the row was written, where the log knows: guards against late rows")
    action: str | None = None
    value: str | None = None
    category: str | None = None
    title: str | None = None
    click: str | None = Field(None, description="0/1: makes the file a log of impressions")
    request: str | None = Field(None, description="the list an item was shown in; default: user and timestamp")
    position: str | None = None
    propensity: str | None = None
    policy: str | None = None


class EventLogDataset(Settings):
    """Any CSV or Parquet log, by a column mapping.

    A file with a `click` column is a log of impressions; its clicks are also the interactions. A file without one is a log of
    interactions; where `like_from` is set, `value >= like_from` is the click of an impression made of each event.
    """

    kind: Literal["event_log"] = "event_log"
    source: str = Field(description="a CSV or Parquet file, or a glob of them")
    columns: EventColumns
    delimiter: str = ","
    encoding: Literal["utf-8", "utf-16", "latin-1"] = "utf-8"
    timestamp_unit: Literal["s", "ms", "us", "iso"] = Field("s", description="numbers since 1970 in this unit, or ISO 8601 text")
    click_actions: tuple[str, ...] = Field((), description="actions that count as a click where there is no click column")
    like_from: float | None = None
    first_position: Literal[0, 1] = Field(1, description="what the log calls the top of a list")
    propensity_kind: Literal["conditional", "marginal", "none"] = "none"
    events: str | None = Field(None, description="a file or glob of further interactions, beside a log of impressions")
    event_columns: EventColumns | None = Field(None, description="the columns of `events`; default: as in `columns`, without those of impressions")
    candidates: str | None = Field(None, description="a file or glob of what each request could have shown: the columns of request and item")


class WorldDataset(Settings):
    """A simulated world whose truth is known (longtrail/datasets/world.py)."""

    kind: Literal["world"] = "world"
    users: Positive = 1_000
    items: Positive = 2_000
    categories: Positive = 20
    events_per_user: Positive = Field(100, description="organic events of an average user; users differ")
    slate: Positive = Field(5, description="items shown in a request")
    requests_per_user: Positive = Field(20, description="lists shown to an average user")
    candidates: Positive = Field(20, description="items the logging policy chooses a list from")
    logger_temperature: PositiveFloat = Field(1.0, description="Plackett-Luce temperature of the logging policy")
    click_logit: float = Field(-2.5, description="logit of P(click) for an average examined item: sets the world's click rate")
    stop_after_click: Share = Field(0.0, description="P(the user leaves the list after a click): 0 independent positions, 1 a cascade")
    seed: int = 0


Dataset = Annotated[MovieLensDataset | OpenBanditDataset | EventLogDataset | WorldDataset, Field(discriminator="kind")]


class IngestSettings(Settings):
    max_quarantined_share: Share = Field(0.01, description="more rejected rows than this stops the pipeline")
    memory_limit: str = Field("2GB", description="DuckDB's memory; beyond it DuckDB spills to disk")
    threads: Positive = 2


# ---------------------------------------------------------------- validation, features, split


class ValidationSettings(Settings):
    """Bounds of the distribution expectations; the schema's own expectations need none."""

    click_rate: tuple[Share, Share] = (0.001, 0.99)
    min_users: Positive = 10
    min_items: Positive = 10
    min_events: Positive = 100
    median_history_length: tuple[Count, Count] = (1, 100_000)
    max_new_item_share: Share = Field(0.8, description="items first seen in the test period")
    max_duplicate_share: Share = 0.05
    max_top_item_share: Share = Field(0.5, description="interactions that are with the most popular item")
    warn_only: tuple[str, ...] = Field((), description="names of critical distribution expectations that should only warn")


class FeatureSettings(Settings):
    online_store: Literal["sqlite", "redis"] = "sqlite"
    redis_address: str = "localhost:6379"
    online_history_length: Positive = Field(1_000, description="newest events of each user kept in the online store")


class SplitSettings(Settings):
    """Global in time: train < t1 <= valid < t2 <= test. Leave-one-out (each user's last event) is there to reproduce papers."""

    kind: Literal["temporal", "leave_one_out"] = "temporal"
    valid_share: Share = Field(0.1, description="share of the log's rows, newest but one")
    test_share: Share = Field(0.1, description="share of the log's rows, newest")


# ---------------------------------------------------------------- models


class PopularityRetrieverSettings(Settings):
    """Items by their interactions in the training period, the same list for everyone."""

    stage: Literal["retrieval"] = "retrieval"
    kind: Literal["popularity"] = "popularity"


class SASRecSettings(Settings):
    """Self-attentive sequential recommendation (Kang & McAuley, ICDM 2018)."""

    stage: Literal["retrieval"] = "retrieval"
    kind: Literal["sasrec"] = "sasrec"
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


class PopularityRankerSettings(Settings):
    """Candidates by a statistic of the item alone: its clicks, or its smoothed click rate."""

    stage: Literal["ranking"] = "ranking"
    kind: Literal["popularity"] = "popularity"
    by: Literal["clicks", "click_rate"] = "clicks"


class RankerSettings(Settings):
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


RetrieverModel = Annotated[PopularityRetrieverSettings | SASRecSettings, Field(discriminator="kind")]
RankerModel = Annotated[PopularityRankerSettings | DINSettings | SAMSettings, Field(discriminator="kind")]
Model = Annotated[RetrieverModel | RankerModel, Field(discriminator="stage")]


class TrainingSettings(Settings):
    """How all models are trained; what differs by model stands with the model."""

    seed: int = 0
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Positive = 1
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 elsewhere")
    gradient_clip: PositiveFloat = 1.0
    threads: Positive = Field(2, description="CPU threads")
    validation_targets_per_user: Positive | None = Field(
        20, description="retrieval: first next-items of each user that early stopping looks at; null is all. The step `evaluate` has its own setting"
    )


# ---------------------------------------------------------------- judging


class EvaluationSettings(Settings):
    k: tuple[Positive, ...] = (10, 50)
    max_targets_per_user: Positive | None = Field(None, description="retrieval: first next-items of each user in the split; null is all")
    confidence: Share = 0.95
    replicates: Positive = Field(1_000, description="bootstrap replicates, resampled by user")
    latency_requests: Positive = Field(100, description="requests that are timed, one by one")
    latency_candidates: Positive = Field(200, description="candidates a request ranks, and items a request retrieves")
    threads: Positive = Field(2, description="CPU threads")


class StageSelection(Settings):
    """The champion of a stage: the best metric on the validation split among models within the budgets on latency and size."""

    metric: str
    max_latency_ms: PositiveFloat = Field(description="p99 of one request, model alone")
    max_bytes: PositiveFloat


class SelectionSettings(Settings):
    retrieval: StageSelection = StageSelection(metric="ndcg@10", max_latency_ms=100, max_bytes=1e9)
    ranking: StageSelection = StageSelection(metric="auc", max_latency_ms=100, max_bytes=1e9)
    incumbent: str = Field("popularity", description="the ranker in service: the A/B test asks whether the champion beats it")


class ABTestSettings(Settings):
    """Offline A/B test. The bandit conversion is used where the log has no propensities."""

    source: Literal["auto", "log", "bandit"] = Field("auto", description="auto: the log where it has propensities, else the bandit conversion")
    temperature: PositiveFloat = Field(0.5, description="softmax temperature of both policies over a request's standardised scores")
    logger_temperature: PositiveFloat = Field(1.0, description="bandit conversion: temperature of the logging policy, which ranks as the incumbent")
    max_candidates: Positive = Field(20, description="bandit conversion: a request is this many consecutive items of a user's test period")
    rounds: Positive = Field(20, description="bandit conversion: independent draws of the logger for each request")
    confidence: Share = 0.95
    replicates: Positive = 2_000
    min_effective_sample: PositiveFloat = Field(100, description="below it the verdict is 'not enough data'")
    max_weight_share: Share = Field(0.1, description="one user's share of all weight above which the verdict is 'not enough data'")
    seed: int = 0


class ServingSettings(Settings):
    retrieve: Positive = Field(200, description="candidates that /recommend takes from the retriever")
    max_candidates: Positive = 1_000
    max_k: Positive = 200
    max_events: Positive = 1_000
    max_body_bytes: Positive = Field(1_048_576, description="a larger request is refused with 413")
    explore_temperature: Annotated[float, Field(ge=0)] = Field(0.1, description="Plackett-Luce temperature; 0 always shows the best list")
    threads: Positive = Field(1, description="CPU threads of the models for one request")
    port: Annotated[int, Field(gt=0, lt=65536)] = 3000


class PipelineSettings(Settings):
    models: tuple[str, ...] = Field(
        ("popular_items", "sasrec", "popularity", "click_rate", "din", "sam"), description="the models of `models` that this run trains and compares"
    )


class ClusterSettings(Settings):
    """How the compiled Kubeflow pipeline runs its steps."""

    image: str = Field("longtrail:latest", description="the container image every step runs in")
    parallelism: Positive = Field(2, description="models trained at the same time")
    gpus: Count = Field(0, description="GPUs that each training step asks for")
    gpu_type: str = "nvidia.com/gpu"
    cpu: str = "2"
    memory: str = "8G"
    retries: Count = Field(2, description="times a step is tried again, after a back-off, when its pod fails")


def _default_models() -> dict[str, "Model"]:
    return {
        "popular_items": PopularityRetrieverSettings(),
        "sasrec": SASRecSettings(),
        "popularity": PopularityRankerSettings(),
        "click_rate": PopularityRankerSettings(by="click_rate"),
        "din": DINSettings(),
        "sam": SAMSettings(),
    }


class Config(Settings):
    """The whole of params.yaml. Every section has a default, so that a file may hold only what differs."""

    dataset: Dataset = MovieLensDataset()
    ingest: IngestSettings = IngestSettings()
    validation: ValidationSettings = ValidationSettings()
    features: FeatureSettings = FeatureSettings()
    split: SplitSettings = SplitSettings()
    models: dict[str, Model] = Field(default_factory=_default_models)
    pipeline: PipelineSettings = PipelineSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    selection: SelectionSettings = SelectionSettings()
    ab_test: ABTestSettings = ABTestSettings()
    serving: ServingSettings = ServingSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _names_exist(self) -> "Config":
        known = ", ".join(self.models)
        for name in self.pipeline.models:
            if name not in self.models:
                raise ValueError(f"pipeline.models names {name!r}; models has {known}")
        for stage in ("retrieval", "ranking"):
            if not any(self.models[name].stage == stage for name in self.pipeline.models):
                raise ValueError(f"pipeline.models has no {stage} model; each stage needs one")
        incumbent = self.selection.incumbent
        if incumbent not in self.pipeline.models or self.models[incumbent].stage != "ranking":
            raise ValueError(f"selection.incumbent is {incumbent!r}; expected one of the ranking models of pipeline.models")
        if not any(self.models[name].stage == "ranking" and name != incumbent for name in self.pipeline.models):
            raise ValueError(f"pipeline.models has no ranking model beside the incumbent {incumbent!r}; expected one to challenge it")
        return self


def parse_config(values: Any, *, name: str = "params.yaml") -> Config:
    """Raises ConfigError that lists every bad key of `values` by its dotted path."""
    try:
        return Config.model_validate(values)
    except PydanticError as error:
        lines = [f"{name}: {_dotted(e['loc']) or 'top level'}: {_plain(e)}" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def load_config(path: Path) -> Config:
    """Read params.yaml. Raises ConfigError naming the file and every bad key."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a params.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    return parse_config(values, name=str(path))


def _dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location)


def _plain(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key"
    if error["type"] == "missing":
        return "missing"
    return f"{error['msg']}, got {error['input']!r}" if error["type"] != "value_error" else str(error["ctx"]["error"])
