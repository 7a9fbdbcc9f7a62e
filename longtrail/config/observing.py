"""How much of itself the service tells: its structured log, what an answer's log line holds, and the watch for drift."""

from typing import Annotated, Literal

from pydantic import Field

from longtrail.config.base import PositiveFloat, Settings

Share = Annotated[float, Field(ge=0, le=1)]


class EvidenceSettings(Settings):
    """What an answer's log line holds beside the list, so that `python -m serving.replay` can make its scores again."""

    share: Share = Field(1.0, description="share of the personal lists logged with pointers to their features, digests and all scores")
    full: Share = Field(0.01, description="share logged with the features themselves, so that replay can name the first value that differs")


class LogSettings(Settings):
    """The structured log on standard output: one JSON object a line."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lines below it are not written; a request is info, a fault error"
    )
    sample: Share = Field(1.0, description="share of the requests that get a line; faults of our own and slow ones always do")
    slow_ms: PositiveFloat = Field(250.0, description="a request that took longer gets a line (warning), whatever `sample` says")
