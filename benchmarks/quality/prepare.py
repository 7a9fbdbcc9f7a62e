"""From a board's dataset to the features folder that its models train on, by the pipeline's own steps. Made once."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from filelock import FileLock

from benchmarks.quality.board import Board
from benchmarks.quality.drawn import write_drawn
from benchmarks.quality.long_memory import write_long_memory
from components.build_features import build_features
from components.ingest import ingest
from components.validate import validate
from longtrail.errors import DatasetError
from longtrail.files import atomic_file, hash_path

log = logging.getLogger("quality")


def prepare(name: str, board: Board, *, data: Path, work: Path) -> Path:
    """The features folder of `board`. Raises DatasetError naming a data file that is not there."""
    folder = work / "data" / f"{name}-{board.data_key}"
    features = folder / "features"
    with FileLock(work / f"{name}.lock"):
        if (features / "features.json").exists():
            return features
        folder.mkdir(parents=True, exist_ok=True)
        if board.simulated is not None:
            data = folder / "made"
            write_long_memory(data, users=board.simulated.users, events=board.simulated.events)
        params = folder / "params.yaml"
        params.write_text(yaml.safe_dump(_params(board, data=data, folder=folder)), encoding="utf-8")
        ingest(params, folder / "tables")
        validate(folder / "tables", params, folder / "validation")
        build_features(folder / "tables", folder / "validation", params, features)
    return features


def features_digest(features: Path) -> str:
    """12 hex digits of what models read of the features folder, the same wherever and whenever it is made alike. A cell keeps it."""
    digest = hashlib.sha256()
    files = [*features.glob("history/*/*.npy"), *features.glob("examples/*"), *features.glob("targets/*"), features / "catalogue.parquet"]
    for line in sorted(f"{file.name} {hash_path(file)}" for file in files):  # without the folder: a segment of histories is called at random
        digest.update(line.encode())
    return digest.hexdigest()[:12]


def _params(board: Board, *, data: Path, folder: Path) -> dict[str, object]:
    dataset = board.dataset.model_dump(mode="json", exclude_unset=True)
    dataset = {key: value.replace("{data}", str(data)) if isinstance(value, str) else value for key, value in dataset.items()}
    if "{data}" in str(board.dataset.model_dump().get("source")) and not Path(str(dataset["source"])).exists():
        raise DatasetError(f"{dataset['source']}: no such file; expected it in the folder that --data names")
    if board.drawn is not None:
        write_drawn(Path(str(dataset["source"])), folder / "drawn.parquet", drawn=board.drawn)
        dataset["source"] = str(folder / "drawn.parquet")
    elif board.rows_are_ordered:
        dataset["source"] = str(_with_times(Path(str(dataset["source"])), folder / "ordered.parquet"))
    # A log of the past is taken as it is: these bounds are for logs that come every day.
    bounds = {"max_new_item_share": 1.0, "max_duplicate_share": 1.0, "max_top_item_share": 1.0}
    split = board.split.model_dump(mode="json")
    return {"dataset": dataset, "split": split, "validation": {**bounds, "click_rate": [0.0, 1.0]}, "ingest": {"max_quarantined_share": 0.2}}


def _with_times(source: Path, out: Path) -> Path:
    table = pq.read_table(source)
    with atomic_file(out) as aside:
        pq.write_table(table.append_column("ts", pa.array(np.arange(len(table)) + 1_000_000_000)), aside)
    return out
