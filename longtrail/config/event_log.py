"""Settings of what `/events` takes (`serving.event_log`)."""

from pydantic import Field

from longtrail.config.base import Positive, PositiveFloat, Settings


class EventLogSettings(Settings):
    segment_bytes: Positive = Field(67_108_864, description="a file of the event log that reached this size is closed, and the next one begun")
    retention_days: Positive | None = Field(
        None,
        description="a closed file is deleted when its events are older and in the histories; null keeps all: it is training data",
    )
    max_backlog: Positive = Field(100_000, description="logged events that may wait for the online store before more are refused with 503")
    apply_seconds: PositiveFloat = Field(2.0, description="an answer waits this long for its events to be in the histories, then calls them pending")
