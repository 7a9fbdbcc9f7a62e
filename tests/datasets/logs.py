"""What the tests of readers and ingest share: writing a small log, ingesting it, reading the tables back."""

import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from longtrail.config import Dataset, IngestSettings
from longtrail.ingest import ingest

SHARED = Path(__file__).parents[3] / "shared" / "data"
EVENTS = "user,item,ts,what,strength\nann,1,1000000000,view,1.5\nbob,2,1000000060,buy,\nann,2,1000000060,view,2\n"
COLUMNS = {"user": "user", "item": "item", "timestamp": "ts", "action": "what", "value": "strength"}
SHOWN = "user,item,ts,request,place,click,p,arm\nann,1,1000000000,r1,1,0,0.5,a\nann,2,1000000000,r1,2,1,0.25,a\nbob,1,1000000060,r2,1,0,1,b\n"
SHOWN_COLUMNS = {
    "user": "user",
    "item": "item",
    "timestamp": "ts",
    "request": "request",
    "position": "place",
    "click": "click",
    "propensity": "p",
    "policy": "arm",
}


def shared(name: str) -> Path:
    """A real file, or a skip that says which one is absent."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"no real data: {path} is absent")
    return path


def run(tmp_path: Path, dataset: dict[str, Any], *, out: str = "tables", **settings: Any) -> dict[str, Any]:
    """Ingest into tmp_path/out; the counts."""
    values = {"memory_limit": "500MB", "max_quarantined_share": 0.9, **settings}
    return ingest(TypeAdapter(Dataset).validate_python(dataset), IngestSettings(**values), tmp_path / out, cache=tmp_path / "cache")


def run_csv(
    tmp_path: Path, text: str | bytes, columns: dict[str, str] = COLUMNS, *, settings: dict[str, Any] | None = None, **dataset: Any
) -> dict[str, Any]:
    """Ingest `text` as log.csv."""
    source = tmp_path / "log.csv"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    return run(tmp_path, {"kind": "event_log", "source": str(source), "columns": columns, **dataset}, **(settings or {}))


def table(tmp_path: Path, name: str, out: str = "tables") -> pd.DataFrame:
    return pq.read_table(tmp_path / out / f"{name}.parquet").to_pandas()


def quarantine(tmp_path: Path) -> list[tuple[Any, ...]]:
    """(row, field, reason) of each rejected row."""
    return [tuple(row) for row in table(tmp_path, "quarantine")[["row", "field", "reason"]].itertuples(index=False)]


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path
