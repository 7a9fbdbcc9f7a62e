"""What ids mean: that a late event moves them, and that keys find their places again."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from components.ingest import ingest
from longtrail.models.vocabulary import FILE, Vocabulary, moved_ids, write_vocabulary

COLUMNS = {"user": "user", "item": "item", "timestamp": "ts", "category": "kind"}
DAY = 1_700_000_000  # s
YESTERDAY = [("ann", "tea", DAY, "drink"), ("bob", "cup", DAY + 200, "thing"), ("ann", "pot", DAY + 300, "thing"), ("bob", "tea", DAY + 400, "drink")]
LATE = ("eve", "jam", DAY + 150, "food")  # happened between the first two, written after all of them


def tables(folder: Path, rows: list[tuple[str, str, int, str]]) -> Path:
    folder.mkdir()
    pd.DataFrame(rows, columns=["user", "item", "ts", "kind"]).to_parquet(folder / "log.parquet")
    settings = {"dataset": {"kind": "event_log", "source": str(folder / "log.parquet"), "columns": COLUMNS}}
    (folder / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    ingest(folder / "params.yaml", folder / "tables")
    return folder / "tables" / "items.parquet"


def test_a_late_event_moves_the_ids_of_what_came_after_it(tmp_path: Path) -> None:
    before, after = tables(tmp_path / "before", YESTERDAY), tables(tmp_path / "after", [*YESTERDAY, LATE])
    old, new = Vocabulary.read(before), Vocabulary.read(after)
    assert old.items.to_pylist() == ["tea", "cup", "pot"] and new.items.to_pylist() == ["tea", "jam", "cup", "pot"]
    assert old.categories.to_pylist() == ["drink", "thing"] and new.categories.to_pylist() == ["drink", "food", "thing"]
    items, categories = old.places_in(new)
    assert items.tolist() == [0, 1, 3, 4] and categories.tolist() == [0, 1, 3]
    assert new.places_in(old)[0].tolist() == [0, 1, -1, 2, 3]
    model = tmp_path / "model"
    model.mkdir()
    assert moved_ids(model, after) == 0  # from before models had a vocabulary
    write_vocabulary(before, model)
    assert moved_ids(model, before) == 0 and moved_ids(model, after) == 3
    assert pq.read_table(model / FILE).column_names == ["item_key", "category_id", "category"]


def test_items_without_a_category_and_a_log_without_any(tmp_path: Path) -> None:
    columns = {"item_key": ["a", "b", "c"], "category_id": pa.array([0, 2, 1], pa.int32()), "category": [None, "x", "y"]}
    pq.write_table(pa.table(columns), tmp_path / "some.parquet")
    assert Vocabulary.read(tmp_path / "some.parquet").categories.to_pylist() == ["y", "x"]
    bare = {"item_key": ["a"], "category_id": pa.array([0], pa.int32()), "category": pa.array([None], pa.string())}
    pq.write_table(pa.table(bare), tmp_path / "none.parquet")
    none = Vocabulary.read(tmp_path / "none.parquet")
    assert len(none.categories) == 0
    assert [place.tolist() for place in none.places_in(Vocabulary.read(tmp_path / "some.parquet"))] == [[0, 1], [0]]
    assert np.array_equal(none.places_in(none)[1], [0])
