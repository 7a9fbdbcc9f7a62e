import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.special import expit

from longtrail.config import WorldDataset
from longtrail.datasets.world import (
    START,
    World,
    examination,
    hash_uniform,
    simulate_clicks,
    simulate_requests,
    true_rate,
    write_log,
)
from longtrail.errors import DatasetError
from longtrail.files import hash_path
from longtrail.offpolicy.policies import plackett_luce_propensities, softmax

SMALL = WorldDataset(users=40, items=60, categories=6, events_per_user=12, requests_per_user=5, candidates=8, slate=3, seed=3)


def slow_click_probability(world, user, items, time):
    """One list, place after place, from the module's formulas."""
    out, here = [], 1.0
    for place, item in enumerate(items, start=1):
        if item == 0:
            out.append(0.0)
            continue
        category = int(world.item_category[item])
        logit = world.settings.click_logit + world.long_interest(np.array([user]), np.array([[category]]))[0, 0] + world.quality[item]
        logit += 1.5 * (category == world.short_interest(np.array([user]), np.array([time]))[0])
        clicks = place**-0.5 * expit(logit)
        out.append(here * clicks)
        here *= 1 - world.settings.stop_after_click * clicks
    return out


@pytest.mark.parametrize("stop", [0.0, 0.7, 1.0])
def test_true_click_probability_equals_a_loop_and_what_users_do(stop):
    world = World(SMALL.model_copy(update={"stop_after_click": stop, "click_logit": -0.5}))
    rng = np.random.default_rng(0)
    users, times = rng.integers(1, 41, 50), START + rng.integers(0, 10**13, 50)
    items = rng.integers(0, 61, (50, 4))
    items[0] = 0
    truth = world.true_click_probability(users, items, times)
    np.testing.assert_allclose(truth, [slow_click_probability(world, *row) for row in zip(users, items, times, strict=True)])
    seen = np.mean([simulate_clicks(world, users, items, times, rng) for _ in range(2_000)], axis=0)
    error = np.sqrt(truth * (1 - truth) / 2_000)
    assert (np.abs(seen - truth) <= 4.5 * error + 1e-12).all()  # 200 tests at 4.5 sigma: fails by chance once in 700 seeds


def test_the_log_is_reproducible_and_of_the_stated_shape(tmp_path):
    first, again = write_log(SMALL, tmp_path / "a"), write_log(SMALL, tmp_path / "b")
    assert hash_path(tmp_path / "a") == hash_path(tmp_path / "b")
    assert hash_path(tmp_path / "a") != hash_path(write_log(SMALL.model_copy(update={"seed": 4}), tmp_path / "c")["impressions"].parent)
    assert set(first) == {"impressions", "interactions", "candidates"} and again["impressions"].parent == tmp_path / "b"
    shown, pool = pq.read_table(first["impressions"]).to_pandas(), pq.read_table(first["candidates"]).to_pandas()
    assert shown.groupby("request").size().eq(3).all() and set(shown["position"]) == {1, 2, 3}
    assert set(shown["user"]) == set(range(1, 41)) and shown["item"].between(1, 60).all()
    assert not shown.duplicated(["request", "item"]).any() and not pool.duplicated().any()
    assert set(zip(shown["request"], shown["item"], strict=True)) <= set(zip(pool["request"], pool["item"], strict=True))
    events = pq.read_table(first["interactions"]).to_pandas()
    assert set(events["user"]) == set(range(1, 41)) and 0.6 < len(events) / (40 * 12) < 1.5


def test_logged_propensities_are_those_of_the_logging_policy(tmp_path):
    world = World(SMALL)
    requests = simulate_requests(world, np.arange(1, 41), np.random.default_rng(5))
    expected = plackett_luce_propensities(requests.scores_RC, requests.lengths_R, requests.shown_RK)
    np.testing.assert_allclose(requests.propensities_RK, expected)
    # Each row's 1 / p, over a whole request's first place, averages the number of candidates.
    inverse = 1 / requests.propensities_RK[:, 0]
    assert abs(inverse.mean() - requests.lengths_R.mean()) < 5 * inverse.std() / np.sqrt(len(inverse))


