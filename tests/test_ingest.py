"""What ingest makes of good and bad logs. docs/data.md has a row for each way to break one, and names the test here."""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longtrail.errors import ConfigError, DatasetError, QuarantineError
from longtrail.files import hash_path
from longtrail.ingest import DUPLICATE_EVENT, DUPLICATE_IMPRESSION, ROW_GROUP, _blocks, rejected_file
from longtrail.schema import TABLES
from tests.datasets.logs import COLUMNS, EVENTS, SHOWN, SHOWN_COLUMNS, quarantine, run, run_csv, table

HEAD = "user,item,ts,what,strength\n"
SHOWN_HEAD = SHOWN.splitlines()[0] + "\n"


# ---------------------------------------------------------------- what comes out


def test_tables_have_exactly_the_schema(tmp_path: Path) -> None:
    counts = run_csv(tmp_path, SHOWN, SHOWN_COLUMNS, propensity_kind="conditional")
    for expected in TABLES:
        file = pq.ParquetFile(tmp_path / "tables" / f"{expected.name}.parquet")
        assert file.schema_arrow.remove_metadata().equals(expected.arrow().remove_metadata(), check_metadata=True)
        assert file.schema_arrow.metadata[b"table"] == expected.name.encode()
        for column in expected.columns:
            if not column.nullable:
                assert file.read([column.name])[column.name].null_count == 0
    metadata = pq.read_schema(tmp_path / "tables" / "impressions.parquet").metadata
    assert metadata[b"propensity"] == b"conditional"
    assert json.loads((tmp_path / "tables" / "counts.json").read_text()) == counts
    assert sorted(p.name for p in (tmp_path / "tables").iterdir()) == sorted([*(f"{t.name}.parquet" for t in TABLES), "counts.json"])


def test_a_log_of_interactions(tmp_path: Path) -> None:
    counts = run_csv(tmp_path, EVENTS)
    rows = table(tmp_path, "interactions")
    assert table(tmp_path, "items")["item_key"].tolist() == ["1", "2"]
    assert rows[["user_id", "item_id", "action"]].values.tolist() == [[1, 1, "view"], [2, 2, "buy"], [1, 2, "view"]]
    assert rows["value"].tolist()[::2] == [1.5, 2.0] and np.isnan(rows["value"][1])
    assert counts["impressions"] == 0 and counts["actions"] == ["buy", "view"]
    assert counts["source_sha256"] == hash_path(tmp_path / "log.csv")
    assert counts["dataset"] == {"kind": "event_log", "source": str(tmp_path / "log.csv")}


def test_a_log_of_impressions_makes_interactions_of_its_clicks(tmp_path: Path) -> None:
    counts = run_csv(tmp_path, SHOWN, SHOWN_COLUMNS, propensity_kind="conditional")
    assert (counts["impressions"], counts["interactions"], counts["actions"], counts["propensity"]) == (3, 1, ["click"], "conditional")
    shown = table(tmp_path, "impressions")
    assert shown[["request_id", "user_id", "item_id", "position", "click", "propensity", "policy"]].values.tolist() == [
        ["r1", 1, 1, 1, 0, 0.5, "a"],
        ["r1", 1, 2, 2, 1, 0.25, "a"],
        ["r2", 2, 1, 1, 0, 1.0, "b"],
    ]
    assert table(tmp_path, "interactions")[["user_id", "item_id"]].values.tolist() == [[1, 2]]
    assert table(tmp_path, "users")["events"].tolist() == [1, 0]


def test_clicks_from_actions_and_from_values(tmp_path: Path) -> None:
    run_csv(tmp_path, EVENTS, click_actions=["buy"])
    assert table(tmp_path, "impressions")["click"].tolist() == [0, 1, 0]
    assert len(table(tmp_path, "interactions")) == 3
    run_csv(tmp_path, HEAD + "a,1,1000000000,view,2\na,2,1000000000,view,1\n", like_from=1.5)
    assert table(tmp_path, "impressions")[["position", "click"]].values.tolist() == [[1, 1], [2, 0]]


def test_click_actions_that_no_row_has_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = r"dataset\.click_actions: no row has the action 'by' or 'cart'; the log has 'buy', 'view'; expected one of them"
    with pytest.raises(DatasetError, match=said):
        run_csv(tmp_path, EVENTS, click_actions=["by", "cart"])
    run_csv(tmp_path, EVENTS, click_actions=["cart", "buy"])
    assert "no row has the action 'cart'; the log has 'buy', 'view'" in caplog.text


