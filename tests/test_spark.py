"""DuckDB and Spark make the same tables, byte by byte, of a log with all that a log can have wrong. One Spark session for the whole file."""

import contextlib
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.definitions import RANKING
from features.point_in_time import PointInTime
from longtrail.config import EventLogDataset, IngestSettings, SparkSettings
from longtrail.datasets.reading import CsvFormat, load_text
from longtrail.engines import open_engine
from longtrail.engines.functions import to_microseconds, to_number
from longtrail.errors import ConfigError
from longtrail.examples import FeatureSet
from longtrail.files import hash_files, read_json
from longtrail.ingest import ingest
from tests.features.helpers import build
from tests.toy import toy_tables

# Interpreted, with the quick compiler: a hundred small queries, not one large one.
QUICK = {
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.adaptive.enabled": "false",
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
}
SETTINGS = SparkSettings(master="local[2]", driver_memory="1g", shuffle_partitions=2, options=QUICK)

SHOWN = """\
user;item;at;written;request;place;click;p;arm;kind
ann;i1;2024-01-02T10:00:00Z;;r1;1;0;0.5;a;toys
ann;i2;2024-01-02T10:00:00Z;;r1;2;1;0.25;a;
ann;i3;2024-01-02T10:00:00Z;;r1;2;1;0.25;a;books
bob;i2;2024-01-02 10:00:00+02:00;2024-01-03;r2;1;1;1;b;books
bob;i4;2024-01-02 09:00;;r2;2;true;1e-3;b;
 cat ;i1;2024/01/02 10:00:00;;r3;1;False;0.1;;toys
cat;i5;2024-01-02T10:00:00.123456789Z;;r3;2.0;0;;;
cat;i6;2024-01-02;;r3;3;1;0.1;;garden
,i1;2024-01-02;;r4;1;1;0.1;a;too few
;i1;2024-01-02;;r4;1;1;0.1;a;x
NaN;i1;2024-01-02;;r4;1;1;0.1;a;x
-7;i1;2024-01-02;;r4;1;1;0.1;a;x
dan;null;2024-01-02;;r4;1;1;0.1;a;x
dan;i1;;;r4;1;1;0.1;a;x
dan;i1;2024;;r4;1;1;0.1;a;x
dan;i1;10:11:12;;r4;1;1;0.1;a;x
dan;i1;2024-02-30;;r4;1;1;0.1;a;x
dan;i1;1989-12-31;;r4;1;1;0.1;a;x
dan;i1;2101-01-01;;r4;1;1;0.1;a;x
dan;i1;2024-01-02;soon;r4;1;1;0.1;a;x
dan;i1;2024-01-02;;;1;1;0.1;a;x
dan;i1;2024-01-02;;r4;0;1;0.1;a;x
dan;i1;2024-01-02;;r4;1.5;1;0.1;a;x
dan;i1;2024-01-02;;r4;1e400;1;0.1;a;x
dan;i1;2024-01-02;;r4;1d;1;0.1;a;x
dan;i1;2024-01-02;;r4;1;2;0.1;a;x
dan;i1;2024-01-02;;r4;1;1;0;a;x
dan;i1;2024-01-02;;r4;1;1;inf;a;x
dan;i1;2024-01-02;;r4;1_0;1;0.1;a;"quoted; and so on"
dan;i1;2024-01-02;;r4;11;1;0.1;a;x;too many
élan;ü;2024-01-02T10:00:00Z;;r5;1;1;0.1;a;été
"""
COLUMNS = {
    "user": "user", "item": "item", "timestamp": "at", "written_at": "written", "request": "request", "position": "place",
    "click": "click", "propensity": "p", "policy": "arm", "category": "kind",
}  # fmt: skip
CANDIDATES = "request;item\nr1;i1\nr1; i9 \nr1;i9\nr2;i2\nr9;i1\nr3;\nr3;i8\n"


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IngestSettings]:
    pytest.importorskip("pyspark", reason="pyspark is not installed (pip install 'longtrail[spark]'): Spark is not tested")
    if shutil.which("java") is None:
        pytest.skip("there is no java (apt-get install openjdk-17-jre-headless): Spark is not tested")
    from pyspark.sql import SparkSession

    from longtrail.engines.spark import open_session

    open_session(SETTINGS, spill=tmp_path_factory.mktemp("spark"))
    yield IngestSettings(engine="spark", spark=SETTINGS, memory_limit="500MB", threads=1, max_quarantined_share=0.9)
    SparkSession.getActiveSession().stop()


