"""The items as models and the service know them: arrays indexed by dense item id. Row 0 is padding: empty text, zero counts, time 0."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from longtrail.errors import HistoryError
from longtrail.schema import CATALOGUE

Ints = NDArray[np.int64]

_COUNTS = ("train_events", "train_impressions", "train_clicks", "item_events", "item_impressions", "item_clicks")


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """N items; every array is [N + 1]. `categories` holds dense category ids, 0 unknown; `first_seen` is UTC µs."""

    keys: tuple[str, ...]
    titles: tuple[str | None, ...]
    categories: Ints
    first_seen: Ints
    train_events: Ints
    train_impressions: Ints
    train_clicks: Ints
    item_events: Ints
    item_impressions: Ints
    item_clicks: Ints
    _ids: dict[str, int] = field(repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> "Catalogue":
        """Read catalogue.parquet. Raises HistoryError where it is missing, lacks a column, or its ids are not 1..N in order."""
        try:
            table = pq.read_table(path)
        except FileNotFoundError:
            raise HistoryError(f"{path}: no such file; expected the catalogue table") from None
        except pa.ArrowInvalid as error:
            raise HistoryError(f"{path}: not a catalogue table: {error}") from None
        for name in CATALOGUE.names:
            if name not in table.column_names:
                raise HistoryError(f"{path}: no column {name}; expected {', '.join(CATALOGUE.names)}")
        ids = table["item_id"].to_numpy()
        wrong = np.flatnonzero(ids != np.arange(1, len(ids) + 1))
        if len(wrong):
            raise HistoryError(f"{path}: row {wrong[0] + 1}: item_id is {ids[wrong[0]]}; expected {wrong[0] + 1}: every item once, sorted by id")
        keys = ("", *table["item_key"].to_pylist())
        return cls(
            keys=keys,
            titles=(None, *table["title"].to_pylist()),
            categories=_column(table, "category_id"),
            first_seen=_column(table, "first_seen"),
            **{name: _column(table, name) for name in _COUNTS},
            _ids={key: item for item, key in enumerate(keys) if item},
        )

    @property
    def items(self) -> int:
        """N."""
        return len(self.keys) - 1

    def id_of(self, key: str) -> int | None:
        """The dense id of a raw key, None where the catalogue has no such item."""
        return self._ids.get(key)


def _column(table: pa.Table, name: str) -> Ints:
    column = table[name]
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", tz="UTC"))
    return np.concatenate(([0], column.cast(pa.int64()).to_numpy()))