def test_rows_are_sorted_by_time_then_availability_then_place_in_the_log(tmp_path: Path) -> None:
    text = "user,item,ts,written\na,1,1000000009,1000000009\n"
    text += "b,2,1000000001,1000000005\nc,3,1000000001,\nd,4,1000000001,1000000000\ne,5,1000000001,1000000005\n"
    run_csv(tmp_path, text, {"user": "user", "item": "item", "timestamp": "ts", "written_at": "written"})
    rows = table(tmp_path, "interactions").merge(table(tmp_path, "users"), on="user_id", how="left")
    assert rows["user_key"].tolist() == ["c", "d", "b", "e", "a"]
    late = (rows["available_at"] - rows["timestamp"]).dt.total_seconds()
    assert late.tolist() == [0, 0, 4, 4, 0]  # written before it happened is available when it happened


def test_a_longer_log_only_adds_ids(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    log = pd.DataFrame({"user": rng.integers(0, 40, 500), "item": rng.integers(0, 60, 500), "ts": np.sort(rng.integers(10**9, 2 * 10**9, 500))})
    log["cat"] = [f"c{i % 7}" for i in log["item"]]
    columns = {"user": "user", "item": "item", "timestamp": "ts", "category": "cat"}
    run_csv(tmp_path, log.head(100).to_csv(index=False), columns, settings={"out": "first"})
    run_csv(tmp_path, log.to_csv(index=False), columns, settings={"out": "second"})
    for name, key in (("users", ["user_id", "user_key"]), ("items", ["item_id", "item_key", "category_id"])):
        first, second = (table(tmp_path, name, out) for out in ("first", "second"))
        assert len(second) > len(first)
        assert second[key].head(len(first)).equals(first[key])
        assert second[key[0]].tolist() == list(range(1, len(second) + 1))


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    log = pd.DataFrame({"user": rng.integers(0, 500, 30_000), "item": rng.integers(0, 900, 30_000), "ts": rng.integers(10**9, 10**9 + 5000, 30_000)})
    columns = {"user": "user", "item": "item", "timestamp": "ts"}
    for out, threads in (("a", 1), ("b", 2), ("c", 2)):
        run_csv(tmp_path, log.to_csv(index=False), columns, settings={"out": out, "threads": threads})
    assert hash_path(tmp_path / "a") == hash_path(tmp_path / "b") == hash_path(tmp_path / "c")


def test_ingest_equals_a_slow_second_implementation(tmp_path: Path) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 300))
        log = pd.DataFrame({"user": rng.integers(0, 12, n), "item": rng.integers(0, 9, n), "ts": rng.integers(10**9, 10**9 + 60, n)})
        log["what"] = rng.choice(["view", "buy"], n)
        log["strength"] = rng.integers(0, 5, n)
        counts = run_csv(tmp_path, log.to_csv(index=False), like_from=3)
        good = log.drop_duplicates(["user", "item", "ts", "what"])
        assert counts["rows_quarantined"] == len(log) - len(good) == counts["reasons"].get(DUPLICATE_EVENT, 0)
        assert [row for row, _, _ in quarantine(tmp_path)] == [i + 1 for i in log.index.difference(good.index)]
        ids = {}
        for key in ("user", "item"):
            seen = good.groupby(key)["ts"].min().reset_index()
            seen["text"] = seen[key].astype(str)
            order = seen.sort_values(["ts", "text"])[key]
            ids[key] = dict(zip(order, range(1, len(order) + 1), strict=True))
        good = good.sort_values("ts", kind="stable")
        expected = [
            [ids["user"][u], ids["item"][i], w, float(s)]
            for u, i, w, s in zip(good["user"], good["item"], good["what"], good["strength"], strict=True)
        ]
        assert table(tmp_path, "interactions")[["user_id", "item_id", "action", "value"]].values.tolist() == expected
        shown = table(tmp_path, "impressions")
        assert shown["position"].tolist() == (good.groupby(["user", "ts"]).cumcount() + 1).tolist()
        assert shown["click"].tolist() == (good["strength"] >= 3).astype(int).tolist()