def test_chunks_change_no_user_and_anyone_can_be_asked_alone():
    world = World(SMALL)
    users, times = np.arange(1, 41), np.full(40, START + 10**12)
    items = np.tile(np.arange(1, 5), (40, 1))
    together = world.true_click_probability(users, items, times)
    alone = np.concatenate([world.true_click_probability(users[i : i + 1], items[i : i + 1], times[i : i + 1]) for i in range(40)])
    np.testing.assert_array_equal(together, alone)


def test_hash_is_uniform_and_independent_of_its_neighbours():
    values = hash_uniform(0, 1, np.arange(100_000))
    assert abs(values.mean() - 0.5) < 4 / np.sqrt(12 * 100_000) and np.histogram(values, 20, (0, 1))[0].std() < 4 * np.sqrt(5_000)
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.015
    assert abs(np.corrcoef(values, hash_uniform(0, 2, np.arange(100_000)))[0, 1]) < 0.015


def test_tastes_popularity_and_position_bias_show_in_the_log():
    world = World(WorldDataset(users=300, items=400, categories=8, events_per_user=60, requests_per_user=40))
    requests = simulate_requests(world, np.arange(1, 301), np.random.default_rng(0))
    by_place = requests.clicks_RK.mean(axis=0)
    assert (np.diff(by_place) < 0).all() and np.isclose(examination(4), [1, 0.7071, 0.5774, 0.5], atol=1e-4).all()
    popular = np.sort(world.popularity[1:])[::-1]
    np.testing.assert_allclose(popular[0] / popular[[1, 9, 99]], [2, 10, 100])
    items = requests.items_RK
    short = world.item_category[items] == world.short_interest(requests.users_R, requests.times_R)[:, None]
    assert requests.clicks_RK[short].mean() > 1.3 * requests.clicks_RK[~short].mean()
    long = world.long_interest(requests.users_R, world.item_category[items].astype(np.int64))
    assert requests.clicks_RK[long > 0.5].mean() > 1.3 * requests.clicks_RK[long < -0.5].mean()


def test_true_rate_of_a_one_item_policy_is_its_expectation():
    world = World(SMALL)
    requests = simulate_requests(world, np.arange(1, 41), np.random.default_rng(1), slate=1)
    truth_C = np.concatenate(
        [world.true_click_probability(requests.users_R, requests.candidates_RC[:, [c]], requests.times_R) for c in range(8)], axis=1
    )
    exact = float((softmax(requests.scores_RC, requests.lengths_R) * truth_C).sum(axis=1).mean())
    ones = np.ones(len(requests.users_R), np.int64)
    drawn = true_rate(world, requests.users_R, requests.candidates_RC, requests.times_R, requests.scores_RC, requests.lengths_R, ones, draws=400)
    assert drawn == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("settings", [{"items": 1, "categories": 9}, {"items": 2, "slate": 5}, {"users": 1}, {"candidates": 1}])
def test_tiny_worlds_work(settings, tmp_path):
    world = WorldDataset(**{"users": 5, "items": 10, "events_per_user": 3, "requests_per_user": 2, **settings})
    shown = pq.read_table(write_log(world, tmp_path / "w")["impressions"]).to_pandas()
    assert len(shown) and shown["propensity"].between(0, 1, inclusive="right").all() and shown["item"].between(1, world.items).all()


def test_a_million_items_and_long_histories():
    world = World(WorldDataset(users=20, items=1_000_000, categories=300, events_per_user=10_000))
    users = np.repeat(np.arange(1, 21), world.counts(np.arange(1, 21), 10_000, 6))
    items = world.events(users, np.full(len(users), START), np.random.default_rng(0))
    assert len(items) > 120_000 and items.min() >= 1 and items.max() <= 1_000_000 and len(np.unique(items)) > 20_000


def test_strangers_are_refused():
    world = World(SMALL)
    with pytest.raises(DatasetError, match=r"user ids must lie in 1\.\.40"):
        world.true_click_probability(np.array([41]), np.array([[1]]), np.array([START]))
    with pytest.raises(DatasetError, match=r"item ids must lie in 0\.\.60"):
        world.true_click_probability(np.array([1]), np.array([[61]]), np.array([START]))