def duckdb(settings: IngestSettings) -> IngestSettings:
    return settings.model_copy(update={"engine": "duckdb"})


def write_world(folder: Path) -> EventLogDataset:
    """Impressions and candidates as CSV; further events in two Parquet files of different types, one in a folder with a blank."""
    (folder / "more events").mkdir()
    (folder / "shown.csv").write_text(SHOWN, encoding="utf-8")
    (folder / "pool.csv").write_text(CANDIDATES, encoding="utf-8")
    second = 1_704_190_000_000_000 + 1_000_000 * pa.array([0, 0, 5, 5, 9, 9]).to_numpy()
    times = pa.array(second, pa.timestamp("us", tz="UTC"))
    users = ["ann", "bob", "ann", "ann", None, "new"]
    first = {"user": users, "item": ["i1", "i1", "i7", "i7", "i1", "-3"], "at": times, "did": ["view", "view", "buy", "buy", "view", "view"]}
    pq.write_table(pa.table(first), folder / "more events" / "1.parquet", row_group_size=2)
    values = {"user": users[:3], "item": ["i1", "i2", "i7"], "at": times[:3].cast(pa.timestamp("ms")), "did": ["view", None, "buy"]}
    pq.write_table(pa.table(values), folder / "more events" / "2.parquet")
    return EventLogDataset(
        source=str(folder / "shown.csv"), columns=COLUMNS, delimiter=";", timestamp_unit="iso", propensity_kind="conditional",
        candidates=str(folder / "pool.csv"), events=str(folder / "more events" / "*.parquet"),
        event_columns={"user": "user", "item": "item", "timestamp": "at", "action": "did"},
    )  # fmt: skip


def assert_same_files(found: Path, expected: Path) -> None:
    for path in sorted(expected.rglob("*.parquet")):
        ours, theirs = (pq.read_table(folder / path.relative_to(expected)) for folder in (found, expected))
        assert ours.schema.types == theirs.schema.types, path.name
        assert ours.to_pylist() == theirs.to_pylist(), path.name


