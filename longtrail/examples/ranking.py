"""Logged impressions as requests: one history, one candidate set, one label a candidate.

B requests, L history, C candidates, R requests of a split, E rows (examples) of a split.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from longtrail.errors import HistoryError
from longtrail.examples.buckets import Buckets, padding_share
from longtrail.examples.features import FeatureSet, column
from longtrail.examples.tensors import candidate_tensors, context_tensors, history_tensors
from longtrail.models.contracts import Candidates, Context, History
from longtrail.schema import ITEM_STATISTICS, USER_STATISTICS

Ints = NDArray[np.int64]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RankingBatch:
    """A batch of requests, with the label of each candidate and where both stand in the split's table."""

    history: History
    candidates: Candidates
    context: Context
    clicks_BC: Tensor  # float32 [B, C], 0 in padded places
    users_B: Tensor  # int64 [B]
    times_B: Tensor  # int64 [B], UTC µs
    requests_B: Tensor  # int64 [B], index of the request in the split
    rows_BC: Tensor  # int64 [B, C], row of the example in the split, -1 in padded places

    def to(self, device: torch.device | str) -> Self:
        """The batch with every tensor on `device`."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class RankingBatches:
    """The requests of a split in batches of at most `batch_size`, and at most `max_candidates` padded candidates.

    A request is the rows that share request_id, user and timestamp. History and user statistics belong to that instant.
    With `seed` None the order is fixed; else it is a pure function of (seed, epoch): call `set_epoch` before each epoch. `batches[i]` makes
    the i-th batch of the epoch alone, so that an epoch can be entered in its middle. `since` (UTC µs) leaves out older requests; rows are then
    counted from the first one kept. Raises HistoryError where the split has no rows.
    """

    def __init__(
        self,
        features: FeatureSet,
        split: str,
        *,
        max_history: int,
        batch_size: int,
        seed: int | None = None,
        max_candidates: int = 16_384,
        since: int | None = None,
    ) -> None:
        table = features.examples(split)
        of = "" if since is None else f" at or after {since} µs"
        if since is not None:
            table = table.filter(pa.array(column(table, "timestamp") >= since))
        if table.num_rows == 0:
            raise HistoryError(f"{features.folder / 'examples' / split}.parquet: no rows{of}; expected impressions, which ranking learns from")
        self.features, self.split, self.max_history, self.seed, self.epoch = features, split, max_history, seed, 0
        self.starts_R1 = _request_starts(table)  # request r is the rows starts_R1[r]:starts_R1[r + 1]
        self._items_E, self._clicks_E = column(table, "item_id"), table["click"].to_numpy().astype(np.float32)
        self._statistics_E = {name: column(table, name) for name in ITEM_STATISTICS}
        first_R = table.select(["user_id", "timestamp", "history_length", *USER_STATISTICS]).take(pa.array(self.starts_R1[:-1]))
        self.users_R, self.times_R, self.history_length_R = (column(first_R, name) for name in ("user_id", "timestamp", "history_length"))
        self._user_statistics_R = {name: column(first_R, name) for name in USER_STATISTICS}
        self._widths_R = np.diff(self.starts_R1)
        self._buckets = Buckets.make(np.minimum(self.history_length_R, max_history), self._widths_R, batch_size=batch_size, max_cells=max_candidates)
        self._plan = self._buckets.batches(seed=seed, epoch=0)
        padding = self.padding()
        _log.info(
            "%s: %d requests, %d rows, %d batches; padding %.1f%% of histories, %.1f%% of candidates",
            split, self.requests, self.rows, len(self), 100 * padding["history"], 100 * padding["candidates"],
        )  # fmt: skip

    @property
    def requests(self) -> int:
        """R."""
        return len(self.users_R)

    @property
    def rows(self) -> int:
        """E."""
        return len(self._items_E)

    def padding(self) -> dict[str, float]:
        """Share of padded cells of this epoch: {"history", "candidates"}."""
        lengths_R = np.minimum(self.history_length_R, self.max_history)
        return {"history": padding_share(lengths_R, self._plan), "candidates": padding_share(self._widths_R, self._plan)}

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self._plan = epoch, self._buckets.batches(seed=self.seed, epoch=epoch)

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[RankingBatch]:
        for requests_B in self._plan:
            yield self.make(requests_B)

    def __getitem__(self, index: int) -> RankingBatch:
        return self.make(self._plan[index])

    def make(self, requests_B: Ints) -> RankingBatch:
        """The batch of the given requests (indices into the split), in that order."""
        widths_B = self._widths_R[requests_B]
        real_BC = np.arange(widths_B.max()) < widths_B[:, None]
        rows_BC = np.where(real_BC, self.starts_R1[requests_B][:, None] + np.arange(real_BC.shape[1]), 0)
        prior, catalogue = self.features.prior_click_rate, self.features.catalogue
        users_B, times_B, lengths_B = self.users_R[requests_B], self.times_R[requests_B], self.history_length_R[requests_B]
        return RankingBatch(
            history=history_tensors(self.features.history.gather(users_B, lengths_B, self.max_history), catalogue),
            candidates=candidate_tensors(
                np.where(real_BC, self._items_E[rows_BC], 0),
                widths_B,
                {name: np.where(real_BC, values_E[rows_BC], 0) for name, values_E in self._statistics_E.items()},
                catalogue,
                prior,
            ),
            context=context_tensors(lengths_B, {name: v[requests_B] for name, v in self._user_statistics_R.items()}, times_B, prior),
            clicks_BC=torch.from_numpy(np.where(real_BC, self._clicks_E[rows_BC], np.float32(0))),
            users_B=torch.from_numpy(users_B),
            times_B=torch.from_numpy(times_B),
            requests_B=torch.from_numpy(np.ascontiguousarray(requests_B)),
            rows_BC=torch.from_numpy(np.where(real_BC, rows_BC, -1)),
        )


def _request_starts(table: pa.Table) -> Ints:
    """int64 [R + 1]: where each request's rows start, and the number of rows. Rows are sorted by timestamp, request_id, position."""
    changed = np.zeros(table.num_rows - 1, dtype=bool)
    for name in ("request_id", "user_id", "timestamp"):
        column = table[name]
        changed |= pc.not_equal(column[1:], column[:-1]).to_numpy()
    return np.concatenate(([0], np.flatnonzero(changed) + 1, [table.num_rows]))