def test_blocks_have_one_size_whatever_the_batches() -> None:
    sizes = [1, ROW_GROUP - 1, 5, 2 * ROW_GROUP, 7]
    batches = [pa.record_batch({"x": np.arange(n)}) for n in sizes]
    assert [block.num_rows for block in _blocks(batches)] == [ROW_GROUP, ROW_GROUP, ROW_GROUP, 12]
    assert list(_blocks([])) == []


def test_candidates_are_kept_with_ids(tmp_path: Path) -> None:
    offered = tmp_path / "candidates.csv"
    offered.write_text("request,item\nr1,2\nr1,9\nr1,2\nr2,8\nr2,1\nr7,1\n")
    events = tmp_path / "events.csv"
    events.write_text("user,item,ts,what\nann,5,1000000030,view\n")
    more = {"events": str(events), "event_columns": {"user": "user", "item": "item", "timestamp": "ts", "action": "what"}, "candidates": str(offered)}
    counts = run_csv(tmp_path, SHOWN, SHOWN_COLUMNS, propensity_kind="conditional", **more)
    items = table(tmp_path, "items")
    assert items[["item_key", "popularity"]].values.tolist() == [["1", 0], ["2", 1], ["9", 0], ["5", 1], ["8", 0]]
    assert table(tmp_path, "candidates").values.tolist() == [["r1", 2], ["r1", 3], ["r2", 5], ["r2", 1]]
    assert (counts["candidates"], counts["candidates_dropped"]) == (4, 2)  # a repeat, and a request that is not in the log
    assert counts["actions"] == ["click", "view"] and counts["rows_read"] == 4


# ---------------------------------------------------------------- rows that are set aside

BAD_ROWS = [
    ("", "1,1000000000,view,1", "user", "missing user"),
    ("  ", "1,1000000000,view,1", "user", "missing user"),
    ("NaN", "1,1000000000,view,1", "user", "missing user"),
    ("-5", "1,1000000000,view,1", "user", "negative user id; expected an id from 0, or any text"),
    ("u", ",1000000000,view,1", "item", "missing item"),
    ("u", "-1,1000000000,view,1", "item", "negative item id; expected an id from 0, or any text"),
    ("u", "1,,view,1", "ts", "missing timestamp"),
    ("u", "1,yesterday,view,1", "ts", "unparsable time; expected seconds since 1970"),
    ("u", "1,nan,view,1", "ts", "unparsable time; expected seconds since 1970"),
    ("u", "1,1e300,view,1", "ts", "unparsable time; expected seconds since 1970"),
    ("u", "1,0,view,1", "ts", "time before 1990; is it seconds since 1970?"),
    ("u", "1,1700000000000,view,1", "ts", "time after 2100; is it seconds since 1970?"),
    ("u", "1,1000000000,,1", "what", "missing action"),
    ("u", "1,1000000000,view,NaN", "strength", "value is not a finite number"),
    ("u", "1,1000000000,view,inf", "strength", "value is not a finite number"),
    ("u", "1,1000000000,view,1e39", "strength", "value is not a finite number"),
    ("u", "1,1000000000,view,much", "strength", "value is not a finite number"),
    ("u", "1,1000000000,view", "row", "too few fields in the row"),
    ("u", "1,1000000000,view,1,2", "row", "too many fields in the row"),
]


@pytest.mark.parametrize(("user", "rest", "field", "reason"), BAD_ROWS, ids=[f"{f}-{i}" for i, (_, _, f, _) in enumerate(BAD_ROWS)])
def test_bad_row(tmp_path: Path, user: str, rest: str, field: str, reason: str) -> None:
    bad = f"{user},{rest}"
    counts = run_csv(tmp_path, EVENTS + bad + "\nzoe,3,1000000500,view,1\n")
    assert quarantine(tmp_path) == [(4, field, reason)]
    row = table(tmp_path, "quarantine").iloc[0]
    assert row["file"] == str(tmp_path / "log.csv") and row["raw"] == bad
    assert counts["reasons"] == {reason: 1}
    assert (counts["rows_read"], counts["rows_accepted"], counts["users"]) == (5, 4, 3)


