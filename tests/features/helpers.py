"""How the tests run the step, and literal tables to run it on."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from components.build_features import build_features
from longtrail.files import write_json
from longtrail.schema import IMPRESSIONS, INTERACTIONS, Table

ONLINE_LENGTH = 7  # fewer than a toy user has, so that trimming is seen
PARAMS = Path(__file__).parents[2] / "params.yaml"


def write_params(path: Path, *, split: dict[str, Any] | None = None, ingest: dict[str, Any] | None = None, **features: Any) -> Path:
    """The project's params.yaml with other settings in `features`, `split` and `ingest`."""
    values = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    values["features"] |= features
    values["split"] |= split or {}
    values["ingest"] |= ingest or {}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def build(tables: Path, folder: Path, *, split: dict[str, Any] | None = None, ingest: dict[str, Any] | None = None, **features: Any) -> Path:
    """Run the step as it stands; returns the features folder."""
    write_json(folder / "validation" / "result.json", {"success": True, "expectations": []})
    build_features(tables, folder / "validation", write_params(folder / "params.yaml", split=split, ingest=ingest, **features), folder / "features")
    return folder / "features"


def write_events(folder: Path, events: list[tuple[int, int, int, int]]) -> None:
    """interactions.parquet of (user, item, timestamp µs, available_at µs)."""
    rows = [{"user_id": u, "item_id": i, "timestamp": t, "available_at": a, "action": "view", "value": None} for u, i, t, a in events]
    _write(folder, INTERACTIONS, rows)


def write_impressions(folder: Path, impressions: list[tuple[int, int, int, int, int]]) -> None:
    """impressions.parquet of (user, item, timestamp µs, available_at µs, click), each its own request."""
    rows = [
        {"request_id": f"r{n}", "user_id": u, "item_id": i, "timestamp": t, "available_at": a, "position": 1, "click": c, "policy": "p"}
        for n, (u, i, t, a, c) in enumerate(impressions)
    ]
    _write(folder, IMPRESSIONS, rows)


def _write(folder: Path, table: Table, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    columns = [pa.array([row.get(field.name) for row in rows], type=field.type) for field in table.arrow()]
    pq.write_table(pa.table(columns, schema=table.arrow()), folder / f"{table.name}.parquet")
