"""Settings of the data: where a log comes from, how it is read, checked, split and turned into features."""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from longtrail.config.base import Count, Positive, PositiveFloat, Seed, Settings, Share


class Pinned(Settings):
    """A log that may lie in a DVC repository, as it was at one revision. With a repository, paths are paths in it."""

    repo: str | None = Field(None, description="the address of a Git repository with DVC in it, or its path; `.` is this one")
    revision: str | None = Field(None, description="the commit, tag or branch of `repo`; the commit that it meant then is in counts.json")

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if (self.repo is None) != (self.revision is None):
            given, missing = ("repo", "revision") if self.repo is not None else ("revision", "repo")
            raise ValueError(f"{given} is set; expected {missing} beside it")
        for name in ("repo", "source", "events", "candidates"):
            if urlsplit(getattr(self, name, None) or "").password is not None:
                raise ValueError(f"{name} holds a password; expected credentials in the environment alone (docs/storage.md)")
        return self


class MovieLensDataset(Pinned):
    """MovieLens in any of its official layouts. Each rating is an interaction and an impression whose click is `rating >= like_from`."""

    kind: Literal["movielens"] = "movielens"
    source: str = Field("ml-100k", description="a variant (ml-100k, ml-1m, ml-latest-small, ml-20m, ml-25m, ml-32m) or a path to its zip or folder")
    like_from: float = Field(4.0, description="a rating this high counts as a click")


class OpenBanditDataset(Pinned):
    """ZOZO's Open Bandit Dataset: real impressions with true propensities."""

    kind: Literal["open_bandit"] = "open_bandit"
    source: str = Field("small", description="'small' (10,000 rows a file, from the package index), 'full' (11 GB), or a path to its folder or zip")
    policy: Literal["random", "bts"] = Field("random", description="which of the two logged policies")
    campaign: Literal["all", "men", "women"] = Field("all", description="which of the three logged campaigns")


class EventColumns(Settings):
    """Which column of a user's own log holds what. Only user, item and timestamp are needed."""

    user: str = Field(description="who: the column of raw user keys")
    item: str = Field(description="what: the column of raw item keys")
    timestamp: str = Field(description="when, in `timestamp_unit`")
    written_at: str | None = Field(None, description="when the row was written, where the log knows: guards against late rows")
    action: str | None = Field(None, description="what was done: view, click, …")
    value: str | None = Field(None, description="its strength: a rating, seconds watched")
    category: str | None = Field(None, description="the item's category")
    title: str | None = Field(None, description="the item's name, for people")
    click: str | None = Field(None, description="0/1: makes the file a log of impressions")
    request: str | None = Field(None, description="the list an item was shown in; default: user and timestamp")
    position: str | None = Field(None, description="the item's place in its list, from `first_position` on")
    propensity: str | None = Field(None, description="P(the logging policy shows this item at this position)")
    policy: str | None = Field(None, description="the name of the policy that chose the item")


class EventLogDataset(Pinned):
    """Any CSV or Parquet log, by a column mapping.

    A file with a `click` column is a log of impressions; its clicks are also the interactions. A file without one is a log of
    interactions; where `like_from` is set, `value >= like_from` is the click of an impression made of each event.
    """

    kind: Literal["event_log"] = "event_log"
    source: str = Field(description="a CSV or Parquet file, or a glob of them; s3://… too")
    columns: EventColumns
    delimiter: str = Field(",", description="between the columns of a CSV file")
    encoding: Literal["utf-8", "utf-16", "latin-1"] = Field("utf-8", description="of a CSV file")
    timestamp_unit: Literal["s", "ms", "us", "iso"] = Field("s", description="numbers since 1970 in this unit, or ISO 8601 text")
    click_actions: tuple[str, ...] = Field((), description="actions that count as a click where there is no click column")
    like_from: float | None = Field(
        None, description="a value this high counts as a click, where there is no click column; null: values say nothing of clicks"
    )
    first_position: Literal[0, 1] = Field(1, description="what the log calls the top of a list")
    propensity_kind: Literal["conditional", "marginal", "none"] = Field(
        "none", description="of a propensity at a position: conditional on the items above it, or marginal; none: the log has no propensities"
    )
    events: str | None = Field(None, description="a file or glob of further interactions, beside a log of impressions")
    event_columns: EventColumns | None = Field(None, description="the columns of `events`; default: as in `columns`, without those of impressions")
    candidates: str | None = Field(None, description="a file or glob of what each request could have shown: the columns of request and item")


