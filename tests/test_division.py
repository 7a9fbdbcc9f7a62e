"""Splits by an engine against those of arrays, row by row."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longtrail import division
from longtrail.config import IngestSettings, SplitSettings
from longtrail.division import EngineInstants, divide
from longtrail.engines import Engine, open_engine
from longtrail.errors import EvaluationError
from longtrail.schema import IMPRESSIONS, INTERACTIONS
from longtrail.splits import SPLITS, ArrayInstants, leave_one_out, split_bounds, temporal_split, train_lengths
from tests.features.helpers import write_events

T0 = 1_700_000_000_000_000  # µs
YEAR = 365 * 86_400_000_000  # µs
USERS = 7


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return open_engine(tmp_path_factory.mktemp("engine"), IngestSettings(memory_limit="500MB", threads=1))


def write(folder: Path, users: int, span: int, rows: int, shown: int, seed: int) -> Path:
    """Both tables with times in 0..`span`, in no order; requests of up to four rows, some of which span instants and users."""
    rng = np.random.default_rng(seed)
    times = T0 + rng.integers(0, span, rows)
    late = times + rng.choice([0, 0, 1, span // 3], rows)
    write_events(folder, list(zip(rng.integers(1, users + 1, rows).tolist(), [1] * rows, times.tolist(), late.tolist(), strict=True)))
    requests = rng.integers(0, max(shown // 2, 1), shown)
    user = np.where(rng.random(shown) < 0.1, rng.integers(1, users + 1, shown), requests % users + 1)
    moments = T0 + np.where(rng.random(shown) < 0.2, rng.integers(0, span, shown), requests * 7919 % span)
    stamp = pa.array(moments, pa.timestamp("us", tz="UTC"))
    values = {
        "request_id": [f"r{request * 31 % 97:02d}" for request in requests.tolist()], "user_id": user, "item_id": [1] * shown, "timestamp": stamp,
        "available_at": stamp, "position": [1] * shown, "click": [0] * shown, "propensity": [None] * shown, "policy": ["p"] * shown,
    }  # fmt: skip
    pq.write_table(pa.table(values).cast(IMPRESSIONS.arrow()), folder / "impressions.parquet")
    return folder


def micros(table: pa.Table, name: str) -> np.ndarray:
    return table[name].cast(pa.int64()).to_numpy()


@pytest.mark.parametrize(("span", "rows", "shown"), [(YEAR, 500, 400), (12, 60, 40), (3, 12, 5), (YEAR, 300, 0)])
@pytest.mark.parametrize("settings", [SplitSettings(), SplitSettings(valid_share=0.3, test_share=0), SplitSettings(kind="leave_one_out")])
def test_every_row_is_where_the_definition_has_it(settings: SplitSettings, span: int, rows: int, shown: int, engine: Engine, tmp_path: Path) -> None:
    tables = write(tmp_path, USERS - 1, span, rows, shown, seed=span % 97 + rows)  # the last user has no rows
    events, seen = (pq.read_table(tables / f"{table.name}.parquet") for table in (INTERACTIONS, IMPRESSIONS))
    times = micros(seen if shown else events, "timestamp")
    try:
        bounds = split_bounds(times, settings) if settings.kind == "temporal" else None
    except EvaluationError as error:
        with pytest.raises(EvaluationError) as found:
            divide(engine, tables, settings, USERS)
        assert str(found.value) == str(error)
        return
    if bounds is not None:
        codes = {table.name: temporal_split(micros(rows, "timestamp"), bounds) for table, rows in ((INTERACTIONS, events), (IMPRESSIONS, seen))}
    else:
        requests = np.unique(seen["request_id"].to_pylist(), return_index=True, return_inverse=True)
        first_row = requests[1][requests[2]] if shown else np.zeros(0, dtype=np.int64)
        codes = {
            INTERACTIONS.name: leave_one_out(events["user_id"].to_numpy(), micros(events, "available_at"), micros(events, "timestamp")),
            IMPRESSIONS.name: leave_one_out(seen["user_id"].to_numpy(), micros(seen, "timestamp"), requests_n=first_row),
        }
    split = divide(engine, tables, settings, USERS)
    assert split.bounds == bounds
    lengths = train_lengths(events["user_id"].to_numpy(), micros(events, "available_at"), users=USERS, bounds=bounds)
    np.testing.assert_array_equal(split.lengths, lengths)
    for table in (INTERACTIONS, IMPRESSIONS):
        for code in range(len(SPLITS)):
            rows_of = np.sort(engine.fetch(split.rows(table, code).select("row"))["row"].to_numpy())
            np.testing.assert_array_equal(rows_of, np.flatnonzero(codes[table.name] == code))


@pytest.mark.parametrize("times", [[5], [5, 5, 9], [0, YEAR, 20 * YEAR, 20 * YEAR, 3], np.random.default_rng(0).integers(0, YEAR, 2_000).tolist()])
def test_any_place_among_the_instants(times: list[int], engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = pa.array(T0 + np.array(times), pa.timestamp("us", tz="UTC"))
    pq.write_table(pa.table({"at": stamps}), tmp_path / "times.parquet")
    found, expected = EngineInstants(engine, engine.parquet(tmp_path / "times.parquet"), "at"), ArrayInstants(T0 + np.array(times))
    assert found.count() == expected.count() == len(times)
    for rows in (division._ROWS, 0):  # 0: in ever shorter spans, to the microsecond
        monkeypatch.setattr(division, "_ROWS", rows)
        for place in sorted({0, len(times) // 3, len(times) - 1}):
            assert found.at(place) == expected.at(place)


def test_no_rows(engine: Engine, tmp_path: Path) -> None:
    tables = write(tmp_path, 1, 5, 0, 0, seed=0)
    with pytest.raises(EvaluationError, match="split: the log has no rows"):
        divide(engine, tables, SplitSettings(), 1)
