"""How much of itself the service tells: its structured log, what an answer's log line holds, and the watch for drift."""

from typing import Annotated, Literal

from pydantic import Field

from longtrail.config.base import Positive, PositiveFloat, Settings

Share = Annotated[float, Field(ge=0, le=1)]


class DriftSettings(Settings):
    """When served features, users, items or click rates count as drifted, in the running service and in `python -m serving.drift`."""

    window_minutes: PositiveFloat = Field(60.0, description="the running service looks at the lists of the last so many minutes")
    window_requests: Positive = Field(5_000, description="and at no more of them than this")
    every_seconds: PositiveFloat = Field(30.0, description="between two looks")
    min_requests: Positive = Field(200, description="fewer lists than this are measured, but raise no alarm")
    threshold: PositiveFloat = Field(0.2, description="population stability index against packaging, beyond chance, from which a feature has drifted")
    false_alarms: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.001, description="chance that a look at requests like those at packaging exceeds what is allowed for chance, over all features together"
    )
    max_new_user_share: Share = Field(0.5, description="of the requests, by users the training data did not hold")
    max_new_item_share: Share = Field(0.2, description="of the candidates, that training never saw an event of")
    click_minutes: PositiveFloat = Field(10.0, description="time a shown list has to be clicked before it counts for calibration")
    calibration: PositiveFloat = Field(0.2, description="clicks may differ from the predicted number by this share of it (and by chance)")


class EvidenceSettings(Settings):
    """What an answer's log line holds beside the list, so that `python -m serving.replay` can make its scores again."""

    share: Share = Field(1.0, description="share of the personal lists logged with pointers to their features, digests and all scores")
    full: Share = Field(0.002, description="share logged with the features themselves, so that replay can name the first value that differs")


class LogSettings(Settings):
    """The structured log on standard output: one JSON object a line."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lines below it are not written; a request is info, a fault error"
    )
    sample: Share = Field(1.0, description="share of the requests that get a line; faults of our own and slow ones always do")
    slow_ms: PositiveFloat = Field(250.0, description="a request that took longer gets a line (warning), whatever `sample` says")
