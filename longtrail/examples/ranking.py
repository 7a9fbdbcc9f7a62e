"""Logged impressions as requests: one history, one candidate set, one label a candidate.

B requests, L history, C candidates, R requests of a split, E rows (examples) of a split.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from longtrail.errors import HistoryError, NothingNewError
from longtrail.examples.buckets import Buckets, padding_share
from longtrail.examples.features import FeatureSet, column
from longtrail.examples.sets import NewestRows, widened
from longtrail.examples.tensors import candidate_tensors, context_tensors, history_tensors
from longtrail.models.contracts import Candidates, Context, History
from longtrail.schema import ITEM_STATISTICS, USER_STATISTICS
from longtrail.times import iso

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
    rows_BC: Tensor  # int64 [B, C], row of the example in the split, -1 in padded places and for sampled candidates
    exposures: int  # how many candidates are `exposed`, and clicks among them: counted here, for to read them of a GPU makes it wait
    clicks: int
    step_click_rate: float | None = None  # of a piece: the share of clicks among what was exposed in the whole step

    @property
    def exposed(self) -> Tensor:
        """bool [B, C]: what was logged and so has a label; not padding, and not the candidates that training sampled."""
        return self.rows_BC >= 0

    def to(self, device: torch.device | str) -> Self:
        """The batch with every tensor on `device`."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in held.items() if not isinstance(value, int | float | None)})

    def blank(self) -> Self:
        """The batch without candidates: it has no say in a loss, a gradient or a statistic."""
        lengths_B = torch.zeros_like(self.candidates.lengths_B)
        candidates = replace(self.candidates, lengths_B=lengths_B)
        return replace(self, candidates=candidates, rows_BC=torch.full_like(self.rows_BC, -1), exposures=0, clicks=0)