class WorldDataset(Settings):
    """A simulated world whose truth is known (longtrail/datasets/world.py)."""

    kind: Literal["world"] = "world"
    users: Positive = Field(1_000, description="people in the world")
    items: Positive = Field(2_000, description="things in its catalogue")
    categories: Positive = Field(20, description="kinds of things")
    events_per_user: Positive = Field(100, description="organic events of an average user; users differ")
    slate: Positive = Field(5, description="items shown in a request")
    requests_per_user: Positive = Field(20, description="lists shown to an average user")
    candidates: Positive = Field(20, description="items the logging policy chooses a list from")
    logger_temperature: PositiveFloat = Field(1.0, description="Plackett-Luce temperature of the logging policy")
    click_logit: float = Field(-2.5, description="logit of P(click) for an average examined item: sets the world's click rate")
    stop_after_click: Share = Field(0.0, description="P(the user leaves the list after a click): 0 independent positions, 1 a cascade")
    seed: Seed = 0


Dataset = Annotated[MovieLensDataset | OpenBanditDataset | EventLogDataset | WorldDataset, Field(discriminator="kind")]


class SparkSettings(Settings):
    """Spark, where `ingest.engine` or `features.offline_store` asks for it. Files must be where driver and executors both see them."""

    master: str = Field("local[*]", description="where it runs: local[N], spark://host:7077, yarn, k8s://https://…")
    driver_memory: str = Field("2g", description="of the process that runs the step; with a local master, all there is")
    executor_memory: str = Field("4g", description="of each executor; with a local master unused")
    shuffle_partitions: Positive = Field(200, description="tasks of a sort or join; about one for each 128 MB that it moves")
    options: dict[str, str] = Field(default_factory=dict, description="any other of Spark's own settings, spark.executor.instances for example")


class IngestSettings(Settings):
    max_quarantined_share: Share = Field(0.01, description="more rejected rows than this stops the pipeline")
    engine: Literal["duckdb", "spark"] = Field(
        "duckdb", description="what ingest and the sources of build_features are computed by; the outputs are the same"
    )
    memory_limit: str = Field("2GB", description="DuckDB's memory; beyond it DuckDB spills to disk")
    threads: Positive = Field(2, description="CPU threads of DuckDB")
    spark: SparkSettings = SparkSettings()


class ValidationSettings(Settings):
    """Bounds of the distribution expectations; the schema's own expectations need none."""

    click_rate: tuple[Share, Share] = Field((0.001, 0.99), description="lowest and highest click rate")
    min_users: Positive = Field(10, description="fewer users than this are too few")
    min_items: Positive = Field(10, description="fewer items than this are too few")
    min_events: Positive = Field(100, description="fewer interactions than this are too few")
    median_history_length: tuple[Count, Count] = Field((1, 100_000), description="fewest and most events of the median user")
    max_new_item_share: Share = Field(0.8, description="items first seen in the test period")
    max_duplicate_share: Share = Field(0.05, description="share of the interactions that may repeat another")
    max_top_item_share: Share = Field(0.5, description="interactions that are with the most popular item")
    warn_only: tuple[str, ...] = Field((), description="names of critical distribution expectations that should only warn")


class FeatureSettings(Settings):
    offline_store: Literal["duckdb", "spark"] = Field("duckdb", description="what Feast joins and materialises with; spark is set up by ingest.spark")
    online_store: Literal["sqlite", "redis"] = Field(
        "sqlite", description="where the service reads features: a file, or a Redis that several services share"
    )
    redis_address: str = Field("localhost:6379", description="host:port of Redis")
    online_history_length: Positive = Field(1_000, description="newest events of each user kept in the online store")
    history_shards: Positive = Field(
        1, description="parts of the history store, by user: each is built alone; 1 up to some 10^8 events, then one for each 10^8"
    )


class SplitSettings(Settings):
    """Global in time: train < t1 <= valid < t2 <= test. Leave-one-out (each user's last event) is there to reproduce papers."""

    kind: Literal["temporal", "leave_one_out"] = Field(
        "temporal", description="leave_one_out: each user's last event is the test, the one before it validation"
    )
    valid_share: Share = Field(0.1, description="share of the log's rows, newest but one")
    test_share: Share = Field(0.1, description="share of the log's rows, newest")
