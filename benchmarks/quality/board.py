"""A board: one dataset, one split, and the models that are compared on it. Each file of boards/ is one, in the terms of params.yaml."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from benchmarks.quality.drawn import VERSION
from benchmarks.quality.sampled import NEGATIVES
from longtrail.config import Dataset, Model, SplitSettings, TrainingSettings
from longtrail.config.base import ModelName, Positive, Settings
from longtrail.config.judging import RANKING_METRICS
from longtrail.config.messages import explain
from longtrail.config.reading import read_settings
from longtrail.errors import ConfigError

BOARDS = Path(__file__).parent / "boards"
K = 10  # length of the lists that retrievers are judged by
SAMPLED = tuple(f"uni{NEGATIVES}_{name}@{K}" for name in ("ndcg", "recall"))
MEASURED = {"ranking": RANKING_METRICS, "retrieval": (f"ndcg@{K}", f"recall@{K}", "mrr", f"coverage@{K}", *SAMPLED)}  # what cell.py judges by


class LongMemory(Settings):
    """The simulated world of long_memory.py."""

    kind: Literal["long_memory"]
    users: Positive
    events: Positive  # of each user


class Board(Settings):
    """`{data}` in the dataset's paths stands for the folder of the data."""

    title: str
    about: str
    dataset: Dataset
    split: SplitSettings
    simulated: LongMemory | None = None  # made, not read from the data
    rows_are_ordered: bool = False  # the file has no times: its row numbers are taken for seconds
    drawn: Positive | None = None  # the file says what people bought, not what they were shown: so many others stand in a list with each (drawn.py)
    newest_requests: Positive | None = None  # ranking: train on this many newest requests of the training period, as a daily job would
    metrics: tuple[str, ...]  # columns of the table, the first is the one models are compared by
    baseline: str  # a model that has not beaten this one has learnt nothing
    training: TrainingSettings = TrainingSettings(threads=1)
    models: dict[ModelName, Model]
    pieces: dict[str, Positive] = Field(default_factory=dict)  # model → pieces of a step, where a whole batch needs more memory than there is
    published: dict[str, dict[str, float]] = Field(default_factory=dict)  # model → metric → the figure of its paper

    @property
    def data_key(self) -> str:
        """Digest of what decides the features that the models train on."""
        return self._digest({"dataset", "split", "simulated", "rows_are_ordered"})

    @property
    def protocol(self) -> str:
        """Digest of all that decides a cell beside its model's settings and its seed."""
        return self._digest({"dataset", "split", "simulated", "rows_are_ordered", "newest_requests", "training"})

    def is_current(self, cell: Mapping[str, Any]) -> bool:
        """Whether a recorded cell was trained as the board says now. What the code did then, only its `commit` tells."""
        model = self.models.get(cell["model"])
        return model is not None and cell.get("protocol") == self.protocol and cell["settings"] == model.model_dump(mode="json")

    def _digest(self, names: set[str]) -> str:
        values = self.model_dump(mode="json", include=names)
        if self.drawn is not None:
            values |= {"drawn": self.drawn, "drawing": VERSION}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, order=True)
class Cell:
    """One training and its judgement. Ordered so that every model has one seed before any has two."""

    seed: int
    board: str
    model: str

    @property
    def file(self) -> str:
        return f"{self.board}/{self.model}-{self.seed}.json"


def load_boards(names: list[str] | None = None) -> dict[str, Board]:
    """The boards of the given names, or all. Raises ConfigError naming the file and the key."""
    found = {path.stem: path for path in sorted(BOARDS.glob("*.yaml"))}
    unknown = [name for name in names or [] if name not in found]
    if unknown:
        raise ConfigError(f"--board {unknown[0]}: no such board; expected one of {', '.join(found)}")
    return {name: _load(found[name]) for name in names or found}


def _load(path: Path) -> Board:
    values = read_settings(path)
    values.pop("anchors", None)  # only there for YAML's merge keys
    try:
        board = Board.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in explain(error, Board))) from None
    for name in (board.baseline, *board.published, *board.pieces):
        if name not in board.models:
            raise ConfigError(f"{path}: {name!r} is not one of its models: {', '.join(board.models)}")
    known = [name for stage in sorted({model.stage for model in board.models.values()}) for name in MEASURED[stage]]
    for name in (*board.metrics, *(metric for figures in board.published.values() for metric in figures)):
        if name not in known:
            raise ConfigError(f"{path}: {name!r} is not measured; expected one of {', '.join(known)}")
    return board


def cells(boards: dict[str, Board], models: list[str] | None, seeds: int) -> Iterator[Cell]:
    """All cells in the order in which they should be run. Raises ConfigError for a name in `models` that no board has."""
    known = list(dict.fromkeys(name for board in boards.values() for name in board.models))
    if unknown := [name for name in models or [] if name not in known]:
        raise ConfigError(f"--model {unknown[0]}: no model of {', '.join(boards)}; expected one of {', '.join(known)}")
    wanted = (Cell(seed, name, model) for name, board in boards.items() for model in board.models for seed in range(seeds))
    place = {(name, model): i for name, board in boards.items() for i, model in enumerate(board.models)}
    yield from sorted((c for c in wanted if not models or c.model in models), key=lambda c: (c.seed, place[c.board, c.model], c.board))
