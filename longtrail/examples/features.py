"""The folder that build_features writes, opened."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from longtrail.catalogue import Catalogue
from longtrail.errors import HistoryError
from longtrail.files import read_json
from longtrail.history import HistoryStore
from longtrail.models.contracts import Sizes
from longtrail.schema import EXAMPLES, TARGETS, Table
from longtrail.splits import SPLITS


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Histories, catalogue and sizes of one features folder; its examples and targets are read when asked for."""

    folder: Path
    history: HistoryStore
    catalogue: Catalogue
    sizes: Sizes
    users: int
    actions: tuple[str, ...]  # action id = index + 1
    prior_click_rate: float
    train_lengths: NDArray[np.int64]  # [U + 1], events of each user in the training period
    meta: dict[str, Any]  # features.json

    @classmethod
    def open(cls, folder: Path) -> "FeatureSet":
        """Raises HistoryError where a part is missing, damaged, or does not fit the others."""
        folder = Path(folder)
        try:
            meta = read_json(folder / "features.json")
            train_lengths = np.load(folder / "train_lengths.npy", allow_pickle=False)
        except FileNotFoundError as error:
            raise HistoryError(f"{error.filename}: no such file; expected a features folder, as build_features writes it") from None
        except ValueError as error:
            raise HistoryError(f"{folder}: damaged: {error}") from None
        features = cls(
            folder=folder,
            history=HistoryStore.open(folder / "history"),
            catalogue=Catalogue.open(folder / "catalogue.parquet"),
            sizes=Sizes(**meta["sizes"]),
            users=meta["users"],
            actions=tuple(meta["actions"]),
            prior_click_rate=meta["prior_click_rate"],
            train_lengths=train_lengths,
            meta=meta,
        )
        features._check()
        return features

    def examples(self, split: str) -> pa.Table:
        """The impressions of `split` (train, valid, test) as pointers: schema.EXAMPLES, sorted by timestamp, request_id, position."""
        return self._read("examples", split, SPLITS, EXAMPLES)

    def targets(self, split: str) -> pa.Table:
        """The next items of `split` (valid, test) as pointers: schema.TARGETS, sorted by user_id, timestamp."""
        return self._read("targets", split, SPLITS[1:], TARGETS)

    def _read(self, kind: str, split: str, splits: tuple[str, ...], table: Table) -> pa.Table:
        if split not in splits:
            raise HistoryError(f"{kind}: there is no split {split!r}; expected one of {', '.join(splits)}")
        path = self.folder / kind / f"{split}.parquet"
        try:
            read = pq.read_table(path)
        except FileNotFoundError:
            raise HistoryError(f"{path}: no such file; run build_features") from None
        missing = [name for name in table.names if name not in read.column_names]
        if missing:
            raise HistoryError(f"{path}: no column {missing[0]}; expected {', '.join(table.names)}")
        return read.select(table.names)

    def _check(self) -> None:
        expectations = (
            ("catalogue.parquet: items", self.catalogue.items, self.sizes.items),
            ("history: users", self.history.users, self.users),
            ("history: actions", self.history.actions, self.actions),
            ("train_lengths.npy: shape", self.train_lengths.shape, (self.users + 1,)),
        )
        for what, found, expected in expectations:
            if found != expected:
                raise HistoryError(f"{self.folder}: {what}: {found}; features.json expects {expected}")


def column(table: pa.Table, name: str) -> NDArray[np.int64]:
    """int64 [rows]; a time as UTC µs."""
    values = table[name]
    if pa.types.is_timestamp(values.type):
        values = values.cast(pa.timestamp("us", tz="UTC"))
    return values.cast(pa.int64()).to_numpy()
