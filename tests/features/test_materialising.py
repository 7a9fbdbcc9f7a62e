"""What is materialised in batches against Feast's own engine, which has all rows in memory."""

import contextlib
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import repository
from features.repository import ONLINE_FILE, apply, materialise


def rows(feast: Path) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(feast / ONLINE_FILE)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE '%entity_key%'")]
        found = [connection.execute(f'SELECT entity_key, feature_name, value, event_ts, created_ts FROM "{name}"').fetchall() for name in names]
    return sorted(row for table in found for row in table)


def test_every_value_is_feasts_own(sqlite_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a source with two rows of one instant, of which Feast takes the one that was written last."""
    stores = {name: tmp_path / name / "feast" for name in ("ours", "feasts")}
    for feast in stores.values():
        shutil.copytree(sqlite_features / "feast", feast)
        (feast / ONLINE_FILE).unlink()
        settings = feast / "feature_store.yaml"
        settings.write_text(settings.read_text().replace("online_write_batch_size: 1000", "online_write_batch_size: 7"))  # several, the last not full
        source = feast / "offline" / "user_statistics.parquet"
        whole = pq.read_table(source)
        last = whole.slice(whole.num_rows - 1)
        earlier = last.set_column(2, "created", pa.compute.subtract(last["created"], pa.scalar(10, pa.duration("us")))).set_column(
            3, "user_impressions", pa.array([99_999])
        )
        pq.write_table(pa.concat_tables([whole, earlier]).cast(whole.schema), source)
        apply(feast, 7)
    materialise(stores["ours"])
    monkeypatch.setattr(repository, "_BATCH_ENGINE", "local")
    materialise(stores["feasts"])
    found, expected = rows(stores["ours"]), rows(stores["feasts"])
    assert found == expected and len(found) > 100
