"""What Longtrail knows of users and items, as Feast objects: entities, feature views and one service per model family and version.

Names and types come from longtrail.schema. Every view holds counts over rows *available strictly before* a moment: a source row's
timestamp is `available_at` plus one microsecond (Feast returns rows whose timestamp equals the label's), its created timestamp is
`available_at`. A change of what a field means is a new service version; the old one stays for the models trained on it.
"""

from pathlib import Path
from typing import Any

from longtrail.schema import EXAMPLES, ITEM_STATISTICS, USER_STATISTICS, Kind

CLOCK = "user_clock"
USER_VIEW = "user_statistics"
ITEM_VIEW = "item_statistics"
HISTORY = "user_history"
RANKING = "ranking_v1"
RETRIEVAL = "retrieval_v1"
SERVING = "serving_v1"

TIMESTAMP = "timestamp"
CREATED = "created"
HISTORY_ARRAYS = ("items", "actions", "times")  # oldest first; times are UTC microseconds (Feast's own timestamp value counts whole seconds)
COUNTED = {
    CLOCK: ("history_length",),
    USER_VIEW: USER_STATISTICS,
    ITEM_VIEW: ITEM_STATISTICS,
}
ENTITY_OF = {CLOCK: "user_id", USER_VIEW: "user_id", ITEM_VIEW: "item_id", HISTORY: "user_id"}
LENGTH_TAG = "online_history_length"


def feast_type(kind: Kind) -> Any:
    """The Feast type of a schema kind."""
    from feast import types

    return {
        Kind.INT8: types.Int32,
        Kind.INT32: types.Int32,
        Kind.INT64: types.Int64,
        Kind.FLOAT32: types.Float32,
        Kind.FLOAT64: types.Float64,
        Kind.STRING: types.String,
        Kind.TIMESTAMP: types.UnixTimestamp,
    }[kind]


def definitions(online_history_length: int, offline: Path = Path("offline")) -> list[Any]:
    """Entities, views and services, ready for `FeatureStore.apply`.

    `offline` is the folder of the source files (NAME.parquet), relative to the Feast repository, so that the repository can be moved.
    """
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
    from feast.types import Array, Int64

    entities = {
        key: Entity(name=name, join_keys=[key], value_type=ValueType.INT64, description=EXAMPLES[key].meaning)
        for name, key in (("user", "user_id"), ("item", "item_id"))
    }

    def view(name: str, fields: list[Any], online: bool, description: str, tags: dict[str, str] | None = None) -> Any:
        source = FileSource(
            name=f"{name}_source", path=(offline / f"{name}.parquet").as_posix(), timestamp_field=TIMESTAMP, created_timestamp_column=CREATED
        )
        key = ENTITY_OF[name]
        join_key = Field(name=key, dtype=feast_type(EXAMPLES[key].kind))
        return FeatureView(
            name=name,
            entities=[entities[key]],
            schema=[join_key, *fields],
            source=source,
            online=online,
            ttl=None,
            description=description,
            tags=tags or {},
        )

    def columns(names: tuple[str, ...]) -> list[Any]:
        return [Field(name=n, dtype=feast_type(EXAMPLES[n].kind), description=EXAMPLES[n].meaning) for n in names]

    clock = view(CLOCK, columns(COUNTED[CLOCK]), False, "how long a user's history was: a training example points at that prefix of it")
    user = view(USER_VIEW, columns(COUNTED[USER_VIEW]), True, "what a user was shown and clicked so far")
    # Not online: the service keeps item statistics resident with the model (hundreds of keys a request are slow from a store).
    item = view(ITEM_VIEW, columns(COUNTED[ITEM_VIEW]), False, "how an item fared so far")
    arrays = [Field(name=n, dtype=Array(Int64), description=f"{n} of the newest events, oldest first") for n in HISTORY_ARRAYS]
    history = view(
        HISTORY,
        [*arrays, *columns(("history_length",))],
        True,
        "a user's newest events, for the service; history_length counts all of them",
        {LENGTH_TAG: str(online_history_length)},
    )
    services = [
        FeatureService(name=RANKING, features=[clock, user, item], description="rankers: example pointers and statistics"),
        FeatureService(name=RETRIEVAL, features=[clock], description="retrievers: example pointers"),
        FeatureService(name=SERVING, features=[history, user], description="the endpoint: histories and user statistics"),
    ]
    return [*entities.values(), clock, user, item, history, *services]