BAD_IMPRESSIONS = [
    ("u,1,1000000000,r9,1,2,0.5,a", "click", "unknown label; expected 0 or 1"),
    ("u,1,1000000000,r9,1,,0.5,a", "click", "unknown label; expected 0 or 1"),
    ("u,1,1000000000,r9,1,yes,0.5,a", "click", "unknown label; expected 0 or 1"),
    ("u,1,1000000000,,1,0,0.5,a", "request", "missing request"),
    ("u,1,1000000000,r9,0,0,0.5,a", "place", "position 0; expected one from 1, or dataset.first_position: 0"),
    ("u,1,1000000000,r9,-1,0,0.5,a", "place", "position is not a whole number from 1"),
    ("u,1,1000000000,r9,1.5,0,0.5,a", "place", "position is not a whole number from 1"),
    ("u,1,1000000000,r9,99999999999,0,0.5,a", "place", "position is not a whole number from 1"),
    ("u,1,1000000000,r9,,0,0.5,a", "place", "position is not a whole number from 1"),
    ("u,1,1000000000,r9,1,0,0,a", "p", "propensity is not in (0, 1]"),
    ("u,1,1000000000,r9,1,0,1.01,a", "p", "propensity is not in (0, 1]"),
    ("u,1,1000000000,r9,1,0,-0.1,a", "p", "propensity is not in (0, 1]"),
    ("u,1,1000000000,r9,1,0,nan,a", "p", "propensity is not in (0, 1]"),
    ("ann,7,1000000000,r1,2,0,0.5,a", "row", DUPLICATE_IMPRESSION),
]


@pytest.mark.parametrize(("bad", "field", "reason"), BAD_IMPRESSIONS, ids=[f"{f}-{i}" for i, (_, f, _) in enumerate(BAD_IMPRESSIONS)])
def test_bad_impression(tmp_path: Path, bad: str, field: str, reason: str) -> None:
    counts = run_csv(tmp_path, SHOWN + bad + "\n", SHOWN_COLUMNS, propensity_kind="marginal")
    assert quarantine(tmp_path) == [(4, field, reason)]
    assert (counts["impressions"], counts["items"]) == (3, 2)  # item 7 of the duplicate is no item


def test_exact_duplicates_keep_the_first(tmp_path: Path) -> None:
    text = HEAD + "a,1,1000000000,view,1\na,1,1000000000,view,2\na,1,1000000000,buy,3\na,1,1000000001,view,4\n a ,1,1000000000.0,view,5\n"
    run_csv(tmp_path, text)
    assert quarantine(tmp_path) == [(2, "row", DUPLICATE_EVENT), (5, "row", DUPLICATE_EVENT)]
    assert table(tmp_path, "interactions")["value"].tolist() == [1, 3, 4]


def test_rows_are_counted_from_the_top_whatever_is_set_aside(tmp_path: Path) -> None:
    """Row numbers, when DuckDB's rejects and ours take turns, in two files."""
    lines = [f"u{i},1,{1000000000 + i},view,1" for i in range(40)]
    for i in (0, 3, 4, 20):
        lines[i] = f"u{i},1,{1000000000 + i}"
    for i in (1, 5, 21, 39):
        lines[i] = f"u{i},1,never,view,1"
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(HEAD + "\n".join(lines).replace("u", name[0]) + "\n")
    counts = run(tmp_path, {"kind": "event_log", "source": str(tmp_path / "?.csv"), "columns": COLUMNS})
    assert counts["rows_read"] == 80
    rejected = table(tmp_path, "quarantine")
    assert [Path(f).name for f in rejected["file"]] == ["a.csv"] * 8 + ["b.csv"] * 8
    assert rejected["row"].tolist() == [1, 2, 4, 5, 6, 21, 22, 40] * 2
    assert rejected["raw"].tolist()[:3] == [line.replace("u", "a") for line in (lines[0], lines[1], lines[3])]


