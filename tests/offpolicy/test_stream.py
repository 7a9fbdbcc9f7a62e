"""A log read in blocks gives what the log in memory gives, wherever blocks, row groups and files end; and logs that cannot be read are named."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longtrail.errors import EvaluationError
from longtrail.offpolicy.columns import finish, user_columns
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.offpolicy.stream import open_log
from longtrail.offpolicy.sums import UserSums
from longtrail.schema import ESTIMATED, PROPENSITY_METADATA, PROPENSITY_SOURCE_METADATA, Propensity

CONDITIONAL = {PROPENSITY_METADATA: "conditional"}


def table_of(requests, seed=0, longest=6, **changes):
    """A random log of lists of 1 to `longest` rows with two policies and a reward model."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, requests)
    rows, request = int(lengths.sum()), np.repeat(np.arange(requests), lengths)
    position = np.concatenate([np.arange(1, n + 1) for n in lengths])
    unit = {name: rng.random(rows) for name in ("predicted", "p_a_expected", "p_b_expected", "p_a_direct", "p_b_direct")}
    columns = {
        "request_id": pa.array([f"r{n}" for n in request]),
        "user_id": (request // 3) % 97 + 1,
        "item_id": rng.integers(1, 9, rows),
        "timestamp": pa.array(1_700_000_000_000_000 + request * 1_000_003, pa.timestamp("us", tz="UTC")),
        "position": position.astype(np.int32),
        "click": rng.integers(0, 2, rows).astype(np.int8),
        "propensity": rng.uniform(0.3, 1, rows),
        "policy": pa.array(["old"] * rows),
        "p_a": rng.uniform(0, 0.9, rows),
        "p_b": rng.uniform(0, 0.9, rows),
        "category": pa.array([f"c{n % 3}" for n in request]),
        **unit,
        **changes,
    }
    return pa.table({name: values for name, values in columns.items() if values is not None})


def assert_equal(sums, whole):
    """But for the count of rows whose propensity is unlike their block's first: any row of it means "not uniform"."""
    assert sums.columns == whole.columns and (sums.users_U == whole.users_U).all()
    for column in whole.columns:
        if not column.endswith("/odd"):
            np.testing.assert_allclose(sums[column], whole[column], rtol=1e-9, atol=1e-9, err_msg=column)


def write(path, table, metadata=CONDITIONAL, groups=1 << 20):
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=groups)
    return path


def sums_of(reader):
    total, rows = None, 0
    for block in reader:
        rows += block.slates.rows
        sums = UserSums.build(block.slates.users_N, user_columns(block.slates, block.a, block.b))
        total = sums if total is None else total.merge(sums)
    return total, rows


def in_memory(table, kind=Propensity.CONDITIONAL, a="p_a", b="p_b"):
    get = lambda name: table[name].to_numpy()  # noqa: E731
    request = np.char.lstrip(get("request_id").astype(str), "r").astype(np.int64)  # numbered in the file's order, as replay's draws are
    slates = LoggedSlates.build(
        requests=request, users=get("user_id"), positions=get("position"), rewards=get("click"), propensities=get("propensity"),
        kind=kind, predicted=get("predicted"),
    )  # fmt: skip
    sides = [EvaluatedPolicy.build(n, slates, get(n), expected=get(f"{n}_expected"), direct=get(f"{n}_direct")) for n in (a, b)]
    return UserSums.build(slates.users_N, user_columns(slates, *sides))


@pytest.mark.parametrize(("block", "groups"), [(1, 7), (2, 3), (5, 1 << 20), (17, 11), (64, 100), (1 << 18, 40)])
def test_any_cut_gives_the_whole(tmp_path, block, groups):
    """Blocks smaller than a request, row groups inside requests: sums, counts and estimates equal those of the log in memory."""
    table = table_of(120)
    path = write(tmp_path / "log.parquet", table, groups=groups)
    reader = open_log(path, "p_a", "p_b", block_rows=block)
    sums, rows = sums_of(reader)
    whole = in_memory(table)
    assert rows == reader.rows == table.num_rows and reader.clicks == int(np.sum(table["click"])) and reader.lists
    assert_equal(sums, whole)
    one, two = finish(sums), finish(whole)
    assert one.tuned == two.tuned and one.estimators == two.estimators
    assert sums_of(reader)[1] == rows and reader.clicks == int(np.sum(table["click"]))  # a reader can be read again


def test_a_folder_of_files_is_one_log(tmp_path):
    """Requests may end in the next file."""
    table = table_of(60, seed=3)
    for number, (start, stop) in enumerate([(0, 31), (31, 32), (32, 100), (100, table.num_rows)]):
        write(tmp_path / f"part-{number}.parquet", table.slice(start, stop - start))
    sums, _ = sums_of(open_log(tmp_path, "p_a", "p_b", block_rows=13))
    assert_equal(sums, in_memory(table))