@pytest.fixture(scope="module")
def ingested(spark: IngestSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tables of the same log by DuckDB and by Spark."""
    folder = tmp_path_factory.mktemp("log")
    dataset = write_world(folder)
    ingest(dataset, duckdb(spark), folder / "duckdb")
    ingest(dataset, spark, folder / "spark")
    return folder / "duckdb", folder / "spark"


def test_every_table_is_the_same(ingested: tuple[Path, Path]) -> None:
    expected, found = ingested
    assert_same_files(found, expected)
    assert hash_files(found) == hash_files(expected)
    counts = read_json(expected / "counts.json")
    assert len(counts["reasons"]) > 15 and counts["candidates_dropped"] > 0 and min(counts["interactions"], counts["impressions"]) > 4
    located = [(Path(row["file"]).name, row["row"]) for row in pq.read_table(found / "quarantine.parquet").to_pylist()]
    assert ("1.parquet", 5) in located and ("2.parquet", 2) in located and ("shown.csv", 32) not in located


def test_every_feature_is_the_same(spark: IngestSettings, tmp_path: Path) -> None:
    """build_features with its sources by Spark, Feast's joins and materialisation by Feast's Spark store, and histories in shards."""
    tables = toy_tables(tmp_path / "tables", users=12, events_per_user=10)
    expected = build(tables, tmp_path / "duckdb")
    settings = spark.model_dump(exclude={"max_quarantined_share"})
    found = build(tables, tmp_path / "spark", ingest=settings, offline_store="spark", history_shards=3)
    assert "spark" in (found / "feast" / "feature_store.yaml").read_text() and len(list((found / "history").glob("shard-*"))) == 3
    assert_same_files(found, expected)
    assert read_json(found / "features.json") == read_json(expected / "features.json")
    assert np.load(found / "train_lengths.npy").tolist() == np.load(expected / "train_lengths.npy").tolist()
    stores = [FeatureSet.open(folder).history for folder in (found, expected)]
    users = np.arange(stores[0].users + 1)
    for a, b in zip(*(vars(store.flat(users, store.lengths(users))).values() for store in stores), strict=True):
        np.testing.assert_array_equal(a, b)
    online = [sorted(_online_rows(folder / "feast" / "online_store.db")) for folder in (found, expected)]
    assert online[0] == online[1] and len(online[0]) > 50
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "features.spark_store", None)  # where a sample of requests is judged there is no Spark
        asked = {"user_id": np.arange(1, 6), "item_id": np.arange(1, 6)}
        sampled = [PointInTime(folder / "feast", named=False).features(RANKING, np.full(5, 2 * 10**15), **asked) for folder in (found, expected)]
    assert all(sampled[0][name].tolist() == sampled[1][name].tolist() for name in sampled[0]) and sampled[0]["history_length"].all()


def _online_rows(database: Path) -> list[tuple[Any, ...]]:
    """(key, feature, value, time) of all tables of Feast's SQLite store."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE '%entity_key%'")]
        rows = [connection.execute(f'SELECT entity_key, feature_name, value, event_ts FROM "{name}"').fetchall() for name in names]
    return [row for table in rows for row in table]


def test_the_same_texts_are_numbers_and_times(spark: IngestSettings, tmp_path: Path) -> None:
    numbers = [
        "1",
        "+5",
        "-5",
        ".5",
        "5.",
        "1e5",
        "1E+5",
        "1e",
        "inf",
        "-Infinity",
        "nan",
        "1_000",
        "1__0",
        "_1",
        "0x10",
        "0x1p3",
        "1d",
        "1.0F",
        "1e400",
        "--1",
    ]
    days = ["2024-01-02", "2024-1-2", "2024/01/02", "2024-01/02", "20240102", "2024", "2024-02-30", "epoch", "now", "10:11:12", "12024-01-02"]
    clocks = [
        "10:11:12",
        "10:11",
        "10:11Z",
        "10:11:12Z",
        "10:11:12.5+02:00",
        "10:11:12.123456789Z",
        "10:11:12+02",
        "10:11:12+0230",
        "10:11:60",
        "1:2:3",
        "10",
        "",
    ]
    zones = ["2024-07-02 10:11:12 Europe/Berlin", "2024-01-02 10:11 UTC", "2024/01/02 10:11:12 Nowhere/Else"]
    texts = [*numbers, *days, *(f"2024-01-02{between}{clock}" for clock in clocks for between in "T "), *zones]
    (tmp_path / "texts.csv").write_text("text\n" + "".join(f"{text}\n" for text in texts), encoding="utf-8")
    answers: list[Any] = []
    for name, settings in (("duckdb", duckdb(spark)), ("spark", spark)):
        engine = open_engine(tmp_path / name, settings)
        rows = load_text(engine, "texts", [tmp_path / "texts.csv"], {"text": "text"}, csv_format=CsvFormat())
        read = engine.fetch(rows.select("order", "text", number=to_number(rows.text), time=to_microseconds(rows.text)).order_by("order"))
        answers.append({row["text"]: (str(row["number"]), row["time"]) for row in read.to_pylist()})
        engine.disconnect()
    assert answers[1] == answers[0] and len(answers[0]) > 50


def test_spark_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyspark.sql", None)
    with pytest.raises(ConfigError, match=r"pyspark is not installed; expected pip install 'longtrail\[spark\]'"):
        open_engine(tmp_path, IngestSettings(engine="spark"))
