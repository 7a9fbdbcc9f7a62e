"""Whole tables pass; each way of breaking them is caught, by the name of the expectation and the column, with examples."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from components.expectations import Severity, all_expectations
from components.validate import validate
from longtrail.config import ValidationSettings
from longtrail.errors import DatasetError, ValidationError
from longtrail.files import read_json
from tests.toy import toy_tables

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "tables"
    toy_tables(folder)
    return folder


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text("validation: {click_rate: [0.05, 0.95]}\n")
    return path


@pytest.fixture
def tables(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "tables"))


def with_value(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    field = table.schema.field(column).with_nullable(True)
    values = table[column].to_pylist()
    values[row] = value
    return table.set_column(table.column_names.index(column), field, pa.array(values, field.type))


def change(tables: Path, name: str, edit: Callable[[pa.Table], pa.Table]) -> None:
    path = tables / f"{name}.parquet"
    table = edit(pq.read_table(path))
    path.unlink()
    pq.write_table(table, path)


def test_whole_tables_pass_with_data_docs(whole: Path, params: Path, tmp_path: Path) -> None:
    validate(whole, params, tmp_path / "validation")
    result = read_json(tmp_path / "validation" / "result.json")
    assert result["success"] and result["critical_failures"] == 0
    names = {e["name"] for e in result["expectations"]}
    assert {"impressions.click.allowed", "interactions.user_id.bounds", "summary.click_rate", "items.key"} <= names
    impressions = pq.read_table(whole / "impressions.parquet")
    assert result["summary"]["click_rate"] == pytest.approx(pc.mean(impressions["click"]).as_py())
    pages = list((tmp_path / "validation" / "data_docs").rglob("*.html"))
    assert {"index.html", "interactions.html", "impressions.html"} <= {page.name for page in pages}
    index = next(page for page in pages if page.name == "index.html").read_text()
    assert "impressions" in index
    page = (tmp_path / "validation" / "summary.html").read_text()
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "")  # nothing is fetched


def test_the_result_does_not_depend_on_the_run(whole: Path, params: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        validate(whole, params, tmp_path / name)
    assert (tmp_path / "a" / "result.json").read_bytes() == (tmp_path / "b" / "result.json").read_bytes()


BROKEN: dict[str, tuple[str, Callable[[pa.Table], pa.Table], tuple[str, ...]]] = {
    "a click of 2": ("impressions", lambda t: with_value(t, "click", 3, 2), ("impressions.click.allowed", "column click", "e.g. 2")),
    "a missing user": ("interactions", lambda t: with_value(t, "user_id", 5, None), ("interactions.user_id.present", "column user_id")),
    "the padding id": ("interactions", lambda t: with_value(t, "item_id", 0, 0), ("interactions.item_id.bounds", "e.g. 0")),
    "a position of 0": ("impressions", lambda t: with_value(t, "position", 0, 0), ("impressions.position.bounds", "e.g. 0")),
    "a propensity over 1": ("impressions", lambda t: with_value(t, "propensity", 0, 1.5), ("impressions.propensity.bounds", "e.g. 1.5")),
    "an item twice": ("items", lambda t: pa.concat_tables([t, t.slice(0, 1)]), ("items.key", "column item_id")),
    "an item that is not in the catalogue": ("items", lambda t: t.slice(1), ("summary.unknown_items",)),
    "a user that is not in the vocabulary": ("users", lambda t: t.slice(1), ("summary.unknown_users",)),
    "a missing column": ("interactions", lambda t: t.drop_columns(["action"]), ("interactions.columns", "interactions.action.present")),
    "a wrong type": (
        "impressions",
        lambda t: t.set_column(t.column_names.index("click"), "click", t["click"].cast(pa.float64())),
        ("impressions.click.type", "column click"),
    ),
    "rows out of order": (
        "interactions",
        lambda t: pa.concat_tables([t.slice(t.num_rows // 2), t.slice(0, t.num_rows // 2)]),
        ("summary.time_disorder",),
    ),
    "read before it happened": (
        "interactions",
        lambda t: t.set_column(
            t.column_names.index("available_at"), t.schema.field("available_at"), pc.subtract(t["timestamp"], pa.scalar(10**6, pa.duration("us")))
        ),
        ("interactions.available_after_event", "available_at"),
    ),
    "every impression clicked": (
        "impressions",
        lambda t: t.set_column(t.column_names.index("click"), t.schema.field("click"), pa.array([1] * t.num_rows, pa.int8())),
        ("summary.click_rate", "seen 1"),
    ),
    "two items at one position": ("impressions", lambda t: pa.concat_tables([t, t.slice(t.num_rows - 1)]), ("summary.duplicated_positions",)),
    "almost no events": ("interactions", lambda t: t.slice(0, 20), ("summary.interactions", "seen 20")),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_table_stops_the_pipeline(how: str, tables: Path, params: Path, tmp_path: Path) -> None:
    name, edit, expected = BROKEN[how]
    change(tables, name, edit)
    with pytest.raises(ValidationError) as raised:
        validate(tables, params, tmp_path / "validation")
    for text in expected:
        assert text in str(raised.value)
    result = read_json(tmp_path / "validation" / "result.json")
    assert not result["success"] and result["critical_failures"] >= 1


def test_a_warning_does_not_stop_it(whole: Path, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("validation: {max_top_item_share: 0.0001, click_rate: [0.999, 1.0], warn_only: [click_rate]}\n")
    validate(whole, params, tmp_path / "validation")
    result = read_json(tmp_path / "validation" / "result.json")
    failed = {e["name"]: e["severity"] for e in result["expectations"] if not e["success"]}
    assert result["success"] and result["warnings"] == len(failed)
    assert failed["summary.top_item_share"] == failed["summary.click_rate"] == Severity.WARNING.value


def test_missing_tables_are_named(tmp_path: Path, params: Path) -> None:
    with pytest.raises(DatasetError, match=r"interactions\.parquet: no such file"):
        validate(tmp_path, params, tmp_path / "validation")


def test_every_expectation_has_a_name_of_its_own() -> None:
    names = [e.name for e in all_expectations(ValidationSettings(), has_impressions=True)]
    assert len(names) == len(set(names)) and len(names) > 50


def test_the_command_says_its_own_and_nothing_else(whole: Path, params: Path, tmp_path: Path) -> None:
    """DuckDB counts as leaked, in a page of lines, what still stands when Python ends."""
    command = [sys.executable, "-m", "components.validate", "--tables", str(whole), "--params", str(params), "--validation", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"expectations hold, 0 warnings: {tmp_path / 'out'}")
