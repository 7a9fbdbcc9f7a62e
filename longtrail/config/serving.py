"""Settings of the endpoint (`serving`)."""

from typing import Annotated, Literal

from pydantic import Field

from longtrail.config.base import Positive
from longtrail.config.event_log import EventLogSettings
from longtrail.config.experiments import AnswerLogSettings, ExperimentSettings
from longtrail.config.guarding import GuardingSettings
from longtrail.config.observing import DriftSettings, EvidenceSettings, LogSettings


class ServingSettings(GuardingSettings):
    retrieve: Positive = Field(200, description="candidates that /recommend takes from the retriever")
    max_candidates: Positive = Field(1_000, description="items that a request may name to be ranked")
    max_k: Positive = Field(200, description="items that a request may ask for")
    max_events: Positive = Field(1_000, description="events that a request may bring")
    max_body_bytes: Positive = Field(1_048_576, description="a larger request is refused with 413")
    explore_temperature: Annotated[float, Field(ge=0)] = Field(0.1, description="Plackett-Luce temperature; 0 always shows the best list")
    threads: Positive = Field(1, description="CPU threads of the models for one request")
    port: Annotated[int, Field(gt=0, lt=65536)] = Field(3000, description="where the service listens")
    demo: bool | Literal["auto"] = Field(
        "auto", description="the page at /demo, which shows people's histories; auto: where only this machine reaches the service, without tokens"
    )
    logs: LogSettings = LogSettings()
    evidence: EvidenceSettings = EvidenceSettings()
    drift: DriftSettings = DriftSettings()
    answer_log: AnswerLogSettings = AnswerLogSettings()
    event_log: EventLogSettings = EventLogSettings()
    experiment: ExperimentSettings = ExperimentSettings()
