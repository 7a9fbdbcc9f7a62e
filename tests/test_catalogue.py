"""The catalogue against its own table."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from longtrail.catalogue import Catalogue
from longtrail.errors import HistoryError
from longtrail.schema import CATALOGUE


def write(path: Path, rows: list[dict]) -> Path:
    schema = CATALOGUE.arrow()
    whole = [{field.name: 0 if pa.types.is_integer(field.type) else None for field in schema} | {"first_seen": 7} | row for row in rows]
    pq.write_table(pa.Table.from_pylist(whole, schema=schema), path)
    return path


ROWS = [
    {"item_id": 1, "item_key": "b", "category_id": 2, "category": "x", "title": "B", "first_seen": 1_000, "train_events": 3, "item_clicks": 9},
    {"item_id": 2, "item_key": "a", "category_id": 0, "first_seen": 2_000, "train_clicks": 4},
]


def test_by_hand(tmp_path: Path) -> None:
    catalogue = Catalogue.open(write(tmp_path / "catalogue.parquet", ROWS))
    assert catalogue.items == 2
    assert catalogue.keys == ("", "b", "a") and catalogue.titles == (None, "B", None)
    assert catalogue.categories.tolist() == [0, 2, 0] and catalogue.categories.dtype == np.int64
    assert catalogue.first_seen.tolist() == [0, 1_000, 2_000]
    assert catalogue.train_events.tolist() == [0, 3, 0] and catalogue.train_clicks.tolist() == [0, 0, 4]
    assert catalogue.item_clicks.tolist() == [0, 9, 0]
    assert [catalogue.id_of(key) for key in ("a", "b", "c", "")] == [2, 1, None, None]


def test_empty(tmp_path: Path) -> None:
    catalogue = Catalogue.open(write(tmp_path / "catalogue.parquet", []))
    assert catalogue.items == 0 and catalogue.categories.tolist() == [0]


def test_the_toy_catalogue_counts_what_its_log_holds(toy_features_folder: Path, toy_tables_folder: Path) -> None:
    catalogue = Catalogue.open(toy_features_folder / "catalogue.parquet")
    items = pq.read_table(toy_tables_folder / "items.parquet")
    assert catalogue.item_events[1:].tolist() == items["popularity"].to_pylist()
    assert [catalogue.id_of(key) for key in items["item_key"].to_pylist()] == items["item_id"].to_pylist()
    train = pq.read_table(toy_features_folder / "examples" / "train.parquet")
    counted = {row["item_id"]: row for row in train.group_by("item_id").aggregate([("click", "sum"), ("click", "count")]).to_pylist()}
    for item in range(1, catalogue.items + 1):
        row = counted.get(item, {"click_sum": 0, "click_count": 0})
        assert (catalogue.train_clicks[item], catalogue.train_impressions[item]) == (row["click_sum"], row["click_count"])
    assert catalogue.train_events.sum() == np.load(toy_features_folder / "train_lengths.npy").sum()
    assert pc.sum(train["click"]).as_py() == catalogue.train_clicks.sum()


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.parquet"
    with pytest.raises(HistoryError, match=r"catalogue\.parquet: no such file"):
        Catalogue.open(path)
    path.write_text("this is no Parquet file at all")
    with pytest.raises(HistoryError, match="not a catalogue table"):
        Catalogue.open(path)
    pq.write_table(pa.table({"item_id": [1]}), path)
    with pytest.raises(HistoryError, match="no column item_key"):
        Catalogue.open(path)
    with pytest.raises(HistoryError, match="row 2: item_id is 3; expected 2"):
        Catalogue.open(write(path, [ROWS[0], ROWS[1] | {"item_id": 3}]))
