"""params.yaml as one strict typed object: an unknown key or a bad value is an error that names it."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic import ValidationError as PydanticError

from longtrail.config.base import AS_WRITTEN, AtMost, ModelName, Positive, PositiveFloat, Seed, Settings
from longtrail.config.cluster import ClusterSettings
from longtrail.config.data import Dataset, FeatureSettings, IngestSettings, MovieLensDataset, SplitSettings, ValidationSettings
from longtrail.config.experiments import CHAMPION, INCUMBENT, PACKAGED
from longtrail.config.judging import RETRIEVAL_METRICS, ABTestSettings, EvaluationSettings, SelectionSettings
from longtrail.config.messages import explain
from longtrail.config.ranking_models import DINSettings, PopularityRankerSettings, RankerModel, SAMSettings
from longtrail.config.reading import read_settings
from longtrail.config.retrieval import RetrievalSettings
from longtrail.config.retrieval_models import PopularityRetrieverSettings, RetrieverModel, SASRecSettings
from longtrail.config.serving import ServingSettings
from longtrail.errors import ConfigError

Model = Annotated[RetrieverModel | RankerModel, Field(discriminator="stage")]


class TrainingSettings(Settings):
    """How all models are trained; what differs by model stands with the model."""

    seed: Seed = Field(0, description="of the weights' starts, the order of batches and what is sampled")
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="what models are trained on; auto: a GPU where there is one")
    devices: Positive = Field(1, description="GPUs of this machine that share the work of each step: the batch is cut, not multiplied")
    accumulate: Positive = Field(
        1, description="pieces that each device cuts its share of a batch into, one after the other: the same step in less memory, and slower"
    )
    checkpoint_steps: Positive | None = Field(
        None, description="steps after which a resume file is written within an epoch too, for epochs of hours; null: after each epoch only"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 elsewhere")
    gradient_clip: PositiveFloat = Field(1.0, description="longest gradient of a step, by its norm; 1e9 clips none")
    threads: Positive = Field(2, description="CPU threads")
    validation_targets_per_user: AtMost = Field(
        20, description="retrieval: first next-items of each user that early stopping looks at. The step `evaluate` has its own setting"
    )


class PipelineSettings(Settings):
    models: tuple[str, ...] = Field(
        ("popular_items", "sasrec", "popularity", "click_rate", "din", "sam"), description="the models of `models` that this run trains and compares"
    )


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
    models: dict[ModelName, Model] = Field(default_factory=_default_models)
    pipeline: PipelineSettings = PipelineSettings()
    training: TrainingSettings = TrainingSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
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
        for model in self.serving.experiment.models:
            ranking = model in self.pipeline.models and self.models[model].stage == "ranking"
            if model not in (PACKAGED, CHAMPION, INCUMBENT) and not ranking:
                raise ValueError(
                    f"serving.experiment names the model {model!r}; expected champion, incumbent, packaged or a ranking model that is run"
                )
        return self

    @model_validator(mode="after")
    def _selection_is_by_what_is_measured(self) -> "Config":
        """Where both sections are there: a step of a cluster is given only those that it reads."""
        if {"evaluation", "selection"} <= self.model_fields_set and (wrong := self.unmeasured()):
            raise ValueError(wrong)
        return self

    def unmeasured(self) -> str:
        """What is wrong where retrievers would be selected by a metric at a k that nothing is evaluated at; else empty."""
        found = RETRIEVAL_METRICS.fullmatch(metric := self.selection.retrieval.metric)
        k = None if found is None else found[1]
        if k is None or int(k) in self.evaluation.k:
            return ""
        return f"selection.retrieval.metric is {metric!r}; evaluation.k is {list(self.evaluation.k)}; expected {k} among them"


def parse_config(values: Any, *, name: str = "params.yaml") -> Config:
    """Raises ConfigError that lists every bad key of `values` by its dotted path."""
    try:
        return Config.model_validate(values, context=AS_WRITTEN)
    except PydanticError as error:
        raise ConfigError("\n".join(f"{name}: {line}" for line in explain(error, Config))) from None


def load_config(path: Path, *, whole: bool = False) -> Config:
    """Read params.yaml. Raises ConfigError naming the file and every bad key.

    With `whole`, the defaults of sections that are not written must fit those that are; what a step of a cluster is given is no whole file.
    """
    config = parse_config(read_settings(Path(path)), name=str(path))
    if whole and (wrong := config.unmeasured()):
        raise ConfigError(f"{path}: {wrong}")
    return config