def test_too_many_bad_rows_stop_the_pipeline(tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    run_csv(tmp_path, EVENTS)
    before = hash_path(tables)
    bad = "x,1,never,view,1\n" * 2 + "x,,1000000000,view,1\n"
    with pytest.raises(QuarantineError) as error:
        run_csv(tmp_path, EVENTS + bad, settings={"max_quarantined_share": 0.4})
    message = str(error.value)
    assert f"{tmp_path / 'log.csv'}: 3 of 6 rows were rejected (50.0%), more than ingest.max_quarantined_share (40.0%)" in message
    log = tmp_path / "log.csv"
    assert f"2 × unparsable time; expected seconds since 1970; first: {log}, row 4, column 'ts'" in message
    assert f"1 × missing item; first: {log}, row 6, column 'item'" in message
    assert str(rejected_file(tables)) in message
    assert pq.read_table(rejected_file(tables))["row"].to_pylist() == [4, 5, 6]
    assert hash_path(tables) == before  # what stood there stays
    run_csv(tmp_path, EVENTS + bad, settings={"max_quarantined_share": 0.5})
    assert not rejected_file(tables).exists()


def test_no_good_row_is_an_error_at_any_share(tmp_path: Path) -> None:
    with pytest.raises(QuarantineError, match="1 of 1 rows"):
        run_csv(tmp_path, HEAD + "x,1,never,view,1\n", settings={"max_quarantined_share": 1.0})


# ---------------------------------------------------------------- files that cannot be read

BAD_FILES = [
    ("empty", b"", {}, "the file is empty; expected a header and rows"),
    ("header only", HEAD.encode(), {}, "a header but no rows"),
    (
        "wrong delimiter",
        EVENTS.replace(",", ";").encode(),
        {},
        r"no column 'user', .*; the file has 'user;item;ts;what;strength'; expected them .* between ','",
    ),
    ("missing column", EVENTS.replace("strength", "power").encode(), {}, "no column 'strength'; the file has 'user', 'item', 'ts', 'what', 'power'"),
    ("repeated column", b"user,item,ts,what,strength,ts\n", {}, "column 'ts' stands more than once in the header"),
    ("latin-1 as utf-8", EVENTS.replace("ann", "zoë").encode("latin-1"), {}, "not utf-8 text: line 2 .*expected dataset.encoding"),
    ("latin-1 header as utf-8", EVENTS.replace("strength", "stärke").encode("latin-1"), {}, "not utf-8 text: its header is none of that encoding"),
    ("utf-16 as utf-8", EVENTS.encode("utf-16"), {}, "not utf-8 text: it starts with the byte order mark of utf-16"),
    ("utf-16 without mark as utf-8", EVENTS.encode("utf-16-le"), {}, "not utf-8 text: its first line has null characters"),
    ("utf-8 as utf-16", EVENTS.encode(), {"encoding": "utf-16"}, "not utf-16 text|no column"),
    ("open quote", (EVENTS + 'eve,"3,1000000500,view,1\nzoe,3,1000000500,view,1\n').encode(), {}, "line 5 opens a quote that is never closed"),
]


@pytest.mark.parametrize(("content", "dataset", "message"), [case[1:] for case in BAD_FILES], ids=[case[0] for case in BAD_FILES])
def test_unreadable_file(tmp_path: Path, content: bytes, dataset: dict[str, str], message: str) -> None:
    with pytest.raises(DatasetError, match=message) as error:
        run_csv(tmp_path, content, **dataset)
    assert str(tmp_path / "log.csv") in str(error.value)
    assert list(tmp_path.glob("*")) == [tmp_path / "log.csv"]  # no tables, nothing half-made


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_each_encoding_is_read(tmp_path: Path, encoding: str) -> None:
    run_csv(tmp_path, EVENTS.replace("ann", "zoë").encode(encoding), encoding=encoding.replace("-sig", ""))
    assert table(tmp_path, "users")["user_key"].tolist() == ["zoë", "bob"]


def test_quotes_line_ends_and_delimiters(tmp_path: Path) -> None:
    text = '"user";"item";"ts";"what";"strength"\r\n"smith; ann";"say ""hi""";1000000000;"two\nlines";1\r\n'
    run_csv(tmp_path, text, delimiter=";")
    assert table(tmp_path, "users")["user_key"].tolist() == ["smith; ann"]
    assert table(tmp_path, "items")["item_key"].tolist() == ['say "hi"']
    assert table(tmp_path, "interactions")["action"].tolist() == ["two\nlines"]


def test_missing_file_and_glob_without_match(tmp_path: Path) -> None:
    for source, message in (("none.csv", "no such file"), ("*.csv", "no file matches this glob"), (".", "is a folder; expected a file, or a glob")):
        with pytest.raises(DatasetError, match=message):
            run(tmp_path, {"kind": "event_log", "source": str(tmp_path / source), "columns": COLUMNS})


def test_an_empty_part_among_others_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "part-0.csv").write_text("")
    (tmp_path / "part-1.csv").write_text(EVENTS)
    assert run(tmp_path, {"kind": "event_log", "source": str(tmp_path / "part-*.csv"), "columns": COLUMNS})["rows_read"] == 3