class RankingBatches:
    """The requests of a split in batches of at most `batch_size`, and at most `max_candidates` padded candidates.

    A request is the rows that share request_id, user and timestamp. History and user statistics belong to that instant.
    With `seed` None the order is fixed; else it is a pure function of (seed, epoch): call `set_epoch` before each epoch. `batches[i]` makes
    the i-th batch of the epoch alone, so that an epoch can be entered in its middle. `since` (UTC µs) leaves out older requests; rows are then
    counted from the first one kept. With `sampled`, up to so many unlabelled candidates join each request (longtrail/examples/sets.py). They are
    drawn for the requests that come together: the pieces of a batch (`piece`) get others than the batch would. Raises HistoryError where the split
    has no rows.
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
        sampled: int = 0,
    ) -> None:
        table = features.examples(split)
        of, error = ("", HistoryError) if since is None else (f" at or after {iso(since)}", NothingNewError)
        if since is not None:
            table = table.filter(pa.array(column(table, "timestamp") >= since))
        if table.num_rows == 0:
            raise error(f"{features.folder / 'examples' / split}.parquet: no rows{of}; expected impressions, which ranking learns from")
        self.features, self.split, self.max_history, self.seed, self.epoch, self.sampled = features, split, max_history, seed, 0, sampled
        self.starts_R1 = _request_starts(table)  # request r is the rows starts_R1[r]:starts_R1[r + 1]
        self._items_E, self._clicks_E = column(table, "item_id"), table["click"].to_numpy().astype(np.float32)
        self._statistics_E = {name: column(table, name) for name in ITEM_STATISTICS}
        self._newest = NewestRows(self._items_E)
        first_R = table.select(["user_id", "timestamp", "history_length", *USER_STATISTICS]).take(pa.array(self.starts_R1[:-1]))
        self.users_R, self.times_R, self.history_length_R = (column(first_R, name) for name in ("user_id", "timestamp", "history_length"))
        self._user_statistics_R = {name: column(first_R, name) for name in USER_STATISTICS}
        self._widths_R = np.diff(self.starts_R1)
        self._buckets = Buckets.make(
            np.minimum(self.history_length_R, max_history), self._widths_R + sampled, batch_size=batch_size, max_cells=max_candidates
        )
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

    def piece(self, index: int, piece: int, pieces: int) -> RankingBatch:
        """Every `pieces`-th request of the index-th batch, from the `piece`-th on; blank where there is none."""
        requests_B = self._plan[index]
        if pieces == 1:
            return self.make(requests_B)
        own_B = requests_B[piece::pieces]
        if len(own_B) == 0:
            return self.make(requests_B[:1]).blank()
        return replace(self.make(own_B), step_click_rate=self._click_rate(requests_B))

    def _click_rate(self, requests_B: Ints) -> float:
        return float(self._clicks[requests_B].sum() / self._widths_R[requests_B].sum())

    @cached_property
    def _clicks(self) -> Ints:
        """[R], of each request."""
        return np.add.reduceat((self._clicks_E > 0).astype(np.int64), self.starts_R1[:-1])

    def make(self, requests_B: Ints) -> RankingBatch:
        """The batch of the given requests (indices into the split), in that order."""
        starts_B, widths_B = self.starts_R1[requests_B], self._widths_R[requests_B]
        prior, catalogue = self.features.prior_click_rate, self.features.catalogue
        users_B, times_B, lengths_B = self.users_R[requests_B], self.times_R[requests_B], self.history_length_R[requests_B]
        history = self.features.history.gather(users_B, lengths_B, self.max_history)
        rows_BC = starts_B[:, None] + np.arange(widths_B.max())
        rows_BC = np.where(rows_BC < (starts_B + widths_B)[:, None], rows_BC, -1)
        exposed_BC = rows_BC >= 0
        if self.sampled:
            rng = np.random.default_rng([self.seed or 0, self.epoch, int(requests_B[0])])
            whole = self.features.history.flat(users_B, lengths_B)  # of this batch alone; max_history is what the model reads, not what was seen
            rows_BC, exposed_BC = widened(rows_BC, starts_B, self._items_E, whole, self.sampled, rng)
        real_BC = rows_BC >= 0
        statistics_BC = self._statistics(rows_BC, real_BC & ~exposed_BC, starts_B)
        clicks_BC = np.where(exposed_BC, self._clicks_E[rows_BC], np.float32(0))
        return RankingBatch(
            history=history_tensors(history, catalogue),
            candidates=candidate_tensors(
                np.where(real_BC, self._items_E[rows_BC], 0),
                real_BC.sum(1),
                statistics_BC,
                catalogue,
                prior,
            ),
            context=context_tensors(lengths_B, {name: v[requests_B] for name, v in self._user_statistics_R.items()}, times_B, prior),
            clicks_BC=torch.from_numpy(clicks_BC),
            users_B=torch.from_numpy(users_B),
            times_B=torch.from_numpy(times_B),
            requests_B=torch.from_numpy(np.ascontiguousarray(requests_B)),
            rows_BC=torch.from_numpy(np.where(exposed_BC, rows_BC, -1)),
            exposures=int(exposed_BC.sum()),
            clicks=int((clicks_BC > 0).sum()),
        )

    def _statistics(self, rows_BC: Ints, drawn_BC: NDArray[np.bool_], starts_B: Ints) -> dict[str, Ints]:
        """Item statistics [B, C], 0 on padding; of drawn candidates those at the item's newest row before the request, and that row."""
        statistics_BC = {name: np.where(rows_BC >= 0, values_E[rows_BC], 0) for name, values_E in self._statistics_E.items()}
        if drawn_BC.any():
            newest_BC = self._newest.before(self._items_E[rows_BC], np.broadcast_to(starts_B[:, None], rows_BC.shape))
            since = {"item_events": 0, "item_impressions": 1, "item_clicks": self._clicks_E[newest_BC].astype(np.int64)}
            for name, values_E in self._statistics_E.items():
                statistics_BC[name] = np.where(drawn_BC, values_E[newest_BC] + since[name], statistics_BC[name])
        return statistics_BC


def _request_starts(table: pa.Table) -> Ints:
    """int64 [R + 1]: where each request's rows start, and the number of rows. Rows are sorted by timestamp, request_id, position."""
    changed = np.zeros(table.num_rows - 1, dtype=bool)
    for name in ("request_id", "user_id", "timestamp"):
        column = table[name]
        changed |= pc.not_equal(column[1:], column[:-1]).to_numpy()
    return np.concatenate(([0], np.flatnonzero(changed) + 1, [table.num_rows]))
