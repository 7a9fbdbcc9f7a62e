"""One table of readers by `dataset.kind`: a new source is one file and one line here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from longtrail.config import Dataset, WorldDataset
from longtrail.datasets.event_log import read_event_log
from longtrail.datasets.movielens import read_movielens
from longtrail.datasets.open_bandit import read_open_bandit
from longtrail.datasets.raw import RawEvents, RawLog, Rules
from longtrail.datasets.reading import CsvFormat, load, load_text
from longtrail.engines import Engine
from longtrail.schema import Propensity

_IMPRESSIONS = ("user", "item", "timestamp", "category", "click", "request", "position", "propensity", "policy")
_CANDIDATES: dict[str, str | None] = {"request": "request", "item": "item"}
_INTERACTIONS = ("user", "item", "timestamp", "category", "action")


def read_world(engine: Engine, dataset: WorldDataset, folder: Path, cache: Path) -> RawLog:
    """Simulate the world into `folder` and read its log like any other."""
    from longtrail.datasets.world import write_log

    files = write_log(dataset, folder / "world")
    events = []
    for key, columns, click_from in (("impressions", _IMPRESSIONS, "column"), ("interactions", _INTERACTIONS, "nothing")):
        names = {name: name for name in columns}
        rows = load(engine, key, [files[key]], names, csv_format=CsvFormat(), unit="us", label=f"world/{key}")
        rules = Rules(timestamp_unit="us", click_from=click_from, action="click" if click_from == "column" else "event")  # type: ignore[arg-type]
        events.append(RawEvents(rows=rows, names=names, rules=rules, key=key))
    candidates = load_text(engine, "candidates", [files["candidates"]], _CANDIDATES, csv_format=CsvFormat(), label="world/candidates")
    return RawLog(events=tuple(events), files=tuple(files.values()), candidates=candidates, propensity=Propensity.CONDITIONAL)


_READERS: dict[str, Callable[[Engine, Any, Path, Path], RawLog]] = {
    "movielens": read_movielens,
    "open_bandit": read_open_bandit,
    "event_log": read_event_log,
    "world": read_world,
}


def read_dataset(engine: Engine, dataset: Dataset, folder: Path, cache: Path) -> RawLog:
    """The raw log of a dataset. `folder` takes temporary files, `cache` downloads. Raises DatasetError naming the file."""
    return _READERS[dataset.kind](engine, dataset, folder, cache)
