"""Distances of histograms by hand, and alarms as often as stated."""

import numpy as np
import pytest

from longtrail.drift import Calibration, Feature, Reference, chance, effective, limit, make_feature, psi
from longtrail.errors import ModelError


def made(training: np.ndarray, newest: np.ndarray) -> Feature:
    return make_feature(training, newest, training_observations=len(training), newest_observations=len(newest))


def test_psi_by_hand() -> None:
    p, q = np.array([30.5, 70.5]) / 101, np.array([50.5, 50.5]) / 101
    assert psi(np.array([30, 70]), np.array([50, 50])) == pytest.approx(sum((b - a) * np.log(b / a) for a, b in zip(p, q, strict=True)))
    assert psi(np.array([3, 4, 5]), np.array([3, 4, 5])) == 0 and np.isfinite(psi(np.array([0, 9]), np.array([9, 0])))


def test_bins_hold_what_they_say() -> None:
    values = np.array([0, 0, 0, 0, 1, 2, 3, 4, 5, 6])
    feature = made(values, values + 2)
    assert feature.edges == sorted(set(feature.edges)) and sum(feature.training) == sum(feature.newest) == 10
    assert feature.newest == np.bincount(feature.bins(values + 2), minlength=feature.size).tolist()
    for value in (-1, 0, 0.5, 1, 6, 99):
        place = int(feature.bins(np.array([value]))[0])
        assert place == sum(edge <= value for edge in feature.edges)
    assert made(np.full(7, 3), np.full(7, 3)).size == 1 and chance(1, 5, 7, 0.01) == 0.0


def test_one_users_requests_are_one_observation() -> None:
    assert effective(np.array([1, 2, 3, 4])) == 4 and effective(np.array([7] * 100)) == pytest.approx(1.0) and effective(np.array([], int)) == 0
    assert effective(np.array([1] * 99 + [2])) == pytest.approx(100**2 / (99**2 + 1))


@pytest.mark.parametrize("observations", [100, 1_000])
@pytest.mark.parametrize("shape", ["lognormal", "counts"])
def test_the_training_distribution_raises_as_many_alarms_as_stated(observations: int, shape: str) -> None:
    """600 windows drawn from the reference's own distribution: alarms at 5 %, within four standard errors and half as many again for the
    approximation; with a threshold of 0.1, hardly any."""
    rng = np.random.default_rng(3)

    def draw(n: int) -> np.ndarray:
        return rng.lognormal(3, 1, n) if shape == "lognormal" else rng.poisson(2, n)

    windows, stated = 600, 0.05
    feature = made(draw(5_000), draw(5_000))
    found = [psi(feature.newest, np.bincount(feature.bins(draw(observations)), minlength=feature.size)) for _ in range(windows)]
    bound = limit(feature, observations, threshold=0.0, false_alarms=stated)
    rate = np.mean(np.array(found) > bound)
    assert 0.2 * stated < rate < 1.5 * stated + 4 * (stated * (1 - stated) / windows) ** 0.5
    assert np.mean(np.array(found) > limit(feature, observations, threshold=0.1, false_alarms=stated)) <= 0.002


@pytest.mark.parametrize("planted", ["shifted", "wider", "a mass at 0"])
def test_planted_drift_is_found(planted: str) -> None:
    rng = np.random.default_rng(5)
    feature = made(rng.lognormal(3, 1, 5_000), rng.lognormal(3, 1, 5_000))
    values = {"shifted": rng.lognormal(3.7, 1, 500), "wider": rng.lognormal(3, 2.2, 500), "a mass at 0": rng.lognormal(3, 1, 500)}[planted]
    if planted == "a mass at 0":
        values[:150] = 0
    found = psi(feature.newest, np.bincount(feature.bins(values), minlength=feature.size))
    assert found > limit(feature, 500, threshold=0.1, false_alarms=0.001)


def test_what_had_drifted_when_it_was_packaged_is_no_alarm() -> None:
    rng = np.random.default_rng(6)
    feature = made(rng.normal(0, 1, 4_000), rng.normal(1, 1, 4_000))
    counts = np.bincount(feature.bins(rng.normal(1, 1, 2_000)), minlength=feature.size)
    assert psi(feature.training, counts) > 0.25 and psi(feature.newest, counts) < limit(feature, 2_000, threshold=0.1, false_alarms=0.001)


def test_calibration_alarms_are_rare_and_a_tenth_too_much_is_found() -> None:
    rng = np.random.default_rng(7)
    p = rng.beta(2, 8, 20_000)

    def of(clicks: np.ndarray) -> Calibration:
        return Calibration(shown=len(p), predicted=float(p.sum()), variance=float((p * (1 - p)).sum()), clicked=int(clicks.sum()))

    assert not any(of(rng.random(len(p)) < p).drifted(tolerance=0.0) for _ in range(300))
    assert of(rng.random(len(p)) < 0.8 * p).drifted(tolerance=0.1) and not of(rng.random(len(p)) < 0.8 * p).drifted(tolerance=0.5)
    assert of(rng.random(len(p)) < 0.8 * p).ratio == pytest.approx(1.25, abs=0.05)


def test_a_reference_is_read_as_it_was_written(tmp_path) -> None:  # type: ignore[no-untyped-def]
    feature = Feature(edges=[1.0], training=[3.0, 4.0], newest=[5.0, 6.0], training_observations=7.0, newest_observations=11.0)
    reference = Reference(features={"history_length": feature}, click_rate=0.1, new_item_share=0.0, split="test", requests=12)
    reference.write(tmp_path / "reference.json")
    assert Reference.read(tmp_path / "reference.json") == reference
    with pytest.raises(ModelError, match="no such file"):
        Reference.read(tmp_path / "none.json")
    for text in ("{", "[]", '{"features": {"x": {"edges": 1}}}'):
        (tmp_path / "reference.json").write_text(text)
        with pytest.raises(ModelError, match="damaged"):
            Reference.read(tmp_path / "reference.json")
