"""Which examples share a batch: like lengths together, to waste little padding; in an order that is a pure function of (seed, epoch)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """n examples, sorted by width and length, and cut into buckets. An epoch shuffles within buckets, cuts batches, and shuffles those.

    The number of batches is the same in every epoch, so that a resumed run counts steps as the uninterrupted one does.
    """

    sorted_n: Ints  # example indices
    edges: tuple[int, ...]  # bucket k is sorted_n[edges[k]:edges[k + 1]]
    sizes: tuple[int, ...]  # examples in a batch of bucket k

    @classmethod
    def make(cls, lengths_n: Ints, widths_n: Ints | None = None, *, batch_size: int, max_cells: int | None = None) -> "Buckets":
        """`lengths_n`: history length as it will be padded; `widths_n`: candidates. A batch has at most `batch_size` examples, and at most
        `max_cells` padded candidates unless one example alone has more.

        Our choice: widths are first rounded up to a power of two, and a bucket holds about sqrt(number of batches) batches, 4 to 64: enough
        to mix well, few enough that lengths in a bucket are alike. Raises ValueError for a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        n = len(lengths_n)
        widths = np.ones(n, dtype=np.int64) if widths_n is None else np.asarray(widths_n)
        classes = np.ceil(np.log2(np.maximum(widths, 1))).astype(np.int64)
        order = np.lexsort((widths, lengths_n, classes))
        span = batch_size * int(np.clip(round(np.sqrt(n / batch_size)), 4, 64))
        edges, sizes = [0], []
        borders = [0, *(np.flatnonzero(np.diff(classes[order])) + 1).tolist(), n]
        for low, high in pairwise(borders):  # over the few classes of width
            for start in range(low, high, span):
                stop = min(start + span, high)
                widest = max(int(widths[order[start:stop]].max()), 1)
                edges.append(stop)
                sizes.append(batch_size if max_cells is None else max(1, min(batch_size, max_cells // widest)))
        return cls(sorted_n=order, edges=tuple(edges), sizes=tuple(sizes))

    def __len__(self) -> int:
        """Batches an epoch."""
        return sum(-(-(high - low) // size) for low, high, size in self._spans())

    def batches(self, *, seed: int | None, epoch: int) -> list[Ints]:
        """The example indices of each batch of `epoch`; with `seed` None in sorted order, the same in every epoch."""
        rng = None if seed is None else np.random.default_rng([seed, epoch])
        cut: list[Ints] = []
        for low, high, size in self._spans():
            members = self.sorted_n[low:high] if rng is None else rng.permutation(self.sorted_n[low:high])
            cut.extend(members[start : start + size] for start in range(0, len(members), size))
        return cut if rng is None else [cut[place] for place in rng.permutation(len(cut))]

    def _spans(self) -> Sequence[tuple[int, int, int]]:
        return list(zip(self.edges[:-1], self.edges[1:], self.sizes, strict=True))


def padding_share(lengths_n: Ints, batches: Sequence[Ints]) -> float:
    """Share of padded cells among all cells when each batch is padded to its longest (at least 1)."""
    if not batches:
        return 0.0
    members = np.concatenate(batches)
    sizes = np.array([len(batch) for batch in batches])
    longest = np.maximum(np.maximum.reduceat(lengths_n[members], np.cumsum(sizes) - sizes), 1)
    cells = int((sizes * longest).sum())
    return 1 - int(lengths_n[members].sum()) / cells
