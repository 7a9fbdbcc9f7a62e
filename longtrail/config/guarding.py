"""How the service keeps standing: the online store's deadline and breaker, admission, limits on a request, stopping."""

from typing import Annotated

from pydantic import Field, model_validator

from longtrail.config.base import Positive, PositiveFloat, Settings


class StoreSettings(Settings):
    """Reads of the online store. A read that fails is answered with a popularity list that says so."""

    deadline_ms: PositiveFloat = Field(200.0, description="a read that takes longer is given up, and the list is the popular one")
    threads: Positive = Field(8, description="reads under way at once; those that a silent store holds up count")
    failures: Positive = Field(5, description="reads in a row that fail before the store is left alone (the breaker opens)")
    open_seconds: PositiveFloat = Field(1.0, description="how long the store is left alone before one read tries it; doubles while the trial fails")
    max_open_seconds: PositiveFloat = Field(15.0, description="the longest the store is left alone between trials")


class GateSettings(Settings):
    """What a request may cost before it is refused. Lists and events have lanes of their own: neither can starve the other."""

    lists: Positive = Field(4, description="lists in work at once; more only wait for the same cores")
    events: Positive = Field(8, description="batches of events in work at once; they wait for the disk, and share its syncs")
    waiting: Positive = Field(64, description="requests that may wait in a lane; the next is answered 503 at once")
    max_wait_ms: PositiveFloat = Field(250.0, description="a request that has waited this long for its turn is answered 503")
    answer_seconds: PositiveFloat = Field(10.0, description="an answer that takes longer is given up: 503")
    body_seconds: PositiveFloat = Field(10.0, description="how long a client may take to send its request: 408, or the connection is closed")
    max_headers: Positive = Field(64, description="header lines of a request: more is 431")
    max_header_bytes: Positive = Field(16_384, description="header bytes of a request: more is 431")
    connections: Positive = Field(1_000, description="connections open at once; one more is closed unanswered")
    rate_per_second: PositiveFloat | None = Field(
        None, description="requests a second of one client (its token's name, else its address) in the long run: more is 429; null is no limit"
    )
    burst: Positive = Field(100, description="requests that a client may send at once before rate_per_second counts")


class StopSettings(Settings):
    """How the service goes: /readyz says 503 at once, what is in work is finished."""

    linger_seconds: Annotated[float, Field(ge=0)] = Field(
        1.0, description="after SIGTERM, requests are still taken for this long, so that a load balancer notices /readyz"
    )
    drain_seconds: PositiveFloat = Field(10.0, description="after that, what is in work may take this long; then the service exits all the same")
    keep_alive_seconds: Positive = Field(75, description="an idle connection is closed after this long; longer than the load balancer's own limit")


class GuardingSettings(Settings):
    """The three sections, as they stand in `serving`."""

    store: StoreSettings = StoreSettings()
    gate: GateSettings = GateSettings()
    stop: StopSettings = StopSettings()

    @model_validator(mode="after")
    def _answers_outlast_reads(self) -> "GuardingSettings":
        if self.store.deadline_ms >= 1000 * self.gate.answer_seconds:
            raise ValueError(
                f"store.deadline_ms is {self.store.deadline_ms}; expected less than gate.answer_seconds ({self.gate.answer_seconds}), "
                "or no list is left to fall back to"
            )
        return self
