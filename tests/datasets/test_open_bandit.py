"""The Open Bandit layout on rows that can be checked by hand, and the real small logs from the package index."""

from pathlib import Path

import pandas as pd
import pytest

from longtrail.errors import DatasetError
from tests.datasets.logs import quarantine, run, table, write_zip

HEAD = ",timestamp,item_id,position,click,propensity_score,user_feature_0,user_feature_1,user_feature_2,user_feature_3,user-item_affinity_0\n"
LOG = HEAD + (
    "0,2019-11-24 00:00:34.762830+00:00,14,3,0,0.0125,a,b,c,d,0.0\n"
    "1,2019-11-24 00:00:35+00:00,27,1,1,0.0125,a,b,c,e,0.0\n"
    "2,2019-11-24 00:00:35+00:00,14,1,0,0.25,a,b,c,d,1.0\n"
    "3,2019-11-24 00:00:36+00:00,14,4,2,0.25,a,b,c,d,1.0\n"
    "4,2019-11-24 00:00:37+00:00,14,1,0,0.25,a,b,,d,1.0\n"
)
CONTEXT = ",item_id,item_feature_0,item_feature_1,item_feature_2,item_feature_3\n0,14,-0.1,shirts,x,y\n1,27,0.2,shoes,x,y\n"
FILES = {"random/men/men.csv": LOG.encode(), "random/men/item_context.csv": CONTEXT.encode()}


@pytest.mark.parametrize("kind", ["folder", "zip", "zip with a folder"])
def test_a_log_by_hand(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "obd"
    if kind == "folder":
        for name, content in FILES.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    else:
        prefix = "open_bandit_dataset/" if "folder" in kind else ""
        write_zip(source, {prefix + name: content for name, content in FILES.items()})
    counts = run(tmp_path, {"kind": "open_bandit", "source": str(source), "policy": "random", "campaign": "men"})
    assert quarantine(tmp_path) == [(4, "click", "unknown label; expected 0 or 1"), (5, "user_feature_0..3", "missing user")]
    assert (counts["impressions"], counts["interactions"], counts["propensity"], counts["categories"]) == (3, 1, "marginal", 2)
    shown = table(tmp_path, "impressions")
    assert shown[["request_id", "user_id", "item_id", "position", "click", "propensity", "policy"]].values.tolist() == [
        ["random-men-1", 1, 1, 3, 0, 0.0125, "random"],
        ["random-men-2", 2, 2, 1, 1, 0.0125, "random"],
        ["random-men-3", 1, 1, 1, 0, 0.25, "random"],
    ]
    assert shown["timestamp"].iloc[0] == pd.Timestamp("2019-11-24T00:00:34.762830Z")
    assert table(tmp_path, "users")["user_key"].tolist() == ["a|b|c|d", "a|b|c|e"]
    assert table(tmp_path, "items")[["item_key", "category"]].values.tolist() == [["14", "shirts"], ["27", "shoes"]]


def test_another_layout_or_no_source_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "obd").mkdir()
    with pytest.raises(DatasetError, match=r"not the Open Bandit layout; expected bts/all/all\.csv in it"):
        run(tmp_path, {"kind": "open_bandit", "source": str(tmp_path / "obd"), "policy": "bts"})
    with pytest.raises(DatasetError, match="neither 'small' nor 'full'"):
        run(tmp_path, {"kind": "open_bandit", "source": "medium"})


def test_the_real_small_logs(tmp_path: Path) -> None:
    """On-policy click rates as the dataset's makers count them: random .0038, .0046, .0046; bts .0042, .0069, .0046."""
    clicks = {}
    for policy in ("random", "bts"):
        for campaign in ("all", "men", "women"):
            counts = run(tmp_path, {"kind": "open_bandit", "policy": policy, "campaign": campaign}, max_quarantined_share=0.0)
            assert counts["impressions"] == 10_000 and counts["categories"] > 0
            clicks[policy, campaign] = counts["interactions"]
            shown = table(tmp_path, "impressions")
            assert shown["propensity"].between(0, 1, inclusive="right").all() and set(shown["position"]) == {1, 2, 3}
            if policy == "random":
                assert shown["propensity"].nunique() == 1
    assert clicks == {
        ("random", "all"): 38,
        ("random", "men"): 46,
        ("random", "women"): 46,
        ("bts", "all"): 42,
        ("bts", "men"): 69,
        ("bts", "women"): 46,
    }