def test_blocks_hold_whole_requests_and_their_context(tmp_path):
    table = table_of(80, seed=1)
    reader = open_log(write(tmp_path / "log.parquet", table), "p_a", "propensity", block_rows=20, context=["policy"])
    assert reader.names == ("p_a", "the logger") and reader.kind is Propensity.CONDITIONAL and not reader.estimated
    seen, requests = [], 0
    for block in reader:
        assert block.slates.first_request == requests
        requests += block.slates.requests
        assert (block.slates.places_N[block.slates.requests_N == 0][0] == 0) and np.allclose(block.b.weights_N, 1.0)
        seen.append(block.context)
    assert requests == 80
    for name, column in (("time", "timestamp"), ("item", "item_id"), ("category", "category"), ("policy", "policy")):
        values = table[column].cast(pa.int64()) if name == "time" else table[column]
        assert np.concatenate([context[name] for context in seen]).tolist() == values.to_pylist()


def test_policies_in_files_of_their_own(tmp_path):
    """Row for row as the log; cut otherwise than it. Other rows, or too few, are named."""
    table = table_of(50, seed=2)
    log = write(tmp_path / "log.parquet", table)
    of_b = {"probability": table["p_b"], "expected": table["p_b_expected"], "direct": table["p_b_direct"]}
    own = pa.table({"request_id": table["request_id"], "position": table["position"].cast(pa.int64()), **of_b})
    path = write(tmp_path / "challenger.parquet", own, {}, groups=9)
    reader = open_log(log, "p_a", str(path), block_rows=16)
    assert reader.names == ("p_a", "challenger")
    sums, _ = sums_of(reader)
    assert_equal(sums, in_memory(table))
    write(path, own.slice(0, own.num_rows - 1), {})
    with pytest.raises(EvaluationError, match=r"challenger\.parquet: ends before the log"):
        sums_of(open_log(log, "p_a", path))
    write(path, pa.concat_tables([own.slice(1), own.slice(0, 1)]), {})
    with pytest.raises(EvaluationError, match=r"challenger\.parquet: (request_id|position) .* where the log has"):
        sums_of(open_log(log, "p_a", path))


def with_rows(table, rows):
    return table.take(pa.array(rows))


def test_repeated_rows_and_clicks_without_impressions_are_left_out_and_counted(tmp_path):
    table = table_of(40, seed=5)
    rows = np.arange(table.num_rows)
    doubled = with_rows(table, np.sort(np.concatenate([rows, [0, 10, 10, 33]])))
    reader = open_log(write(tmp_path / "log.parquet", doubled), "p_a", "p_b", block_rows=25)
    sums, _ = sums_of(reader)
    assert (reader.repeated_rows, reader.stray_clicks, reader.rows) == (4, 0, len(rows) + 4)
    assert_equal(sums, in_memory(table))
    bottom = np.flatnonzero(np.append(np.diff(table["position"].to_numpy()) <= 0, True))[:3]  # rows at the bottom of their list
    columns = {name: table[name].to_pylist() for name in ("propensity", "position", "click")}
    for row, name in zip(bottom, ("propensity", "propensity", "position"), strict=True):
        columns[name][row], columns["click"][row] = None, 1
    stray = table
    for name, values in columns.items():
        stray = stray.set_column(stray.schema.get_field_index(name), name, pa.array(values, table.schema.field(name).type))
    reader = open_log(write(tmp_path / "log.parquet", stray), "p_a", "p_b")
    sums, used = sums_of(reader)
    assert (reader.repeated_rows, reader.stray_clicks, used) == (0, 3, len(rows) - 3)
    assert_equal(sums, in_memory(with_rows(table, np.setdiff1d(rows, bottom))))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"propensity": 1.5}, {}, r"log\.parquet: block of rows from 0.*propensity must lie"),
        ({"propensity": None}, {}, "propensity is missing"),
        ({"p_b": 1.2}, {}, r"policy p_b.*\[0, 1\]"),
        ({"p_b_expected": float("nan")}, {}, "expected reward must be a finite"),
        ({"click": 3}, {}, "request r0.*click is 3; expected 0 or 1"),
        ({"position": 0}, {}, "request r0.*position is 0"),
        ({"user_id": None}, {}, "request r0.*user_id is nan"),
        ({}, {"b": "p_c"}, r"no column 'p_c'; it has request_id"),
        ({}, {"context": ["country"]}, "no column 'country'"),
        ({}, {"metadata": {}}, "does not say what its propensities are"),
        ({}, {"metadata": {PROPENSITY_METADATA: "none"}}, "does not say what its propensities are"),
    ],
)
def test_logs_that_cannot_be_used_are_named(tmp_path, changes, options, message):
    table = table_of(20)
    for name, value in changes.items():
        values = table[name].to_pylist()
        values[0] = value
        if name == "propensity" and value is None:
            table = table.set_column(table.schema.get_field_index("click"), "click", pa.array([0, *table["click"].to_pylist()[1:]], pa.int8()))
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, table.schema.field(name).type))
    path = write(tmp_path / "log.parquet", table, options.pop("metadata", CONDITIONAL))
    with pytest.raises(EvaluationError, match=message):
        sums_of(open_log(path, "p_a", options.pop("b", "p_b"), **options))


