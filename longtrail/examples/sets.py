"""Candidate sets as wide as serving's, for logs whose requests hold one item or a few. B requests, C candidates, K draws, L history, E rows, N items.

A ranker that looks at the set must be trained on sets. Where the log has none, each request is joined by what *others* were shown just before it:
rows of the same table, with the statistics they had there. They have no label for this user. Our choice, and why:

- Exposures come from the policy in service, so drawn items are as popular as logged ones. Uniform items would be told from them by popularity alone.
- A drawn item's statistics are those of its newest row before the request, and that row counted: without the delay, drawn items were told from logged
  ones by their smaller counts (AUC .73 in the test's log). Interactions since that row are missing; a cold item is never drawn.
- Rows before the request, never after: an item that did not exist yet, or a count from the future, cannot come in.
- Never an item of the user's whole history, nor one twice: serving leaves out what was seen. Where a log's requests repeat seen items, do not draw.
- Not the user's neighbouring requests put together: each has a history that holds the answers to the ones before.
"""

import numpy as np
from numpy.typing import NDArray

from longtrail.history import FlatHistories

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

WINDOW = 4_096  # rows just before a request that its draws come from: our choice, many users' sessions, little time
_SPARE = 2  # draws for each one wanted, since repeated and seen items fall away


class NewestRows:
    """Finds an item's newest row before a given row: O(log E) each."""

    def __init__(self, items_E: Ints) -> None:
        self.order_E = np.argsort(items_E, kind="stable")
        self.base = len(items_E) + 1
        self.keys_E = items_E[self.order_E] * self.base + self.order_E

    def before(self, items: Ints, rows: Ints) -> Ints:
        """Same shape as `items`; each must have a row before its `rows`."""
        return self.order_E[np.searchsorted(self.keys_E, items * self.base + rows) - 1]


def widened(rows_BC: Ints, starts_B: Ints, items_E: Ints, histories: FlatHistories, sampled: int, rng: np.random.Generator) -> tuple[Ints, Bools]:
    """Rows [B, C'] of each request's own and up to `sampled` drawn candidates, right-padded with -1; and which are its own.

    `rows_BC`: the request's own rows, right-padded with -1; `starts_B`: the first of them; `histories`: all that each user had to do with before.
    """
    shape = (len(rows_BC), _SPARE * sampled)
    drawn_BK = starts_B[:, None] - 1 - rng.integers(0, np.clip(starts_B, 1, WINDOW)[:, None], shape)
    all_BC = np.concatenate([rows_BC, np.where(starts_B[:, None] > 0, drawn_BK, -1)], axis=1)
    own_BC = np.arange(all_BC.shape[1]) < (rows_BC >= 0).sum(1, keepdims=True)
    items_BC = np.where(all_BC >= 0, items_E[all_BC], 0)
    fresh_BC = (all_BC >= 0) & ~_repeats(items_BC) & ~_seen(items_BC, histories) & (np.arange(all_BC.shape[1]) >= rows_BC.shape[1])
    fresh_BC &= fresh_BC.cumsum(1) <= sampled
    kept_BC = own_BC | fresh_BC
    order_BC = np.argsort(~kept_BC, axis=1, kind="stable")[:, : kept_BC.sum(1).max()]
    taken_BC, kept_BC = np.take_along_axis(all_BC, order_BC, 1), np.take_along_axis(kept_BC, order_BC, 1)
    return np.where(kept_BC, taken_BC, -1), np.take_along_axis(own_BC, order_BC, 1)


def _repeats(items_BC: Ints) -> Bools:
    """Where an item stood further left in its row already."""
    order_BC = np.argsort(items_BC, axis=1, kind="stable")
    sorted_BC = np.take_along_axis(items_BC, order_BC, 1)
    repeated_BC = np.zeros(items_BC.shape, dtype=bool)
    np.put_along_axis(repeated_BC, order_BC[:, 1:], sorted_BC[:, 1:] == sorted_BC[:, :-1], 1)
    return repeated_BC


def _seen(items_BC: Ints, histories: FlatHistories) -> Bools:
    """Where an item stands in its row's history."""
    rows_B, span = np.arange(len(items_BC)), 1 + max(items_BC.max(initial=0), histories.items.max(initial=0))
    asked_N = np.zeros(span, dtype=bool)
    asked_N[items_BC] = True
    events_n = np.flatnonzero(asked_N[histories.items])  # of any row's items: few of many, or items are few and np.isin is quick
    held_n = (np.searchsorted(histories.offsets_B1, events_n, side="right") - 1) * span + histories.items[events_n]
    return np.isin(rows_B[:, None] * span + items_BC, held_n)
