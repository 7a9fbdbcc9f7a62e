"""Real logs through the column mapping, and a log that goes back in as it came out."""

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from tests.datasets.logs import run, shared, table


def test_real_short_histories(tmp_path: Path) -> None:
    source = shared("amazon-beauty-5core.parquet")
    columns = {"user": "user", "item": "item", "timestamp": "ts"}
    counts = run(tmp_path, {"kind": "event_log", "source": str(source), "columns": columns}, max_quarantined_share=0.0)
    assert [counts[k] for k in ("interactions", "users", "items", "impressions")] == [198_502, 22_363, 12_101, 0]
    raw = pd.read_parquet(source)
    assert (
        table(tmp_path, "items").set_index("item_key")["popularity"].sort_index().tolist()
        == raw["item"].astype(str).value_counts().sort_index().tolist()
    )


def test_real_impressions(tmp_path: Path) -> None:
    source = shared("trivago_impressions.parquet")
    columns = {"user": "user", "item": "item", "timestamp": "ts", "click": "label", "position": "position", "category": "city"}
    counts = run(tmp_path, {"kind": "event_log", "source": str(source), "columns": columns, "first_position": 0}, max_quarantined_share=0.01)
    raw = pd.read_parquet(source)
    good = raw.drop_duplicates(["user", "ts", "position"])  # a user in two sessions at once: the second list repeats the first's places
    assert counts["impressions"] == len(good) and counts["rows_quarantined"] == len(raw) - len(good) < 1_100
    assert [counts["users"], counts["items"], counts["interactions"]] == [6_593, good["item"].nunique(), int(good["label"].sum())]
    shown = table(tmp_path, "impressions")
    assert not shown.duplicated(["request_id", "position"]).any()
    assert shown.groupby("position")["click"].mean().tolist() == good.groupby("position")["label"].mean().tolist()


def test_real_events_with_clicking_actions(tmp_path: Path) -> None:
    source = shared("trivago_item_events.parquet")
    columns = {"user": "user", "item": "item", "timestamp": "ts", "action": "action_type"}
    dataset = {"kind": "event_log", "source": str(source), "columns": columns, "click_actions": ["clickout item"]}
    counts = run(tmp_path, dataset, max_quarantined_share=0.7)  # one second holds many equal events
    good = pd.read_parquet(source).drop_duplicates()
    assert counts["interactions"] == counts["impressions"] == len(good)
    assert table(tmp_path, "impressions")["click"].sum() == (good["action_type"] == "clickout item").sum()
    assert counts["actions"] == sorted(good["action_type"].unique())


def test_a_world_is_read_like_any_log(tmp_path: Path) -> None:
    counts = run(tmp_path, {"kind": "world", "users": 40, "items": 60, "seed": 3}, max_quarantined_share=0.0)
    assert counts["propensity"] == "conditional" and counts["actions"] == ["click", "view"]
    assert counts["interactions"] == counts["rows_read"] - counts["impressions"] + table(tmp_path, "impressions")["click"].sum()
    assert counts["candidates_dropped"] == 0
    offered = pq.read_table(tmp_path / "tables" / "candidates.parquet").to_pandas()
    shown = table(tmp_path, "impressions")[["request_id", "item_id"]]
    assert len(shown.merge(offered)) == len(shown)  # what was shown is among what could have been


def test_impressions_that_came_out_go_back_in(tmp_path: Path) -> None:
    run(tmp_path, {"kind": "world", "users": 30, "items": 40}, out="first")
    source = tmp_path / "first" / "impressions.parquet"
    names = ("timestamp", "click", "position", "propensity", "policy")
    columns = {"user": "user_id", "item": "item_id", "request": "request_id", "written_at": "available_at", **{n: n for n in names}}
    dataset = {"kind": "event_log", "source": str(source), "columns": columns, "timestamp_unit": "us", "propensity_kind": "conditional"}
    run(tmp_path, dataset, out="second", max_quarantined_share=0.0)
    first, second = (table(tmp_path, "impressions", out) for out in ("first", "second"))
    same = [c for c in first.columns if c not in ("user_id", "item_id")]
    assert first[same].equals(second[same])
