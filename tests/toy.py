"""A small log with planted tastes, and its features built the slow and obvious way: what the tests stand on, and what they compare with.

Planted: every user likes two of six categories. They click 60 % of the shown items of those and 10 % of others; four in five of what they
view by themselves is from those too, and nearly all in the newest of the two halves of the log is from the second of them. So a model that
reads the history can beat one that does not.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from longtrail.config import SplitSettings
from longtrail.files import hash_path, write_json
from longtrail.history import build_history
from longtrail.schema import (
    CATALOGUE,
    EXAMPLES,
    IMPRESSIONS,
    INTERACTIONS,
    ITEMS,
    PROPENSITY_METADATA,
    QUARANTINE,
    TARGETS,
    USERS,
    Propensity,
    Table,
)
from longtrail.splits import SPLITS, TEST, VALID, leave_one_out, split_bounds, temporal_split, train_lengths

CATEGORIES = 6
SLATE = 4
ACTIONS = ("click", "view")
START = pd.Timestamp("2024-01-01", tz="UTC")
DAYS = 60
_MINUTE = 60_000_000  # µs


def toy_tables(
    folder: Path, users: int = 60, items: int = 120, events_per_user: int = 40, seed: int = 0, *, impressions: bool = True, shuffled: bool = False
) -> Path:
    """Write the four tables, an empty quarantine and counts.json to `folder`; returns it.

    Each user has exactly `events_per_user` interactions (clicks and views) and events_per_user // 4 requests of 4 items that a uniform policy
    drew (conditional propensity 1 / (items - position + 1)). One request in ten is at the very time of an earlier event of its user, and
    one event in twenty is written hours late. With `impressions` False that table is empty and all interactions are views. With `shuffled` each
    request's clicks are dealt out anew among its items, before anything follows from them: nothing tells which were clicked.
    The last item never occurs. Items of the first category have no category.
    """
    rng = np.random.default_rng(seed)
    category_of = np.arange(items) % CATEGORIES  # 0 is unknown
    catalogue = items - 1
    taste_UK = np.stack([rng.permutation(CATEGORIES)[:2] for _ in range(users)])
    shown = _requests(rng, category_of, taste_UK, catalogue, events_per_user) if impressions else _no_requests()
    if shuffled:
        shown["click"] = rng.permuted(shown.click.to_numpy().reshape(-1, SLATE), axis=1).ravel()
    clicks = shown[shown.click == 1].assign(action="click", timestamp=lambda rows: rows.timestamp + _MINUTE // 2)
    clicks = clicks.groupby("user").head(events_per_user)[["user", "item", "timestamp", "action"]]
    viewed = _views(rng, category_of, taste_UK, catalogue, events_per_user - np.bincount(clicks.user.astype(int), minlength=users))
    events = pd.concat([clicks, viewed], ignore_index=True)
    late = rng.random(len(events)) < 0.05
    events["available_at"] = events.timestamp + np.where(late, rng.integers(1, 48, len(events)) * 60 * _MINUTE, 0)
    shown = _tie(rng, shown, events)
    return _write_tables(Path(folder), events, shown, category_of)


def _no_requests() -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype="int64") for name in ("request", "user", "item", "timestamp", "position", "click", "propensity")})


def _requests(rng: np.random.Generator, category_of: np.ndarray, taste_UK: np.ndarray, catalogue: int, events_per_user: int) -> pd.DataFrame:
    users, each = len(taste_UK), max(events_per_user // 4, 1)
    requests = users * each
    slates = np.stack([rng.choice(catalogue, SLATE, replace=False) for _ in range(requests)])
    user = np.repeat(np.arange(users), each)
    liked = (category_of[slates][:, :, None] == taste_UK[user][:, None, :]).any(axis=2)
    return pd.DataFrame(
        {
            "request": np.repeat(np.arange(requests), SLATE),
            "user": np.repeat(user, SLATE),
            "item": slates.ravel(),
            "timestamp": np.repeat(rng.integers(0, DAYS * 24 * 60, requests) * _MINUTE, SLATE),
            "position": np.tile(np.arange(1, SLATE + 1), requests),
            "click": (rng.random((requests, SLATE)) < np.where(liked, 0.6, 0.1)).ravel().astype(int),
            "propensity": np.tile(1 / (catalogue - np.arange(SLATE)), requests),
        }
    )


def _views(rng: np.random.Generator, category_of: np.ndarray, taste_UK: np.ndarray, catalogue: int, counts_U: np.ndarray) -> pd.DataFrame:
    user = np.repeat(np.arange(len(counts_U)), counts_U)
    time = rng.integers(0, DAYS * 24 * 60, len(user)) * _MINUTE
    newer = (time > DAYS * 24 * 30 * _MINUTE).astype(int)
    taste = taste_UK[user, np.where(rng.random(len(user)) < 0.9, newer, 1 - newer)]
    wanted = np.where(rng.random(len(user)) < 0.8, taste, rng.integers(0, CATEGORIES, len(user)))
    drawn = (rng.pareto(1.5, len(user)) * 3).astype(int)  # a few items of each category are popular
    item = (drawn % (catalogue // CATEGORIES)) * CATEGORIES + wanted
    assert (category_of[item] == wanted).all()
    return pd.DataFrame({"user": user, "item": item, "timestamp": time, "action": "view"})


def _tie(rng: np.random.Generator, shown: pd.DataFrame, events: pd.DataFrame) -> pd.DataFrame:
    """Move one request in ten to the very instant of an event of its user, which must then not be in its history."""
    times_of = {user: rows.timestamp.to_numpy() for user, rows in events[events.action == "view"].groupby("user")}
    moved = {}
    for request, rows in shown.groupby("request"):
        times = times_of.get(rows.user.iloc[0])
        if rng.random() < 0.1 and times is not None:
            moved[request] = times[rng.integers(len(times))]
    return shown.assign(timestamp=shown.request.map(moved).fillna(shown.timestamp).astype("int64"))


def _write_tables(folder: Path, events: pd.DataFrame, shown: pd.DataFrame, category_of: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    log = pd.concat([events[["user", "item", "timestamp"]], shown[["user", "item", "timestamp"]]])
    user_id, item_id = (_dense_ids(log, name) for name in ("user", "item"))
    events = events.sort_values(["timestamp", "user", "item"], kind="stable")
    interactions = pd.DataFrame(
        {
            "user_id": events.user.map(user_id),
            "item_id": events.item.map(item_id),
            "timestamp": _time(events.timestamp),
            "available_at": _time(events.available_at),
            "action": events.action,
            "value": np.full(len(events), np.nan),
        }
    )
    shown = shown.sort_values(["timestamp", "request", "position"], kind="stable")
    impressions = pd.DataFrame(
        {
            "request_id": "r" + shown.request.astype(str).str.zfill(6),
            "user_id": shown.user.map(user_id).astype("int64"),
            "item_id": shown.item.map(item_id).astype("int64"),
            "timestamp": _time(shown.timestamp),
            "available_at": _time(shown.timestamp),
            "position": shown.position,
            "click": shown.click,
            "propensity": shown.propensity.astype(float),
            "policy": "uniform",
        }
    )
    items = pd.DataFrame(
        {"item": item_id.index, "item_id": item_id.to_numpy(), "first_seen": _time(log.groupby("item").timestamp.min()[item_id.index])}
    )
    items["item_key"] = [_item_key(item) for item in items["item"]]
    items["category_id"] = category_of[items["item"]]
    items["category"] = [f"category {c}" if c else None for c in items.category_id]
    items["title"] = [f"Item {key}" for key in items.item_key]
    items["popularity"] = np.bincount(interactions.item_id, minlength=len(items) + 1)[1:]
    people = pd.DataFrame({"user_id": user_id.to_numpy(), "first_seen": _time(log.groupby("user").timestamp.min()[user_id.index])})
    people["user_key"] = [f"u{user:04d}" for user in user_id.index]
    people["events"] = np.bincount(interactions.user_id, minlength=len(people) + 1)[1:]
    _write(folder / "interactions.parquet", INTERACTIONS, interactions)
    kind = Propensity.CONDITIONAL if len(impressions) else Propensity.NONE
    _write(folder / "impressions.parquet", IMPRESSIONS, impressions, **{PROPENSITY_METADATA: kind.value})
    _write(folder / "items.parquet", ITEMS, items)
    _write(folder / "users.parquet", USERS, people)
    pq.write_table(QUARANTINE.arrow().empty_table(), folder / "quarantine.parquet")
    write_json(folder / "counts.json", _counts(interactions, impressions, items, people, kind))
    return folder


def _counts(interactions: pd.DataFrame, impressions: pd.DataFrame, items: pd.DataFrame, people: pd.DataFrame, kind: Propensity) -> dict:
    rows = len(interactions) + len(impressions)
    times = pd.concat([table.timestamp for table in (interactions, impressions) if len(table)])
    return {
        "dataset": {"kind": "toy", "source": "tests/toy.py"},
        "source_sha256": "0" * 64,
        "rows_read": rows,
        "rows_accepted": rows,
        "rows_quarantined": 0,
        "reasons": {},
        "interactions": len(interactions),
        "impressions": len(impressions),
        "users": len(people),
        "items": len(items),
        "categories": int(items.category_id.max()),
        "actions": sorted(interactions.action.unique()),
        "propensity": kind.value,
        "first": times.min().isoformat(),
        "last": times.max().isoformat(),
    }


def _item_key(item: int) -> str:
    return f"i{item:04d}"


def _dense_ids(log: pd.DataFrame, name: str) -> pd.Series:
    """raw number -> id from 1, in order of (first seen, key)."""
    first = log.groupby(name).timestamp.min().reset_index().sort_values(["timestamp", name])
    return pd.Series(np.arange(1, len(first) + 1), index=first[name].to_numpy())


def _time(microseconds: pd.Series) -> pd.Series:
    stamps = START.value // 1000 + microseconds.to_numpy().astype(np.int64)
    return pd.Series(pd.to_datetime(stamps, unit="us", utc=True), index=microseconds.index) if len(stamps) else pd.Series(dtype="datetime64[us, UTC]")


def _write(path: Path, table: Table, frame: pd.DataFrame, **metadata: str) -> None:
    frame = frame.reset_index(drop=True)
    schema = table.arrow(**metadata)
    columns = [pa.array(frame[field.name], type=field.type, from_pandas=True) for field in schema]
    pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")


# ---------------------------------------------------------------- features, the slow way


def toy_features(tables: Path, out: Path, settings: SplitSettings | None = None) -> Path:
    """Build a features folder from `tables` one row at a time, by the definitions; returns `out`. No Feast, no feast/ folder.

    Each count is of rows whose available_at is strictly before the example's timestamp, but with leave-one-out a target's history is what stands
    before it.
    """
    settings = settings or SplitSettings()
    tables, out = Path(tables), Path(out)
    for name in ("examples", "targets"):
        (out / name).mkdir(parents=True, exist_ok=True)
    events, shown = (_numbers(pq.read_table(tables / f"{name}.parquet")) for name in ("interactions", "impressions"))
    items = pq.read_table(tables / "items.parquet").to_pandas()
    users = pq.read_metadata(tables / "users.parquet").num_rows
    actions = json.loads((tables / "counts.json").read_text())["actions"]
    bounds, example_codes, target_codes = _splits(events, shown, settings)
    shown = shown.assign(split=example_codes, **_as_of(shown, events, shown))
    lengths = _before(events, events, "user_id") if settings.kind == "temporal" else _places(events)
    events = events.assign(split=target_codes, history_length=lengths)
    trained = train_lengths(events.user_id.to_numpy(), events.available_at.to_numpy(), users=users, bounds=bounds)
    counts: dict[str, dict[str, int]] = {}
    for code, split in enumerate(SPLITS):
        examples = shown[shown.split == code].sort_values(["timestamp", "request_id", "position"], kind="stable")
        _write_numbers(out / "examples" / f"{split}.parquet", EXAMPLES, examples)
        targets = events[events.split == code].sort_values(["user_id", "timestamp"], kind="stable")
        if code in (VALID, TEST):
            _write_numbers(out / "targets" / f"{split}.parquet", TARGETS, targets)
        counts[split] = {"examples": len(examples), "requests": examples.request_id.nunique(), "targets": len(targets)}
    build_history(tables / "interactions.parquet", out / "history", users=users, actions=actions)
    np.save(out / "train_lengths.npy", trained)
    past = shown[shown.split == 0]
    _write(out / "catalogue.parquet", CATALOGUE, _catalogue(items, events, shown, trained))
    pq.write_table(pq.read_table(tables / "users.parquet"), out / "users.parquet")
    write_json(
        out / "features.json",
        {
            "sizes": {"items": len(items), "categories": int(items.category_id.max()), "actions": len(actions)},
            "users": users,
            "actions": actions,
            "prior_click_rate": float(past.click.mean()) if len(past) else 0.0,
            "split": {
                "kind": settings.kind,
                "valid_from": None if bounds is None else _iso(bounds[0]),
                "test_from": None if bounds is None else _iso(bounds[1]),
                **counts,
            },
            "hashes": {"feature_definitions": "toy", "tables": hash_path(tables)},
        },
    )
    return out


def _splits(events: pd.DataFrame, shown: pd.DataFrame, settings: SplitSettings) -> tuple[tuple[int, int] | None, np.ndarray, np.ndarray]:
    if settings.kind == "temporal":
        bounds = split_bounds((shown if len(shown) else events).timestamp.to_numpy(), settings)
        return bounds, temporal_split(shown.timestamp.to_numpy(), bounds), temporal_split(events.timestamp.to_numpy(), bounds)
    example_codes = leave_one_out(shown.user_id.to_numpy(), shown.timestamp.to_numpy(), requests_n=shown.request_id.to_numpy())
    target_codes = leave_one_out(events.user_id.to_numpy(), events.available_at.to_numpy(), events.timestamp.to_numpy())
    return None, example_codes, target_codes


def _as_of(asked: pd.DataFrame, events: pd.DataFrame, shown: pd.DataFrame) -> dict[str, np.ndarray]:
    clicked = shown[shown.click == 1]
    return {
        "history_length": _before(asked, events, "user_id"),
        "user_impressions": _before(asked, shown, "user_id"),
        "user_clicks": _before(asked, clicked, "user_id"),
        "item_events": _before(asked, events, "item_id"),
        "item_impressions": _before(asked, shown, "item_id"),
        "item_clicks": _before(asked, clicked, "item_id"),
    }


def _before(asked: pd.DataFrame, rows: pd.DataFrame, by: str) -> np.ndarray:
    """For each row asked, how many `rows` with the same `by` were available strictly before its timestamp."""
    available = {key: group.available_at.to_numpy() for key, group in rows.groupby(by)}
    nothing = np.zeros(0, dtype=np.int64)
    return np.array([(available.get(key, nothing) < time).sum() for key, time in zip(asked[by], asked.timestamp, strict=True)], dtype=np.int64)


def _places(events: pd.DataFrame) -> pd.Series:
    """How many events of the user stand before each in the history store."""
    return events.sort_values(["available_at", "timestamp"], kind="stable").groupby("user_id").cumcount().reindex(events.index)


def _catalogue(items: pd.DataFrame, events: pd.DataFrame, shown: pd.DataFrame, trained: np.ndarray) -> pd.DataFrame:
    in_training = _places(events) < trained[events.user_id]

    def count(rows: pd.DataFrame) -> np.ndarray:
        return np.bincount(rows.item_id, minlength=len(items) + 1)[1:]

    return items.assign(
        train_events=count(events[in_training]),
        train_impressions=count(shown[shown.split == 0]),
        train_clicks=count(shown[(shown.split == 0) & (shown.click == 1)]),
        item_events=count(events),
        item_impressions=count(shown),
        item_clicks=count(shown[shown.click == 1]),
    )


def _numbers(table: pa.Table) -> pd.DataFrame:
    """With times as int64 µs."""
    for index, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type):
            table = table.set_column(index, field.name, table[field.name].cast(pa.int64()))
    return table.to_pandas()


def _write_numbers(path: Path, table: Table, frame: pd.DataFrame) -> None:
    _write(path, table, frame.assign(timestamp=pd.to_datetime(frame.timestamp, unit="us", utc=True)))


def _iso(microseconds: int) -> str:
    return pd.Timestamp(microseconds, unit="us", tz="UTC").isoformat()
