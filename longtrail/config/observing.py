"""How much of itself the service tells: its structured log, what an answer's log line holds, and the watch for drift."""

from typing import Annotated, Literal

from pydantic import Field

from longtrail.config.base import PositiveFloat, Settings

Share = Annotated[float, Field(ge=0, le=1)]


class LogSettings(Settings):
    """The structured log on standard output: one JSON object a line."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lines below it are not written; a request is info, a fault error"
    )
    sample: Share = Field(1.0, description="share of the requests that get a line; faults of our own and slow ones always do")
    slow_ms: PositiveFloat = Field(250.0, description="a request that took longer gets a line (warning), whatever `sample` says")
