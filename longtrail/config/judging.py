"""Settings of what judges models: evaluation, selection, the offline A/B test."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from longtrail.config.base import AtMost, Confidence, Positive, PositiveFloat, Seed, Settings, Share

RANKING_METRICS = ("auc", "gauc", "request_gauc", "log_loss", "calibration_ratio", "ece")  # what evaluation measures of rankers
RETRIEVAL_METRICS = re.compile(r"mrr|(?:ndcg|recall|coverage)@([1-9]\d*)")  # and of retrievers, at each k of evaluation.k


class EvaluationSettings(Settings):
    k: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        (10, 50), description="lengths of the lists that retrieval metrics are measured at"
    )
    max_targets_per_user: Positive | None = Field(None, description="retrieval: first next-items of each user in the split; null is all")
    confidence: Confidence = 0.95
    replicates: Positive = Field(1_000, description="bootstrap replicates, resampled by user")
    latency_requests: Positive = Field(100, description="requests that are timed, one by one")
    latency_candidates: Positive = Field(200, description="candidates a request ranks, and items a request retrieves")
    latency_threads: Positive = Field(1, description="CPU threads of a timed request: as `serving.threads`, whose default this is")
    threads: Positive = Field(2, description="CPU threads")


class StageSelection(Settings):
    """The champion of a stage: the best metric on the validation split among models within the budgets on latency and size."""

    metric: str = Field(
        description="what the champion is best in; retrieval: mrr, ndcg@k, recall@k or coverage@k; "
        "ranking: auc, gauc, request_gauc, log_loss, calibration_ratio or ece"
    )
    max_latency_ms: PositiveFloat = Field(description="p99 of one request, model alone")
    max_bytes: PositiveFloat = Field(description="of the model's files")


class SelectionSettings(Settings):
    retrieval: StageSelection = StageSelection(metric="ndcg@10", max_latency_ms=100, max_bytes=1e9)
    ranking: StageSelection = StageSelection(metric="auc", max_latency_ms=100, max_bytes=1e9)
    incumbent: str = Field("popularity", description="the ranker in service: the A/B test asks whether the champion beats it")

    @model_validator(mode="after")
    def _metrics_exist(self) -> Self:
        if not RETRIEVAL_METRICS.fullmatch(self.retrieval.metric):
            raise ValueError(f"retrieval.metric is {self.retrieval.metric!r}; expected mrr, ndcg@k, recall@k or coverage@k, k of evaluation.k")
        if self.ranking.metric not in RANKING_METRICS:
            raise ValueError(f"ranking.metric is {self.ranking.metric!r}; expected one of {', '.join(RANKING_METRICS)}")
        return self


class ABTestSettings(Settings):
    """Offline A/B test. The bandit conversion is used where the log has no propensities."""

    source: Literal["auto", "log", "bandit"] = Field("auto", description="auto: the log where it has propensities, else the bandit conversion")
    temperature: PositiveFloat = Field(0.5, description="softmax temperature of both policies over a request's standardised scores")
    logger_temperature: PositiveFloat = Field(1.0, description="bandit conversion: temperature of the logging policy, which ranks as the incumbent")
    max_candidates: Positive = Field(20, description="bandit conversion: a request is this many consecutive items of a user's test period")
    max_requests_per_user: AtMost = Field(
        10, description="bandit conversion: first requests of each user that are judged, lest a few heavy users decide"
    )
    rounds: Positive = Field(20, description="bandit conversion: independent draws of the logger for each request")
    confidence: Confidence = 0.95
    replicates: Positive = Field(2_000, description="bootstrap replicates, resampled by user")
    min_effective_sample: PositiveFloat = Field(100, description="below it the verdict is 'not enough data'")
    max_weight_share: Share = Field(0.1, description="one user's share of all weight above which the verdict is 'not enough data'")
    margin: Share = Field(0.01, description="a difference smaller than this share of A's rate does not matter: the margin of 'equivalent'")
    challengers: Positive = Field(1, description="how many challengers were tried on this log, this one included: intervals widen with it")
    looks: bool = Field(False, description="the verdict is read again and again as the log grows: it then needs the any-time interval")
    guardrails: tuple[str, ...] = Field((), description="segments in which B may not be worse, such as 'user: new': with a broken one A is kept")
    multiplicity: Literal["holm", "by", "bh"] = Field("holm", description="how p-values of segments are adjusted: see docs/ab_testing.md")
    seed: Seed = Field(0, description="of the bandit conversion, of cross-fitting and of the bootstrap")
