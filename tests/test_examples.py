"""Batches against the layout they replace: one row an example, each with its own padded copy of the history, made in plain Python."""

import logging
import shutil
from dataclasses import fields
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrail.config import SplitSettings
from longtrail.errors import HistoryError
from longtrail.examples import (
    FeatureSet,
    RankingBatch,
    RankingBatches,
    SequenceBatches,
    TargetBatches,
    candidate_tensors,
    history_tensors,
    seen_items,
)
from longtrail.examples.buckets import Buckets, padding_share
from longtrail.files import read_json, write_json
from longtrail.schema import EXAMPLES, ITEM_STATISTICS
from longtrail.statistics import item_features, user_features
from tests.toy import toy_features

MAX_HISTORY = 12


@pytest.fixture(scope="module")
def features(toy_features_folder: Path) -> FeatureSet:
    return FeatureSet.open(toy_features_folder)


@pytest.fixture(scope="module")
def leave_one_out(toy_tables_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    return FeatureSet.open(toy_features(toy_tables_folder, tmp_path_factory.mktemp("loo") / "features", SplitSettings(kind="leave_one_out")))


@pytest.fixture(scope="module")
def histories(toy_tables_folder: Path) -> dict[int, list[dict]]:
    """user -> their events in the order they became available."""
    rows = pq.read_table(toy_tables_folder / "interactions.parquet").to_pylist()
    found: dict[int, list[dict]] = {}
    for row in sorted(rows, key=lambda row: (row["available_at"], row["timestamp"])):
        found.setdefault(row["user_id"], []).append(row)
    return found


def micro(time: datetime) -> int:
    return int(np.datetime64(time.replace(tzinfo=None)).astype("datetime64[us]").astype(np.int64))


def same(a: object, b: object) -> bool:
    """Whether two batches hold equal tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)  # type: ignore[arg-type]
    if isinstance(a, int | float | None):
        return a == b
    return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))  # type: ignore[arg-type]


# ---------------------------------------------------------------- ranking


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("max_history", [1, MAX_HISTORY, 500])
def test_a_pointer_batch_equals_the_row_per_example_copy(
    features: FeatureSet, histories: dict[int, list[dict]], split: str, max_history: int
) -> None:
    rows = features.examples(split).to_pylist()
    categories, action_ids = features.catalogue.categories, {name: i + 1 for i, name in enumerate(features.actions)}
    met = []
    for batch in RankingBatches(features, split, max_history=max_history, batch_size=7, seed=3, max_candidates=20):
        assert batch.candidates.items_BC.numel() <= 20
        for b in range(len(batch.users_B)):
            C = int(batch.candidates.lengths_B[b])
            assert (batch.rows_BC[b, C:] == -1).all() and (batch.candidates.items_BC[b, C:] == 0).all()
            for c, e in enumerate(batch.rows_BC[b, :C].tolist()):
                row = rows[e]
                met.append(e)
                past = histories.get(row["user_id"], [])[: row["history_length"]][-max_history:]  # the copy RecBole would keep
                L = len(past)
                assert batch.history.lengths_B[b] == L
                assert batch.history.items_BL[b, :L].tolist() == [event["item_id"] for event in past]
                assert batch.history.actions_BL[b, :L].tolist() == [action_ids[event["action"]] for event in past]
                assert batch.history.times_BL[b, :L].tolist() == [micro(event["timestamp"]) for event in past]
                assert batch.history.categories_BL[b, :L].tolist() == [categories[event["item_id"]] for event in past]
                assert not batch.history.items_BL[b, L:].any() and not batch.history.times_BL[b, L:].any()
                assert all(event["available_at"] < row["timestamp"] for event in past)
                assert (batch.candidates.items_BC[b, c], batch.clicks_BC[b, c]) == (row["item_id"], row["click"])
                assert batch.candidates.categories_BC[b, c] == categories[row["item_id"]]
                seen, shown, clicked = (np.array(row[name]) for name in ITEM_STATISTICS)
                assert np.array_equal(batch.candidates.statistics_BCF[b, c], item_features(seen, shown, clicked, features.prior_click_rate))
                done, shown, clicked = (np.array(row[name]) for name in ("history_length", "user_impressions", "user_clicks"))
                assert np.array_equal(batch.context.statistics_BG[b], user_features(done, shown, clicked, features.prior_click_rate))
                assert batch.users_B[b] == row["user_id"]
                assert batch.times_B[b] == batch.context.times_B[b] == micro(row["timestamp"])
    assert sorted(met) == list(range(len(rows)))


def test_a_request_is_the_rows_of_one_list(features: FeatureSet) -> None:
    batches = RankingBatches(features, "test", max_history=5, batch_size=16)
    table = features.examples("test")
    assert batches.requests == len(table["request_id"].unique()) and batches.rows == table.num_rows
    for r in range(batches.requests):
        assert len(table["request_id"][batches.starts_R1[r] : batches.starts_R1[r + 1]].unique()) == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_batch_of_one_equals_a_batch_of_many(features: FeatureSet, split: str) -> None:
    """Padding changes nothing but the padding."""
    batches = RankingBatches(features, split, max_history=MAX_HISTORY, batch_size=9, seed=1)
    batch = batches[0]
    for b, request in enumerate(batch.requests_B.tolist()):
        one = batches.make(np.array([request]))
        L, C = one.history.items_BL.shape[1], one.clicks_BC.shape[1]
        assert torch.equal(one.history.items_BL[0], batch.history.items_BL[b, :L])
        assert torch.equal(one.candidates.statistics_BCF[0], batch.candidates.statistics_BCF[b, :C])
        assert not batch.candidates.statistics_BCF[b, C:].any()
        assert torch.equal(one.clicks_BC[0], batch.clicks_BC[b, :C])
        assert torch.equal(one.context.statistics_BG[0], batch.context.statistics_BG[b])


def test_order_is_a_pure_function_of_seed_and_epoch(features: FeatureSet) -> None:
    def order(seed: int | None, *epochs: int) -> list[list[int]]:
        batches = RankingBatches(features, "train", max_history=MAX_HISTORY, batch_size=32, seed=seed)
        for epoch in epochs:
            batches.set_epoch(epoch)
        assert [batch.requests_B.tolist() for batch in batches] == [batches[i].requests_B.tolist() for i in range(len(batches))]
        return [batch.requests_B.tolist() for batch in batches]

    assert order(1) == order(1, 0) == order(1, 5, 0)  # whatever came before
    assert order(1, 5) == order(1, 2, 3, 4, 5)
    assert order(1, 5) != order(1, 4) and order(1, 5) != order(2, 5)
    assert order(None) == order(None, 7)
    assert len(order(1, 5)) == len(order(1, 6)) == len(order(None))


def test_requests_of_every_width(features: FeatureSet, tmp_path: Path) -> None:
    """1 to 70 candidates; a request wider than max_candidates makes a batch of its own; two users or moments never share a request."""
    shutil.copytree(features.folder, tmp_path / "features")
    template = features.examples("train").slice(0, 1).to_pylist()[0]
    widths = [1, 70, 3, 1, 12, 12, 30, 2]
    rows = [
        template | {"request_id": f"q{r:02d}", "position": p + 1, "item_id": 1 + (7 * r + p) % features.sizes.items, "click": (r + p) % 2}
        for r, width in enumerate(widths)
        for p in range(width)
    ]
    rows.append(rows[-1] | {"user_id": template["user_id"] % features.users + 1, "history_length": 0, "position": 9})
    pq.write_table(pa.Table.from_pylist(rows, schema=EXAMPLES.arrow()), tmp_path / "features" / "examples" / "train.parquet")
    changed = FeatureSet.open(tmp_path / "features")
    batches = RankingBatches(changed, "train", max_history=5, batch_size=4, seed=0, max_candidates=50)
    assert np.diff(batches.starts_R1).tolist() == [*widths, 1]
    assert sorted(r for batch in batches for r in batch.requests_B.tolist()) == list(range(len(widths) + 1))
    for batch in batches:
        assert batch.clicks_BC.numel() <= 50 or batch.clicks_BC.shape == (1, 70)
        for b, r in enumerate(batch.requests_B.tolist()):
            span = rows[batches.starts_R1[r] : batches.starts_R1[r + 1]]
            assert batch.candidates.items_BC[b].tolist() == [row["item_id"] for row in span] + [0] * (batch.clicks_BC.shape[1] - len(span))
            assert batch.clicks_BC[b, : len(span)].tolist() == [row["click"] for row in span]


def test_batches_move_whole(features: FeatureSet) -> None:
    batch = RankingBatches(features, "test", max_history=5, batch_size=4)[0]
    moved = batch.to("meta")
    assert isinstance(moved, RankingBatch)
    assert moved.history.items_BL.device.type == moved.clicks_BC.device.type == "meta"
    assert same(batch.to("cpu"), batch)


def test_padding_is_measured_and_said(features: FeatureSet, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="longtrail"):
        batches = RankingBatches(features, "train", max_history=500, batch_size=8, seed=0)
    assert "480 requests, 1920 rows, 60 batches; padding" in caplog.text
    cells = real = 0
    for batch in batches:
        cells += batch.history.items_BL.numel()
        real += int(batch.history.lengths_B.sum())
    assert batches.padding()["history"] == pytest.approx(1 - real / cells)
    assert batches.padding()["candidates"] == 0
    shuffled = np.array_split(np.random.default_rng(0).permutation(batches.requests), len(batches))
    assert batches.padding()["history"] < 0.4 * padding_share(batches.history_length_R, shuffled)


# ---------------------------------------------------------------- retrieval


@pytest.mark.parametrize("kind", ["temporal", "leave_one_out"])
@pytest.mark.parametrize("max_history", [1, 5, 7, 12, 500])
def test_every_training_event_is_a_target_once(
    features: FeatureSet, leave_one_out: FeatureSet, histories: dict[int, list[dict]], kind: str, max_history: int
) -> None:
    chosen = features if kind == "temporal" else leave_one_out
    batches = SequenceBatches(chosen, max_history=max_history, batch_size=6, seed=0)
    met: dict[int, list[int]] = {}
    for batch in batches:
        assert batch.history.items_BL.shape == batch.targets_BL.shape and batch.targets_BL.shape[1] == batch.lengths_B.max() <= max_history
        for b, user in enumerate(batch.users_B.tolist()):
            past = histories[user][: chosen.train_lengths[user]]
            times = [micro(event["timestamp"]) for event in past]
            n = int(batch.lengths_B[b])
            window = list(zip(batch.history.items_BL[b, :n].tolist(), batch.history.times_BL[b, :n].tolist(), strict=True))
            starts = [s for s in range(len(past)) if [(e["item_id"], t) for e, t in zip(past, times, strict=True)][s : s + n] == window]
            assert starts
            targets = batch.targets_BL[b, :n].tolist()
            start = next(s for s in starts if all(not t or [e["item_id"] for e in past[s + 1 + p : s + 2 + p]] == [t] for p, t in enumerate(targets)))
            met.setdefault(user, []).extend(start + 1 + p for p, target in enumerate(targets) if target)
            assert not batch.targets_BL[b, n:].any() and not batch.history.items_BL[b, n:].any()
            first = int(batch.first_targets_B[b])
            if first:
                assert start == 0 and first == past[0]["item_id"] and targets[0]
                met[user].append(0)
            else:
                assert all(targets)
    for user, past in histories.items():
        n = int(chosen.train_lengths[user])
        assert sorted(met.get(user, [])) == (list(range(n)) if n > 1 else []), (user, len(past))
    assert batches.targets == int(np.maximum(chosen.train_lengths - 1, 0).sum())


@pytest.mark.parametrize("max_history", [1, 5, 500])
@pytest.mark.parametrize("share", [0.0, 0.6, 0.97])
def test_since_an_instant_only_newer_events_are_targets(
    features: FeatureSet, histories: dict[int, list[dict]], max_history: int, share: float
) -> None:
    past = {user: events[: features.train_lengths[user]] for user, events in histories.items()}
    since = int(np.quantile([micro(event["timestamp"]) for events in past.values() for event in events], share))
    wanted, met = [], []
    for user, events in past.items():
        old = next((place for place, event in enumerate(events) if micro(event["timestamp"]) >= since), len(events))
        wanted += [(user, event["item_id"]) for event in events[old:]] if len(events) > max(old, 1) else []
    for batch in SequenceBatches(features, max_history=max_history, batch_size=6, seed=0, since=since):
        for b, user in enumerate(batch.users_B.tolist()):
            n = int(batch.lengths_B[b])
            window = batch.history.items_BL[b, :n].tolist()
            events = [event["item_id"] for event in past[user]]
            assert any(events[s : s + n] == window for s in range(len(events)))
            met += [(user, item) for item in [*batch.targets_BL[b].tolist(), int(batch.first_targets_B[b])] if item]
    assert sorted(met) == sorted(wanted)


def test_since_an_instant_only_newer_requests_are_kept(features: FeatureSet) -> None:
    every = RankingBatches(features, "train", max_history=5, batch_size=8)
    since = int(np.median(every.times_R))
    newer = RankingBatches(features, "train", max_history=5, batch_size=8, since=since)
    assert newer.requests == int((every.times_R >= since).sum()) < every.requests
    assert np.array_equal(newer.times_R, every.times_R[every.times_R >= since])
    with pytest.raises(HistoryError, match="at or after"):
        RankingBatches(features, "train", max_history=5, batch_size=8, since=int(every.times_R.max()) + 1)


def test_sequence_order(features: FeatureSet) -> None:
    def order(seed: int, epoch: int) -> list[torch.Tensor]:
        batches = SequenceBatches(features, max_history=8, batch_size=16, seed=seed)
        batches.set_epoch(epoch)
        return [batch.targets_BL for batch in batches]

    assert all(torch.equal(a, b) for a, b in zip(order(1, 2), order(1, 2), strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(order(1, 2), order(1, 3), strict=True))


@pytest.mark.parametrize("most", [None, 1, 3])
def test_targets(features: FeatureSet, histories: dict[int, list[dict]], most: int | None) -> None:
    rows = features.targets("test").to_pylist()
    kept: dict[int, int] = {}
    expected = []
    for t, row in enumerate(rows):
        kept[row["user_id"]] = kept.get(row["user_id"], 0) + 1
        if most is None or kept[row["user_id"]] <= most:
            expected.append(t)
    met = []
    for batch in TargetBatches(features, "test", max_history=MAX_HISTORY, batch_size=11, max_per_user=most):
        for b, t in enumerate(batch.rows_B.tolist()):
            row = rows[t]
            met.append(t)
            assert (batch.targets_B[b], batch.users_B[b], batch.times_B[b]) == (row["item_id"], row["user_id"], micro(row["timestamp"]))
            assert batch.history_length_B[b] == row["history_length"]
            past = [event["item_id"] for event in histories[row["user_id"]] if event["available_at"] < row["timestamp"]]
            assert batch.history.items_BL[b, : batch.history.lengths_B[b]].tolist() == past[-MAX_HISTORY:]
    assert sorted(met) == expected


def test_leave_one_out_targets_are_the_last_two(leave_one_out: FeatureSet, histories: dict[int, list[dict]]) -> None:
    for split, place in (("valid", -2), ("test", -1)):
        rows = leave_one_out.targets(split).to_pylist()
        assert {row["user_id"]: row["item_id"] for row in rows} == {user: past[place]["item_id"] for user, past in histories.items()}
        assert {row["user_id"]: row["history_length"] for row in rows} == {user: len(past) + place for user, past in histories.items()}


def test_seen_items(features: FeatureSet, histories: dict[int, list[dict]]) -> None:
    users = np.array([1, 0, 2, 1, 3])
    lengths = np.array([5, 0, 40, 0, 40])
    offsets, items = seen_items(features, users, lengths)
    for b, (user, length) in enumerate(zip(users.tolist(), lengths.tolist(), strict=True)):
        expected = sorted({event["item_id"] for event in histories.get(user, [])[:length]})
        assert items[offsets[b] : offsets[b + 1]].tolist() == expected
    offsets, items = seen_items(features, users[:0], lengths[:0])
    assert offsets.tolist() == [0] and len(items) == 0


# ---------------------------------------------------------------- buckets


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40)), max_size=300),
    batch_size=st.integers(1, 20),
    max_cells=st.one_of(st.none(), st.integers(1, 100)),
    seed=st.one_of(st.none(), st.integers(0, 9)),
)
def test_buckets(sizes: list[tuple[int, int]], batch_size: int, max_cells: int | None, seed: int | None) -> None:
    lengths, widths = (np.array([size[k] for size in sizes], dtype=np.int64) for k in range(2))
    buckets = Buckets.make(lengths, widths, batch_size=batch_size, max_cells=max_cells)
    for epoch in (0, 1):
        batches = buckets.batches(seed=seed, epoch=epoch)
        assert len(batches) == len(buckets)
        assert sorted(n for batch in batches for n in batch.tolist()) == list(range(len(sizes)))
        for batch in batches:
            assert 1 <= len(batch) <= batch_size
            assert max_cells is None or len(batch) == 1 or len(batch) * widths[batch].max() <= max_cells
        cells = sum(len(batch) * max(1, lengths[batch].max()) for batch in batches)
        assert padding_share(lengths, batches) == pytest.approx(1 - lengths.sum() / cells if cells else 0)


# ---------------------------------------------------------------- what goes wrong


def test_batches_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 0; expected at least 1"):
        Buckets.make(np.array([3, 4]), batch_size=0)


def test_errors_name_the_part(features: FeatureSet, tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match=r"features\.json: no such file; expected a features folder"):
        FeatureSet.open(tmp_path)
    with pytest.raises(HistoryError, match="there is no split 'tset'; expected one of train, valid, test"):
        features.examples("tset")
    with pytest.raises(HistoryError, match="there is no split 'train'; expected one of valid, test"):
        features.targets("train")
    copy = tmp_path / "features"
    shutil.copytree(features.folder, copy)
    meta = read_json(copy / "features.json")
    write_json(copy / "features.json", meta | {"sizes": meta["sizes"] | {"items": 5}})
    with pytest.raises(HistoryError, match=r"catalogue\.parquet: items: 119; features\.json expects 5"):
        FeatureSet.open(copy)
    write_json(copy / "features.json", meta)
    np.save(copy / "train_lengths.npy", np.zeros(3, dtype=np.int64))
    with pytest.raises(HistoryError, match=r"train_lengths\.npy: shape"):
        FeatureSet.open(copy)
    np.save(copy / "train_lengths.npy", np.zeros(features.users + 1, dtype=np.int64))
    empty = FeatureSet.open(copy)
    with pytest.raises(HistoryError, match="no user has two events in the training period"):
        SequenceBatches(empty, max_history=5, batch_size=2, seed=0)
    file = copy / "examples" / "train.parquet"
    pq.write_table(EXAMPLES.arrow().empty_table(), file)
    with pytest.raises(HistoryError, match=r"train\.parquet: no rows; expected impressions"):
        RankingBatches(empty, "train", max_history=5, batch_size=2)
    pq.write_table(features.examples("train").drop_columns(["click"]), file)
    with pytest.raises(HistoryError, match=r"train\.parquet: no column click"):
        empty.examples("train")
    file.unlink()
    with pytest.raises(HistoryError, match="run build_features"):
        empty.examples("train")


def test_an_unknown_item_is_named(features: FeatureSet) -> None:
    statistics = {name: np.zeros((1, 2), dtype=np.int64) for name in ITEM_STATISTICS}
    with pytest.raises(HistoryError, match=r"item_id 120 is unknown; expected 0 \(padding\) to 119"):
        candidate_tensors(np.array([[120, 1]]), np.array([2]), statistics, features.catalogue, 0.1)
    with pytest.raises(HistoryError, match="item_id -1 is unknown"):
        candidate_tensors(np.array([[1, -1]]), np.array([2]), statistics, features.catalogue, 0.1)
    arrays = features.history.gather(np.array([1]), np.array([3]), 5)
    assert history_tensors(arrays, features.catalogue).items_BL.shape == (1, 3)
