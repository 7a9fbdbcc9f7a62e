"""Lists of a bought item and drawn ones: what they must hold, and that counts tell nothing."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.quality.drawn import START, write_drawn
from longtrail.metrics import auc

K = 4


def purchases(*, times: bool) -> pd.DataFrame:
    """300 users of 1 to 12 purchases among 60 items, some bought ten times as often as others; days with several of a user's."""
    rng = np.random.default_rng(0)
    popularity = rng.pareto(1.5, 60) + 0.2
    counts = rng.integers(1, 13, 300)
    items = [rng.choice(60, n, replace=False, p=popularity / popularity.sum()) for n in counts]
    days = [np.sort(rng.integers(1, 9, n)) for n in counts]
    columns = {"user": np.repeat(np.arange(1, 301), counts), "item": np.concatenate(items), "ts": np.concatenate(days) * 86_400}
    table = pd.DataFrame(columns)
    return table if times else table.drop(columns="ts")


@pytest.mark.parametrize("times", [True, False])
def test_each_purchase_stands_among_items_that_its_user_never_had(times: bool, tmp_path: Path) -> None:
    bought = purchases(times=times)
    bought.to_parquet(tmp_path / "bought.parquet")
    write_drawn(tmp_path / "bought.parquet", tmp_path / "lists.parquet", drawn=K)
    rows = pd.read_parquet(tmp_path / "lists.parquet")
    assert len(rows) == (K + 1) * len(bought) and rows.groupby("request")["position"].apply(list).map(lambda x: x == [1, 2, 3, 4, 5]).all()
    clicked = rows[rows["click"] == 1].reset_index()
    assert np.array_equal(clicked["request"], np.arange(len(bought)))
    assert clicked["item"].equals(bought["item"]) and clicked["user"].equals(bought["user"])
    had = set(zip(bought["user"], bought["item"], strict=True))
    others = rows[rows["click"] == 0]
    assert not had & set(zip(others["user"], others["item"], strict=True))
    assert (rows.groupby("request")["item"].nunique() == K + 1).all()
    assert clicked["position"].value_counts().between(0.7 * len(bought) / 5, 1.3 * len(bought) / 5).all()
    assert all(clicked.groupby("user")["ts"].apply(lambda ts: ts.is_monotonic_increasing and ts.is_unique))
    assert clicked["ts"].min() >= (86_400 if times else START)
    if times:
        assert np.array_equal(clicked["ts"] // 86_400, bought["ts"] // 86_400)


def test_counts_tell_nothing_where_tastes_come_and_go(tmp_path: Path) -> None:
    """What is bought changes from year to year, and some items are bought by many: what was bought before has neither more nor fewer purchases."""
    rng = np.random.default_rng(1)
    events = 40_000
    bought = pd.DataFrame({"user": rng.integers(1, 20_001, events), "ts": 86_400 * np.sort(rng.integers(1, 3_000, events))})
    bought["item"] = bought["ts"] // 86_400 // 50 + np.minimum(rng.pareto(1.0, events) * 100, 5_000).astype(int)
    bought = bought.drop_duplicates(["user", "item"]).sample(frac=1, random_state=0).sort_values(["user", "ts"])[["user", "item", "ts"]]
    bought.to_parquet(tmp_path / "bought.parquet")
    for name in ("one", "two"):
        write_drawn(tmp_path / "bought.parquet", tmp_path / f"{name}.parquet", drawn=K)
    rows = pd.read_parquet(tmp_path / "one.parquet")
    assert rows.equals(pd.read_parquet(tmp_path / "two.parquet"))
    rows = rows.sort_values("ts", kind="stable").reset_index(drop=True)
    day = rows["ts"] // 86_400
    clicks = rows.groupby(["item", day.rename("day")])["click"].sum().groupby("item").cumsum()
    so_far = clicks.reindex(pd.MultiIndex.from_arrays([rows["item"], day])).to_numpy() - rows["click"]  # of earlier days, nearly
    late = rows["ts"] > rows["ts"].quantile(0.5)
    assert auc(rows["click"][late].to_numpy(), so_far[late].to_numpy(dtype=float)) == pytest.approx(0.5, abs=0.03)
