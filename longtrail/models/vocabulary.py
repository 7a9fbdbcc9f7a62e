"""What the ids of a model's tables mean, kept beside its weights: ids are given anew whenever a log is read, and an event that comes late moves them.

N items and C categories. Our choice, not the papers'.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from longtrail.errors import ModelError

FILE = "vocabulary.parquet"
_COLUMNS = ["item_key", "category_id", "category"]  # of schema.CATALOGUE, a row an item in the order of ids

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Raw keys in the order of their ids, from id 1 on."""

    items: pa.Array  # string [N]
    categories: pa.Array  # string [C]

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """Of a catalogue or a vocabulary. Raises ModelError where a column is missing or the file is damaged."""
        try:
            table = pq.read_table(path, columns=_COLUMNS)
        except (OSError, pa.ArrowInvalid) as error:
            raise ModelError(f"{path}: not a table of items: {error}") from None
        if table.column_names != _COLUMNS:
            raise ModelError(f"{path}: columns {', '.join(table.column_names)}; expected {', '.join(_COLUMNS)}")
        named = table.filter(pc.greater(table["category_id"], 0)).group_by("category_id").aggregate([("category", "min")]).sort_by("category_id")
        return cls(items=table["item_key"].combine_chunks(), categories=named["category_min"].combine_chunks())

    def places_in(self, later: "Vocabulary") -> tuple[Ints, Ints]:
        """Where items [N + 1] and categories [C + 1] stand in `later`: 0 for padding, -1 for what is no longer there."""
        return _places(self.items, later.items), _places(self.categories, later.categories)


def write_vocabulary(catalogue: Path, folder: Path) -> None:
    """The vocabulary of a features folder's catalogue, into a model's folder; equal catalogues are equal bytes."""
    pq.write_table(pq.read_table(catalogue, columns=_COLUMNS), folder / FILE, compression="zstd")


def moved_ids(model: Path, catalogue: Path) -> int:
    """How many ids of a model's folder mean another item or category in a catalogue, or none; 0 for a model from before it had a vocabulary."""
    if not (model / FILE).exists():
        return 0
    places = Vocabulary.read(model / FILE).places_in(Vocabulary.read(catalogue))
    return sum(int((place != np.arange(len(place))).sum()) for place in places)


def _places(before: pa.Array, after: pa.Array) -> Ints:
    found = pc.fill_null(pc.index_in(before, value_set=after), -2)
    return np.concatenate([[0], found.to_numpy(zero_copy_only=False).astype(np.int64) + 1])
