"""A simulated world whose truth is known: what any user would click in any list, at any time.

Everything about a user, an item or a session is a pure function of (seed, id), by a counter-based hash. So a world of a million items takes
no more memory than its item tables (about 40 bytes an item), any user can be asked about alone, and the log is written in bounded memory.

The truth (our choice; examination as in the position-based and cascade click models, Chuklin et al., Click Models for Web Search, 2015):

    logit(u, i, t) = click_logit + long(u, category i) + 1.5 · [category i = short(u, session of t)] + quality(i)
    P(click at k)  = examine(k) · sigmoid(logit) · Π_{j<k} (1 - stop_after_click · examine(j) · sigmoid(logit_j)),   examine(k) = k^-0.5

`long` is a user's lasting taste, `short` the category a session is about, `quality` the item's own appeal. Popularity is Zipf's and only loosely
tied to quality, so a popularity ranker leaves something to find; a session's organic events show what it is about, so a history is worth reading.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.special import expit, ndtri
from tqdm import tqdm

from longtrail.config import WorldDataset
from longtrail.errors import DatasetError
from longtrail.files import atomic_directory
from longtrail.offpolicy.policies import sample_plackett_luce
from longtrail.schema import Propensity

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

START = 1_704_067_200_000_000  # 2024-01-01 UTC in µs
PERIOD = 180 * 86_400_000_000  # 180 days in µs
SESSION_EVENTS = 10  # a session is as long as an average user takes for this many events
SHORT_BOOST = 1.5  # logit that the session's category adds
TASTE = 0.8  # standard deviation of long-term taste, in logits
QUALITY = 0.6  # standard deviation of item quality, in logits
CHUNK = 200_000  # rows generated at a time: bounds memory
LOGGER = "world_logger"
PROPENSITY = Propensity.CONDITIONAL  # what the log's propensities mean

_LONG, _SESSION, _QUALITY, _ACTIVITY, _CATEGORY, _EVENTS, _REQUESTS = range(1, 8)  # streams of the hash and of the generators


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014): a bijection of 64-bit words that avalanches."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_uniform(seed: int, stream: int, *keys: Ints | int) -> Floats:
    """Uniform in (0, 1), a pure function of its arguments, elementwise over broadcast `keys`."""
    state = _mix(np.asarray([seed % 2**63], dtype=np.uint64) + _GOLDEN * np.asarray([stream], dtype=np.uint64))
    for key in keys:
        state = _mix(state + _GOLDEN * (np.atleast_1d(np.asarray(key, dtype=np.int64)).astype(np.uint64) + np.uint64(1)))
    return ((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


class World:
    """R requests, K places of a list, C candidates. Ids run from 1; 0 is padding. Times are UTC µs. See the module for the model."""

    def __init__(self, settings: WorldDataset) -> None:
        self.settings, self.seed = settings, settings.seed
        self.users, self.items = settings.users, settings.items
        self.categories = min(settings.categories, settings.items)
        items = np.arange(1, self.items + 1)
        weight = 1.0 / np.arange(1, self.categories + 1) ** 0.5
        self._category_cumulative = np.cumsum(weight) / weight.sum()
        self.item_category = np.zeros(self.items + 1, np.int32)  # 1..categories; 0 for padding
        self.item_category[1:] = self._draw_category(hash_uniform(self.seed, _CATEGORY, items))
        self.item_category[1 : self.categories + 1] = np.arange(1, self.categories + 1)  # none is empty
        noise = ndtri(hash_uniform(self.seed, _QUALITY, items))
        rank = 1 + np.argsort(np.argsort(hash_uniform(self.seed, _QUALITY, items, 1) - 0.2 * expit(noise), kind="stable"), kind="stable")
        self.quality = np.zeros(self.items + 1)
        self.quality[1:] = QUALITY * noise
        self.popularity = np.zeros(self.items + 1)  # Zipf: proportional to 1 / rank
        self.popularity[1:] = (1.0 / rank) / (1.0 / np.arange(1, self.items + 1)).sum()
        # Items sorted by category, so that "an item of this category" is a search in a slice of one cumulative sum.
        self._by_category = 1 + np.argsort(self.item_category[1:], kind="stable")
        self._cumulative = np.concatenate([[0.0], np.cumsum(self.popularity[self._by_category])])
        counts = np.bincount(self.item_category[1:], minlength=self.categories + 1)
        self._category_start = np.cumsum(counts) - counts  # [categories + 1]; category c's slice starts here
        self._category_end = np.cumsum(counts)
        moments = settings.events_per_user + settings.requests_per_user
        self.session_length = max(1, PERIOD * SESSION_EVENTS // moments)  # µs

    # ------------------------------------------------------------ tastes

    def long_interest(self, users_R: Ints, categories_RC: Ints) -> Floats:
        """[R, C] lasting taste of each user for each category, in logits. `categories_RC` is [R, C]."""
        return TASTE * ndtri(hash_uniform(self.seed, _LONG, np.asarray(users_R)[:, None], categories_RC))

    def short_interest(self, users_R: Ints, times_R: Ints) -> Ints:
        """[R] the category that the user's session at that time is about."""
        session = (np.asarray(times_R) - START) // self.session_length
        return self._draw_category(hash_uniform(self.seed, _SESSION, users_R, session))

    def click_logits(self, users_R: Ints, items_RC: Ints, times_R: Ints) -> Floats:
        """[R, C] the true logit of a click on each item if it is examined; undefined at padding."""
        categories = self.item_category[items_RC].astype(np.int64)
        short = categories == self.short_interest(users_R, times_R)[:, None]
        return self.settings.click_logit + self.long_interest(users_R, categories) + SHORT_BOOST * short + self.quality[items_RC]

    def true_click_probability(self, users_R: Ints, items_RK: Ints, times_R: Ints) -> Floats:
        """[R, K] the true P(click) at each place of each shown list `items_RK` (right-padded with 0; 0 there), given the whole list.

        Raises DatasetError for a user or item outside the world.
        """
        users_R, items_RK, times_R = np.asarray(users_R), np.asarray(items_RK), np.asarray(times_R)
        for name, ids, low, high in (("user", users_R, 1, self.users), ("item", items_RK, 0, self.items)):
            if ids.size and (ids.min() < low or ids.max() > high):
                raise DatasetError(f"world: {name} ids must lie in {low}..{high}; got {ids.min()}..{ids.max()}")
        active = examination(items_RK.shape[1]) * expit(self.click_logits(users_R, items_RK, times_R)) * (items_RK > 0)
        stays = np.cumprod(1.0 - self.settings.stop_after_click * active, axis=1)
        stays = np.concatenate([np.ones((len(users_R), 1)), stays[:, :-1]], axis=1)
        return active * stays

    # ------------------------------------------------------------ what the old recommender does

    def logging_scores(self, users_R: Ints, items_RC: Ints) -> Floats:
        """[R, C] the logging policy's scores: it knows popularity and half of the lasting taste, and nothing of sessions."""
        popularity = np.log(self.popularity[np.maximum(items_RC, 1)] * self.items + 1e-12)
        return 0.3 * popularity + 0.5 * self.long_interest(users_R, self.item_category[items_RC].astype(np.int64))

    def candidates(self, users_R: Ints, times_R: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """Candidate sets: ([R, C] distinct items, right-padded with 0; [R] lengths). C is settings.candidates, or fewer in a small world."""
        wanted = min(self.settings.candidates, self.items)
        drawn = 3 * wanted
        users, times = np.repeat(users_R, drawn), np.repeat(times_R, drawn)
        items = self._organic_items(users, times, rng).reshape(len(users_R), drawn)
        return _first_distinct(items, wanted)

    def events(self, users_E: Ints, times_E: Ints, rng: np.random.Generator) -> Ints:
        """[E] the item each organic event is with: half the session's category, the rest by lasting taste or popularity."""
        return self._organic_items(users_E, times_E, rng)

    def _organic_items(self, users: Ints, times: Ints, rng: np.random.Generator) -> Ints:
        kind = rng.random(len(users))
        category = self._draw_category(rng.random(len(users)))  # the rest: by popularity of the category
        # Lasting taste by rejection-free choice of the best of four categories: no [rows, categories] table, whatever their number.
        four = self._draw_category(rng.random((len(users), 4)))
        best = np.argmax(self.long_interest(users, four), axis=1)
        category = np.where(kind < 0.8, four[np.arange(len(users)), best], category)
        category = np.where(kind < 0.5, self.short_interest(users, times), category)
        low, high = self._cumulative[self._category_start[category]], self._cumulative[self._category_end[category]]
        place = np.searchsorted(self._cumulative, low + (high - low) * rng.random(len(users)), side="right") - 1
        place = np.clip(place, self._category_start[category], self._category_end[category] - 1)  # guards against rounding at a slice's ends
        return self._by_category[place].astype(np.int64)

    def _draw_category(self, uniform: Floats) -> Ints:
        return 1 + np.minimum(np.searchsorted(self._category_cumulative, uniform, side="right"), self.categories - 1)

    # ------------------------------------------------------------ time

    def counts(self, users_R: Ints, mean: int, stream: int) -> Ints:
        """[R] how many events (or requests) each user has: log-normal around `mean`, at least 1."""
        activity = np.exp(0.4 * ndtri(hash_uniform(self.seed, _ACTIVITY, users_R)) - 0.08)
        return np.maximum(1, np.floor(mean * activity + hash_uniform(self.seed, _ACTIVITY, users_R, stream))).astype(np.int64)

    def user_chunks(self, mean: int) -> Iterator[Ints]:
        """Users 1..U in chunks of about CHUNK rows at `mean` rows a user."""
        step = max(1, CHUNK // mean)
        for first in range(1, self.users + 1, step):
            yield np.arange(first, min(first + step, self.users + 1))


def examination(places: int) -> Floats:
    """[K] P(examine) of each place: k^-0.5."""
    return np.arange(1, places + 1, dtype=np.float64) ** -0.5


def _first_distinct(items_RM: Ints, wanted: int) -> tuple[Ints, Ints]:
    """The first `wanted` distinct entries of each row, in order; right-padded with 0, and how many there are."""
    order = np.argsort(items_RM, axis=1, kind="stable")
    ordered = np.take_along_axis(items_RM, order, axis=1)
    repeated = np.zeros(items_RM.shape, bool)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    place = np.where(repeated, items_RM.shape[1], np.cumsum(~repeated, axis=1) - 1)
    rows, columns = np.nonzero(place < wanted)
    out = np.zeros((len(items_RM), wanted), np.int64)
    out[rows, place[rows, columns]] = items_RM[rows, columns]
    return out, (out > 0).sum(axis=1)


# ---------------------------------------------------------------- the log

_UTC = pa.timestamp("us", tz="UTC")
_EVENTS_SCHEMA = pa.schema([("user", pa.int64()), ("item", pa.int64()), ("timestamp", _UTC), ("category", pa.string()), ("action", pa.string())])
_SHOWN = [("user", pa.int64()), ("item", pa.int64()), ("timestamp", _UTC), ("category", pa.string()), ("click", pa.int8()), ("request", pa.string())]
_IMPRESSIONS_SCHEMA = pa.schema([*_SHOWN, ("position", pa.int32()), ("propensity", pa.float64()), ("policy", pa.string())])
_CANDIDATES_SCHEMA = pa.schema([("request", pa.string()), ("item", pa.int64())])


def write_log(settings: WorldDataset, folder: Path) -> dict[str, Path]:
    """Write a world's raw log to `folder` (whole or not at all), in chunks of users; keys are the world's ids.

    impressions   user, item, timestamp, category, click, request, position (from 1), propensity (conditional on the items above), policy
    interactions  user, item, timestamp, category, action ("view"): what users did by themselves; clicks stand in impressions only
    candidates    request, item: everything the logging policy chose the request's list from
    """
    world = World(settings)
    files = {"impressions": "impressions.parquet", "interactions": "events.parquet", "candidates": "candidates.parquet"}
    with atomic_directory(folder) as aside:
        with pq.ParquetWriter(aside / files["interactions"], _EVENTS_SCHEMA, compression="zstd") as writer:
            for chunk, users in enumerate(tqdm(list(world.user_chunks(settings.events_per_user)), desc="world: events", disable=None)):
                writer.write_table(_events(world, users, np.random.default_rng([settings.seed, _EVENTS, chunk])))
        per_user = settings.requests_per_user * (3 * settings.candidates)
        first = 1
        with (
            pq.ParquetWriter(aside / files["impressions"], _IMPRESSIONS_SCHEMA, compression="zstd") as shown,
            pq.ParquetWriter(aside / files["candidates"], _CANDIDATES_SCHEMA, compression="zstd") as pool,
        ):
            for chunk, users in enumerate(tqdm(list(world.user_chunks(per_user)), desc="world: impressions", disable=None)):
                requests = simulate_requests(world, users, np.random.default_rng([settings.seed, _REQUESTS, chunk]))
                shown.write_table(_impressions(world, requests, first))
                rows, columns = np.nonzero(requests.candidates_RC)
                pool.write_table(pa.table([_names(rows + first), requests.candidates_RC[rows, columns]], schema=_CANDIDATES_SCHEMA))
                first += len(requests.users_R)
    return {name: Path(folder) / file for name, file in files.items()}


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Lists the logging policy showed. `shown_RK` are columns of `candidates_RC`, -1 where the list ended."""

    users_R: Ints
    times_R: Ints
    candidates_RC: Ints
    lengths_R: Ints
    scores_RC: Floats  # already divided by the logger's temperature
    shown_RK: Ints
    propensities_RK: Floats  # conditional; 1 at padding
    items_RK: Ints
    clicks_RK: NDArray[np.int8]


def simulate_requests(world: World, users: Ints, rng: np.random.Generator, *, slate: int | None = None) -> Requests:
    """The requests of `users` over the whole period, answered by the logging policy and clicked as the truth says."""
    settings = world.settings
    users_R = np.repeat(users, world.counts(users, settings.requests_per_user, _REQUESTS))
    times_R = START + rng.integers(0, PERIOD, len(users_R))
    order = np.lexsort((times_R, users_R))
    users_R, times_R = users_R[order], times_R[order]
    candidates, lengths = world.candidates(users_R, times_R, rng)
    scores = world.logging_scores(users_R, candidates) / settings.logger_temperature
    shown, propensities = sample_plackett_luce(scores, lengths, slate or settings.slate, rng)
    items = np.where(shown >= 0, np.take_along_axis(candidates, np.maximum(shown, 0), axis=1), 0)
    clicks = simulate_clicks(world, users_R, items, times_R, rng)
    return Requests(
        users_R=users_R, times_R=times_R, candidates_RC=candidates, lengths_R=lengths, scores_RC=scores, shown_RK=shown,
        propensities_RK=propensities, items_RK=items, clicks_RK=clicks,
    )  # fmt: skip


def simulate_clicks(world: World, users_R: Ints, items_RK: Ints, times_R: Ints, rng: np.random.Generator) -> NDArray[np.int8]:
    """[R, K] clicks on the shown lists, place after place: a user who left after a click clicks no more."""
    wants = (items_RK > 0) & (rng.random(items_RK.shape) < examination(items_RK.shape[1]) * expit(world.click_logits(users_R, items_RK, times_R)))
    leaves = wants & (rng.random(items_RK.shape) < world.settings.stop_after_click)
    gone = np.cumsum(leaves, axis=1) - leaves > 0
    return (wants & ~gone).astype(np.int8)


def _events(world: World, users: Ints, rng: np.random.Generator) -> pa.Table:
    users_E = np.repeat(users, world.counts(users, world.settings.events_per_user, _EVENTS))
    times_E = START + rng.integers(0, PERIOD, len(users_E))
    order = np.lexsort((times_E, users_E))
    users_E, times_E = users_E[order], times_E[order]
    items = world.events(users_E, times_E, rng)
    columns = [users_E, items, pa.array(times_E, _UTC), _category_names(world, items), _repeat("view", len(items))]
    return pa.table(columns, schema=_EVENTS_SCHEMA)


def _impressions(world: World, requests: Requests, first: int) -> pa.Table:
    rows, places = np.nonzero(requests.items_RK)
    items = requests.items_RK[rows, places]
    columns = [requests.users_R[rows], items, pa.array(requests.times_R[rows], _UTC), _category_names(world, items), requests.clicks_RK[rows, places]]
    columns += [_names(rows + first), (places + 1).astype(np.int32), requests.propensities_RK[rows, places], _repeat(LOGGER, len(rows))]
    return pa.table(columns, schema=_IMPRESSIONS_SCHEMA)


def _category_names(world: World, items: Ints) -> pa.Array:
    names = pa.array([f"c{number}" for number in range(world.categories + 1)])
    return names.take(pa.array(world.item_category[items]))


def _names(requests: Ints) -> pa.Array:
    return pa.array(requests).cast(pa.string())


def _repeat(text: str, times: int) -> pa.Array:
    return pa.repeat(pa.scalar(text), times)


def true_rate(
    world: World, users_R: Ints, items_RC: Ints, times_R: Ints, scores_RC: Floats, lengths_R: Ints, places_R: Ints, *, draws: int = 100, seed: int = 0
) -> float:
    """Clicks per impression that a Plackett-Luce policy over these candidates would really get, request r showing `places_R[r]` items.

    Averages the true click probability over `draws` lists a request: exact but for that draw. Scores are divided by the temperature already.
    """
    rng, places = np.random.default_rng(seed), int(places_R.max())
    inside = np.arange(places) < places_R[:, None]
    clicks = 0.0
    for _ in range(draws):
        shown, _ = sample_plackett_luce(scores_RC, lengths_R, places, rng)
        shown = np.where(inside[:, : shown.shape[1]], shown, -1)
        items = np.where(shown >= 0, np.take_along_axis(items_RC, np.maximum(shown, 0), axis=1), 0)
        clicks += float(world.true_click_probability(users_R, items, times_R).sum())
    return clicks / draws / float(np.minimum(places_R, lengths_R).sum())