def test_the_logger_itself_gets_its_own_rate_from_every_estimator(tmp_path):
    """Also from the doubly robust ones, with no expected rewards of its own: then B can be compared with it by them."""
    table = table_of(60, seed=4)
    reader = open_log(write(tmp_path / "log.parquet", table), "propensity", "p_b", block_rows=50)
    found = finish(sums_of(reader)[0])
    rate = table["click"].to_numpy().mean()
    for name in ("ips", "snips", "dr", "sndr", "slate_ips", "reward_interaction"):
        assert found.value(name, "a") == pytest.approx(rate), name
    assert {"dr/a/n", "dr/b/n", "sndr/b/n"} <= set(found.sums.columns)


def test_scattered_requests_are_refused(tmp_path):
    table = table_of(40, seed=6)
    order = np.random.default_rng(0).permutation(table.num_rows)
    with pytest.raises(EvaluationError, match=r"stand together|leaves a gap"):
        sums_of(open_log(write(tmp_path / "log.parquet", with_rows(table, order)), "p_a", "p_b"))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(EvaluationError, match="no such file"):
        open_log(tmp_path / "nothing.parquet", "p_a", "p_b")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(EvaluationError, match="not a Parquet file"):
        open_log(tmp_path / "text.parquet", "p_a", "p_b")


def test_one_item_requests_at_any_position(tmp_path):
    """No two rows of a request: positions are context, marginal and conditional are one thing, whatever a block holds."""
    table = table_of(50, longest=1, position=np.tile([1, 2, 3, 4, 5], 10).astype(np.int32))
    reader = open_log(write(tmp_path / "log.parquet", table, {PROPENSITY_METADATA: "marginal"}), "p_a", "p_b", block_rows=8)
    sums, _ = sums_of(reader)
    assert not reader.lists and "ips/a/n" in sums.columns and "item_position/a/n" not in sums.columns
    assert_equal(sums, in_memory(table, Propensity.MARGINAL))


def test_replay_draws_alike_however_a_log_is_cut(tmp_path):
    table = table_of(300, longest=1, propensity=np.full(300, 0.25))
    path = write(tmp_path / "log.parquet", table)
    totals = [sums_of(open_log(path, "p_a", "p_b", block_rows=rows))[0]["replay/b/d"].sum() for rows in (7, 64, 1_000)]
    assert len(set(totals)) == 1 and 0 < totals[0] < 300


def test_propensities_that_were_not_logged_are_estimated_and_marked(tmp_path):
    """A logger that looks at nothing: shares of each item at each position; the estimate is near that from its true propensities."""
    rng = np.random.default_rng(0)
    rows, chance = 20_000, np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    position = rng.integers(1, 3, rows)
    item = 1 + (chance[position - 1].cumsum(axis=1) < rng.random(rows)[:, None]).sum(axis=1)
    click = (rng.random(rows) < np.array([0.1, 0.3, 0.6])[item - 1]).astype(np.int8)
    pi = np.array([0.2, 0.3, 0.5])[item - 1]
    table = pa.table(
        {"request_id": np.arange(rows), "user_id": np.arange(rows) % 500 + 1, "item_id": item, "position": position, "click": click, "p_b": pi}
    )
    path = write(tmp_path / "log.parquet", table, {PROPENSITY_METADATA: "none"})
    reader = open_log(path, "p_b", "p_b", estimate=True, block_rows=3_000)
    assert reader.estimated and reader.kind is Propensity.MARGINAL
    found = finish(sums_of(reader)[0])
    assert all(block.slates.estimated for block in reader)
    assert found.value("ips", "b") == pytest.approx(0.1 * 0.2 + 0.3 * 0.3 + 0.6 * 0.5, abs=0.02)
    marked = write(tmp_path / "marked.parquet", table.append_column("propensity", pa.array(chance[position - 1, item - 1])), {
        PROPENSITY_METADATA: "marginal", PROPENSITY_SOURCE_METADATA: ESTIMATED,
    })  # fmt: skip
    assert open_log(marked, "p_b", "p_b").estimated
    assert found.value("ips", "b") == pytest.approx(finish(sums_of(open_log(marked, "p_b", "p_b"))[0]).value("ips", "b"), abs=0.01)
