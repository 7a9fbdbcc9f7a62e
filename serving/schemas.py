"""What the endpoints take and give. Meanings and bounds come from longtrail.schema; limits of size stand in params.yaml (`serving`)
and are checked by the engine, because a Bento's limits are its own."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, cast

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from longtrail.schema import IMPRESSIONS, INTERACTIONS, ITEMS, Column
from serving.faults import faults_of

MAX_KEY = 512  # characters; our choice: longer than any key we met, short enough to log

# No control characters: a key is logged on one line.
Key = Annotated[str, StringConstraints(min_length=1, max_length=MAX_KEY, pattern=r"^[^\x00-\x1f\x7f]+$")]


def _of(column: Column, **more: Any) -> Any:
    """A field that means what the column means, within its bounds."""
    return Field(description=column.meaning, ge=column.minimum, le=column.maximum, **more)


class Request(BaseModel):
    """Base of all requests: an unknown field is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RecommendRequest(Request):
    """Who to recommend to, and how many items."""

    user_id: Key = Field(description="the user's raw key, as it stands in your log", examples=["196"])
    k: int = Field(10, ge=1, description="how many items to show; at most serving.max_k of params.yaml (200 by default)")
    candidates: list[Key] | None = Field(
        None,
        min_length=1,
        description="raw keys to choose from, each once, at most serving.max_candidates; default: the retriever's choice",
        examples=[["242", "302"]],
    )


class RankRequest(Request):
    """Who to rank for, and what."""

    user_id: Key = Field(description="the user's raw key, as it stands in your log", examples=["196"])
    candidates: list[Key] = Field(
        min_length=1,
        description="raw keys of the items to rank, each once; at most serving.max_candidates of params.yaml (1,000 by default)",
        examples=[["242", "302", "377"]],
    )


class Event(Request):
    """Something a user did."""

    user_id: Key = Field(description="the user's raw key; a user never seen before gets a history with this event", examples=["196"])
    item_id: Key = Field(description="the item's raw key; it must stand in the catalogue", examples=["242"])
    action: Key = Field(description=f"{INTERACTIONS['action'].meaning}; one of the actions the models were trained on", examples=["click"])
    timestamp: AwareDatetime | None = Field(
        None,
        description=f"{INTERACTIONS['timestamp'].meaning}: ISO 8601 with time zone, not in the future; default: now",
        examples=["2026-01-01T12:00:00Z"],
    )
    value: float | None = Field(None, allow_inf_nan=False, description=INTERACTIONS["value"].meaning)
    request_id: Key | None = Field(
        None, description="the answer (its request_id) in which the item was clicked: makes the event that impression's click"
    )
    event_id: Key | None = Field(
        None, description="your own id, unique among all your events: what stands in the log already is counted as a duplicate and changes nothing"
    )


@dataclass(frozen=True, slots=True)
class BadEvent:
    """A row of a batch that is no event: the first field that is wrong, and how."""

    field: str
    message: str


def _event_or_fault(value: Any, handler: ValidatorFunctionWrapHandler) -> "Event | BadEvent":
    """A row that is wrong must not cost the others."""
    if not isinstance(value, dict | Event):
        return BadEvent("event", "no object; expected one with user_id, item_id and action")
    try:
        return cast(Event, handler(value))
    except ValidationError as error:
        field, message = faults_of(error.errors(include_url=False, include_input=False, include_context=False)[:1])[0]
        return BadEvent("event" if field == "body" else field, message)


class EventsRequest(Request):
    """A batch of events. Each row is taken, known already, or rejected with a reason; what is wrong with one does not hold up the others."""

    events: list[Annotated[Event, WrapValidator(_event_or_fault)]] = Field(
        min_length=1, description="in the order they happened; at most serving.max_events of params.yaml (1,000 by default)"
    )


@dataclass(slots=True)
class ShownItem:
    """One place of the list. A plain dataclass: hundreds are made for an answer, and a pydantic model takes ten times as long to make."""

    item_id: Annotated[str, Field(description=ITEMS["item_key"].meaning)]
    position: Annotated[int, _of(IMPRESSIONS["position"])]
    score: Annotated[float, Field(ge=0, le=1, description="P(click) by the ranker; in a fallback the item's own smoothed click rate")]
    propensity: Annotated[
        float, Field(gt=0, le=1, description="P(this item at this position | the items above it) under the policy that chose the list")
    ]
    title: Annotated[str | None, Field(description=ITEMS["title"].meaning)] = None


class Answer(BaseModel):
    """A list to show, in order, and how it came about."""

    request_id: str = Field(description="name it in /events when the user clicks")
    user_id: str = Field(description="the user's raw key, as asked")
    arm: str = Field(description="the arm that chose the list: the column `policy` of the impressions that the log becomes")
    policy: str = Field(description="how the list was drawn from the scores: best, plackett_luce(TEMPERATURE), epsilon_greedy(EPSILON)")
    model: str | None = Field(description="the ranker whose scores these are; null in a fallback")
    retriever: str | None = Field(description="the retriever that chose the candidates; null where they were given or in a fallback")
    fallback: str | None = Field(description="why the list is not personal ('unknown user'), else null")
    items: list[ShownItem] = Field(description="the list, best place first; shorter than k where there are fewer candidates")


class Rejection(BaseModel):
    """Why one row of a batch was not taken."""

    place: int = Field(ge=0, description="the row's place in `events`, from 0")
    field: str = Field(description="the first field that is wrong; `event` where the row is no object")
    message: str = Field(description="what is wrong with it, and what was expected")


class EventsAnswer(BaseModel):
    """What became of a batch of events: accepted + duplicates + rejected are all of them. What is accepted is on disk before this is sent."""

    accepted: int = Field(ge=0, description="events written to the log: on disk, and in the histories (but for `pending`)")
    duplicates: int = Field(ge=0, description="events whose event_id stands in the log already, or twice in this batch; they change nothing")
    rejected: int = Field(ge=0, description="events that are wrong; sending them again unchanged does not help")
    pending: int = Field(
        ge=0, description="accepted events that are not in the histories yet: the online store does not answer; they follow by themselves"
    )
    new_users: int = Field(ge=0, description="users met for the first time")
    rejections: list[Rejection] = Field(description="why, for the first 100 that were rejected")


def microseconds(moment: datetime) -> int:
    """UTC microseconds since 1970 of an aware datetime, exactly."""
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
