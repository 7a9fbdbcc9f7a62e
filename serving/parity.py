"""Requests with the scores they had offline: packaging writes them into the Bento, and a service that cannot repeat them does not become ready.

`python -m serving.parity ARTIFACTS` scores them with the code it stands beside and prints the largest difference; exit code 1 beyond TOLERANCE.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longtrail.errors import LongtrailError, ModelError
from longtrail.history import HistoryArrays
from longtrail.schema import ITEM_STATISTICS, USER_STATISTICS
from serving.scoring import Scorer

TOLERANCE = 1e-5  # times the largest score of the request, where that is over 1
ELSEWHERE = 1e-4  # on another machine, whose CPU adds up in another order; a wrong weight or feature is far beyond it
FILE = "parity.parquet"

_INTS = pa.list_(pa.int64())
_FLOATS = pa.list_(pa.float64())
SCHEMA = pa.schema(
    [
        ("request_id", pa.string()),
        ("time", pa.int64()),  # UTC microseconds
        ("history_items", _INTS),  # oldest first, the newest events of the prefix the request may know
        ("history_actions", _INTS),
        ("history_times", _INTS),
        ("history_length", pa.int64()),  # of the whole prefix
        *((name, pa.int64()) for name in USER_STATISTICS),
        ("candidates", _INTS),  # dense ids
        *((name, _INTS) for name in ITEM_STATISTICS),
        ("logits", _FLOATS),  # offline
        ("retrieved", _FLOATS),  # offline: inner products of the best items, history excluded, best first
    ]
)


def check_parity(scorer: Scorer, path: Path, tolerance: float = TOLERANCE) -> float:
    """The largest difference between the offline scores in `path` and the scorer's.

    Raises ModelError naming the request and both scores where it exceeds `tolerance`, or where the file holds no request.
    """
    try:
        rows = pq.read_table(path, schema=SCHEMA).to_pylist()
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise ModelError(f"{path}: not a file of requests with their offline scores: {error}") from None
    if not rows:
        raise ModelError(f"{path}: no request; expected some to check the scores on")
    return max(_check(scorer, row, path, tolerance) for row in rows)


def _check(scorer: Scorer, row: dict[str, Any], path: Path, tolerance: float) -> float:
    length = len(row["history_items"])
    items, actions, times = (np.asarray([row[name] or [0]], np.int64) for name in ("history_items", "history_actions", "history_times"))
    history = HistoryArrays(items_BL=items, actions_BL=actions, times_BL=times, lengths_B=np.array([length]))
    logits = scorer.logits(
        history,
        np.array([row["history_length"]]),
        {name: np.array([row[name]]) for name in USER_STATISTICS},
        np.asarray([row["candidates"]], np.int64),
        {name: np.asarray([row[name]], np.int64) for name in ITEM_STATISTICS},
        np.array([row["time"]]),
    )[0]
    retrieved = scorer.retrieve(history, len(row["retrieved"]), np.asarray(row["history_items"], np.int64))[1]
    where = f"{path}: request {row['request_id']}"
    return max(
        _difference(logits, row["logits"], tolerance, f"{where}: logits"),
        _difference(retrieved, row["retrieved"], tolerance, f"{where}: retrieval"),
    )


def _difference(found: Any, expected: list[float], tolerance: float, where: str) -> float:
    if len(found) != len(expected):
        raise ModelError(f"{where}: {len(found)} scores; expected {len(expected)}")
    differences = np.abs(np.asarray(found, np.float64) - np.asarray(expected)) / max([1.0, *map(abs, expected)])
    largest = float(differences.max(initial=0.0))
    if not largest <= tolerance:  # also catches NaN
        place = int(np.argmax(np.where(np.isnan(differences), np.inf, differences)))
        raise ModelError(f"{where}: place {place + 1}: {found[place]!r}; offline it was {expected[place]!r}, and may differ by {tolerance}")
    return largest


def main(folder: str) -> None:
    from serving.arms import make_scorer
    from serving.artifacts import Artifacts

    artifacts = Artifacts.open(Path(folder))
    files = artifacts.parity_files()
    print(max(check_parity(make_scorer(artifacts, artifacts.rankers[name]), path) for name, path in files.items()))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except LongtrailError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