@pytest.mark.parametrize("keep", [3, 200, -8])
def test_damaged_parquet(tmp_path: Path, keep: int) -> None:
    source = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user": ["a"], "item": [1], "ts": [1000000000]}), source)
    source.write_bytes(source.read_bytes()[:keep])
    with pytest.raises(DatasetError, match=r"log\.parquet: not a whole Parquet file"):
        run(tmp_path, {"kind": "event_log", "source": str(source), "columns": {"user": "user", "item": "item", "timestamp": "ts"}})


def test_parquet_types_are_read_as_a_csv_of_them_would_be(tmp_path: Path) -> None:
    times = pd.to_datetime(["2020-01-01T00:00:00.123456Z", "2020-01-01T00:00:01Z", None], format="ISO8601")
    for unit in ("s", "ms", "us", "iso"):
        for kind in (pa.timestamp("ns", tz="UTC"), pa.timestamp("us"), pa.timestamp("us", tz="Europe/Berlin")):
            log = pa.table({"u": [1.0, None, 3.0], "i": pa.array([7, 8, 9], pa.uint16()), "t": pa.array(times).cast(kind), "c": [True, False, True]})
            source = tmp_path / "log.parquet"
            pq.write_table(log, source)
            columns = {"user": "u", "item": "i", "timestamp": "t", "click": "c"}
            run(tmp_path, {"kind": "event_log", "source": str(source), "columns": columns, "timestamp_unit": unit})
            assert quarantine(tmp_path) == [(2, "u", "missing user"), (3, "t", "missing timestamp")]
            assert table(tmp_path, "users")["user_key"].tolist() == ["1"]
            assert table(tmp_path, "impressions")["timestamp"].tolist() == [pd.Timestamp("2020-01-01T00:00:00.123456Z")]


@pytest.mark.parametrize(
    ("unit", "text"),
    [
        ("s", "1000000000.25"),
        ("ms", "1000000000250"),
        ("us", "1000000000250000"),
        ("iso", "2001-09-09T01:46:40.25Z"),
        ("iso", "2001-09-09 03:46:40.25+02:00"),
    ],
)
def test_times_in_each_unit(tmp_path: Path, unit: str, text: str) -> None:
    run_csv(tmp_path, HEAD + f"a,1,{text},view,1\n", timestamp_unit=unit)
    assert table(tmp_path, "interactions")["timestamp"].tolist() == [pd.Timestamp("2001-09-09T01:46:40.25Z")]


def test_positions_from_zero(tmp_path: Path) -> None:
    run_csv(tmp_path, SHOWN.replace(",1,0,0.5", ",0,0,0.5"), SHOWN_COLUMNS, propensity_kind="conditional", first_position=0)
    assert table(tmp_path, "impressions")["position"].tolist() == [1, 3, 2]


@pytest.mark.parametrize(
    ("dataset", "key"),
    [
        ({"columns": SHOWN_COLUMNS}, "dataset.columns.propensity"),
        ({"columns": COLUMNS, "propensity_kind": "marginal"}, "dataset.propensity_kind"),
        ({"columns": {"user": "user", "item": "item", "timestamp": "ts"}, "like_from": 1.0}, "dataset.like_from"),
        ({"columns": {"user": "user", "item": "item", "timestamp": "ts"}, "click_actions": ["buy"]}, "dataset.click_actions"),
        ({"columns": COLUMNS, "candidates": "x.csv"}, "dataset.candidates"),
    ],
)
def test_settings_that_need_each_other(tmp_path: Path, dataset: dict, key: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ConfigError, match=f"^{key} is set"):
        run(tmp_path, {"kind": "event_log", "source": str(tmp_path / "log.csv"), **dataset})


@pytest.mark.parametrize("name", ["log.csv.gz", "it's a [log]*?.csv", "log.txt"])
def test_names_and_compression(tmp_path: Path, name: str) -> None:
    source = tmp_path / name
    source.write_bytes(gzip.compress(EVENTS.encode()) if name.endswith("gz") else EVENTS.encode())
    assert run(tmp_path, {"kind": "event_log", "source": str(source), "columns": COLUMNS})["rows_accepted"] == 3
