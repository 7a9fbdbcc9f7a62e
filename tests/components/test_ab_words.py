"""Sentences of the A/B report that a page of a plain log does not show."""

import pytest

from components.ab_words import next_step, power_sentence
from longtrail.offpolicy.power import power_analysis


@pytest.mark.parametrize(("rate_a", "told"), [(0.0, "2.8 points in 80% of cases."), (0.1, "2.8 points (28.0% of A's rate) in 80% of cases.")])
def test_what_a_log_finds_is_said_where_a_has_no_rate_too(rate_a: float, told: str) -> None:
    """Where nothing that A would show was clicked, its rate is estimated as 0, and nothing is a share of it."""
    power = power_analysis(difference=0.0, error=0.01, rate_a=rate_a, users=1_000, margin=0.02, confidence=0.95)
    result = {"power": power.json(), "margin": 0.02, "users": 1_000, "verdict": "not enough data"}
    assert power_sentence(result).startswith(f"A log like this finds a true difference of {told}")


@pytest.mark.parametrize(("low", "told"), [(0.01, "B is better on the whole, so it is worth"), (-0.01, "More of this log would not help B")])
def test_a_broken_guardrail_is_to_be_looked_into(low: float, told: str) -> None:
    result = {"a": {"name": "A"}, "b": {"name": "B"}, "verdict": "lose", "broken_guardrails": ["user new"], "interval": {"low": low, "high": 0.02}}
    assert next_step(result).startswith(f"Keep A. {told}") and "worse for user new" in next_step(result)
