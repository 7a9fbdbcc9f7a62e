"""Splits against definitions written out row by row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrail.config import SplitSettings
from longtrail.errors import EvaluationError
from longtrail.splits import leave_one_out, split_bounds, temporal_split, train_lengths

quick = settings(max_examples=100, deadline=None, derandomize=True)


def test_bounds_by_hand() -> None:
    times = np.arange(100)[::-1].copy()
    bounds = split_bounds(times, SplitSettings(valid_share=0.2, test_share=0.1))
    assert bounds == (70, 90)
    assert np.bincount(temporal_split(times, bounds)).tolist() == [70, 20, 10]
    assert temporal_split(np.array([69, 70, 89, 90]), bounds).tolist() == [0, 1, 1, 2]


def test_a_share_of_nothing_is_an_empty_split() -> None:
    times = np.arange(10)
    assert split_bounds(times, SplitSettings(valid_share=0.2, test_share=0)) == (8, 10)
    assert split_bounds(times, SplitSettings(valid_share=0, test_share=0.2)) == (8, 8)
    assert split_bounds(times, SplitSettings(valid_share=0, test_share=0)) == (10, 10)


def test_an_instant_is_never_divided() -> None:
    times = np.array([0] * 5 + [1] * 2 + [2] * 2 + [3])
    assert split_bounds(times, SplitSettings(valid_share=0.2, test_share=0.2)) == (1, 2)  # 3 or 1 rows are as near to 2: the larger
    assert split_bounds(times, SplitSettings(valid_share=0.2, test_share=0.1)) == (2, 3)


@pytest.mark.parametrize("times", [[], [5], [5, 5, 5], [1, 1, 2, 2]])
def test_too_few_instants(times: list[int]) -> None:
    with pytest.raises(EvaluationError, match="split: "):
        split_bounds(np.array(times, dtype=np.int64), SplitSettings())


def test_shares_that_leave_nothing() -> None:
    with pytest.raises(EvaluationError, match=r"valid_share 0.5 \+ test_share 0.5"):
        split_bounds(np.arange(10), SplitSettings(valid_share=0.5, test_share=0.5))


@quick
@given(times=st.lists(st.integers(0, 30), min_size=3, max_size=60), valid=st.floats(0.05, 0.4), test=st.floats(0.05, 0.4))
def test_shares_are_met_as_nearly_as_ties_allow(times: list[int], valid: float, test: float) -> None:
    if len(set(times)) < 3:
        return
    times_n = np.array(times)
    settings = SplitSettings(valid_share=valid, test_share=test)
    try:
        t1, t2 = split_bounds(times_n, settings)
    except EvaluationError:  # a tie larger than what the other splits may have
        return
    codes = temporal_split(times_n, (t1, t2))
    assert [(0 if t < t1 else 1 if t < t2 else 2) for t in times] == codes.tolist()
    assert set(codes.tolist()) == {0, 1, 2}
    wanted = test * len(times)
    assert abs((codes == 2).sum() - wanted) <= min(abs((times_n >= t).sum() - wanted) for t in set(times)) + 0.5  # whole rows


@quick
@given(rows=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5), st.integers(0, 2)), max_size=40), grouped=st.booleans())
def test_leave_one_out_equals_the_definition(rows: list[tuple[int, int, int]], grouped: bool) -> None:
    users, times, third = (np.array([row[k] for row in rows], dtype=np.int64) for k in range(3))
    codes = leave_one_out(users, times, requests_n=third.astype(str)) if grouped else leave_one_out(users, times, third)
    for user in set(users.tolist()):
        mine = [n for n in range(len(rows)) if rows[n][0] == user]
        keys = {n: (rows[n][1], str(rows[n][2])) if grouped else (rows[n][1], rows[n][2], n) for n in mine}
        groups = sorted(set(keys.values()))
        for n in mine:
            from_end = len(groups) - 1 - groups.index(keys[n])
            assert codes[n] == (0 if len(groups) < 3 else {0: 2, 1: 1}.get(from_end, 0))


@quick
@given(rows=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), max_size=30))
def test_train_lengths(rows: list[tuple[int, int]]) -> None:
    users, available = (np.array([row[k] for row in rows], dtype=np.int64) for k in range(2))
    before = train_lengths(users, available, users=5, bounds=(4, 8))
    assert before.tolist() == [sum(u == user and t < 4 for u, t in rows) for user in range(6)]
    total = [sum(u == user for u, _ in rows) for user in range(6)]
    assert train_lengths(users, available, users=5, bounds=None).tolist() == [n - 2 if n >= 3 else n for n in total]


def test_leave_one_out_trains_on_neither_target() -> None:
    rng = np.random.default_rng(0)
    users, times = rng.integers(1, 20, 500), rng.integers(0, 50, 500)
    codes = leave_one_out(users, times)
    assert np.bincount(users[codes == 0], minlength=20).tolist() == train_lengths(users, times, users=19, bounds=None).tolist()
