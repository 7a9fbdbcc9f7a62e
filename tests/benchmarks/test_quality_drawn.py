"""Lists of a bought item and drawn ones: what they must hold, and that counts tell nothing."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.quality.drawn import DAY, START, write_drawn
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
    if times:
        assert np.array_equal(clicked["ts"] // DAY, bought["ts"] // DAY)
    else:
        assert (clicked.groupby("user")["ts"].max() == START).all()


def changing_tastes() -> pd.DataFrame:
    """Every item is bought for 200 days of 3,000, and some by many."""
    rng = np.random.default_rng(1)
    events = 40_000
    day = np.sort(rng.integers(1, 3_000, events))
    item = (day + rng.integers(0, 200, events)) * 5 + np.minimum(rng.pareto(1.0, events), 4).astype(int)
    bought = pd.DataFrame({"user": rng.integers(1, 8_001, events), "item": item, "ts": 86_400 * day}).drop_duplicates(["user", "item"])
    return bought.sort_values(["user", "ts"], kind="stable").reset_index(drop=True)


def counts_auc(bought: pd.DataFrame, rows: pd.DataFrame, counted: np.ndarray, judged: np.ndarray) -> float:
    """AUC, among the `judged` lists, of how often an item stands among the `counted` purchases."""
    counts = bought["item"][counted].value_counts()
    chosen = rows[judged[rows["request"].to_numpy()]]
    return auc(chosen["click"].to_numpy(), counts.reindex(chosen["item"]).fillna(0).to_numpy()) or 0.0


@pytest.mark.parametrize("times", [True, False])
def test_counts_of_the_training_period_tell_nothing_of_what_is_held_out(times: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With times the newest tenth, without them the last event of everybody. Drawn from the whole log, they would."""
    bought = changing_tastes() if times else changing_tastes().drop(columns="ts")
    bought.to_parquet(tmp_path / "bought.parquet")
    last = bought.groupby("user").cumcount(ascending=False).to_numpy() == 0
    held = bought["ts"].to_numpy() > bought["ts"].quantile(0.9) if times else last

    def found(name: str) -> float:
        write_drawn(tmp_path / "bought.parquet", tmp_path / name, drawn=K)
        return counts_auc(bought, pd.read_parquet(tmp_path / name), ~held, held)

    near = found("near.parquet")
    assert near == found("again.parquet") == pytest.approx(0.5, abs=0.04)
    monkeypatch.setattr("benchmarks.quality.drawn.REACH", len(bought))
    assert abs(found("far.parquet") - 0.5) > 2 * abs(near - 0.5) + 0.03
