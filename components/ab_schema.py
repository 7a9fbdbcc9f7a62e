"""What stands in `build/ab/report.json`: for whoever reads it by program. docs/ab_report.schema.json is made of this file:

    python -m components.ab_schema > docs/ab_report.schema.json

Rates are clicks per impression, differences are B − A in the same unit (0.01 is one percentage point). null is an undefined figure.
"""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Outcome = Literal["win", "lose", "equivalent", "not enough data", "do not trust"]


class Part(BaseModel):
    """No key but those declared: a report that holds something else is not one of this version."""

    model_config = ConfigDict(extra="forbid")


class Interval(Part):
    value: float | None
    low: float | None
    high: float | None


class Difference(Interval):
    relative: Interval = Field(description="B / A − 1")
    probability_b_better: float | None = Field(description="share of bootstrap replicates in which B is better; null where none was made")


class SegmentDifference(Interval):
    relative: Interval


class Side(Part):
    name: str
    estimates: dict[str, Interval] = Field(description="by estimator")
    truth: float | None = Field(None, description="the true rate, where it is known: simulated worlds and the bandit conversion")


class Influence(Part):
    a: Interval
    b: Interval
    difference: Difference


class Estimator(Part):
    title: str
    assumes: str
    contrast: bool = Field(description="shown for contrast only; never decides")
    parameters: dict[str, float | None] = Field(description="by side: what was chosen from the data; null is no limit")


class Betting(Interval):
    bound: float = Field(description="clicks that a user's total is cut at")
    clipped: int = Field(description="users whose total was cut")


class Power(Part):
    power: float
    detectable: float | None = Field(description="the smallest true difference that a log like this finds with that power")
    detectable_relative: float | None
    factor_for_observed: float | None = Field(description="times as many users, were the difference as large as it looks")
    factor_for_margin: float | None = Field(description="times as many users to find a difference of the margin, or to rule it out")
    users_for_margin: int | None


class Check(Part):
    name: str
    kind: Literal["amount", "trust"] = Field(description="a failed one makes the verdict 'not enough data', or 'do not trust'")
    state: Literal["pass", "warn", "fail", "unknown"]
    value: float | None
    threshold: str
    explanation: str
    advice: str
    policy: str = Field(description="whose weights it is about; empty: the log or the difference")
    meter: float | None = Field(description="where the value stands between bad (0) and good (1)")


class Histogram(Part):
    edges: list[float]
    shares: list[float]


class Diagnostics(Part):
    mean_weight: float
    mean_weight_error: float
    effective_users: float
    largest_user_share: float
    requests: int
    effective_requests: float
    overlap: float
    unused_share: float
    support_violations: float
    largest_weight: float
    weight_quantiles: dict[str, float]
    weight_histogram: Histogram


class GroupShare(Part):
    policy: str
    group: str
    expected: float
    observed: float
    ratio: float
    low: float
    high: float
    z: float


class Segment(Part):
    kind: str
    label: str
    rows: int
    users: int
    a: Interval
    b: Interval
    difference: SegmentDifference
    p_value: float | None
    adjusted_p_value: float | None = Field(description="among all segments of the report")
    finding: Literal["better", "worse", "no difference shown", "too little data"]


class OverTime(Part):
    until: list[str] = Field(description="last day (or hour) of each span")
    rows: list[int]
    logged: list[float | None]
    a: list[float | None]
    b: list[float | None]
    running: list[Interval] = Field(description="B − A over all rows so far, with its any-time interval")


class Truth(Part):
    a: float
    b: float
    difference: float
    what: str


class Bandit(Part):
    requests: int
    rounds: int
    logger_temperature: float


class Report(Part):
    """An offline A/B test."""

    verdict: Outcome
    sentence: str
    failed_checks: list[str]
    broken_guardrails: list[str]
    unjudged_guardrails: list[str] = Field(description="of which the log has too few people, or none")
    estimator: str = Field(description="the one that decides")
    estimators: dict[str, Estimator]
    refused: dict[str, str] = Field(description="estimator → why this log cannot be judged with it")
    confidence: float = Field(description="of every interval: that of the settings, shared among the challengers")
    challengers: int
    looks: bool
    a: Side
    b: Side
    difference: dict[str, Difference] = Field(description="by estimator, bootstrap")
    interval: Interval = Field(description="of the difference that decides: the widest limits of two methods; the verdict rests on it")
    probability_b_better: float | None
    influence: dict[str, Influence]
    any_time: Interval
    betting: Betting | None
    margin: float = Field(description="absolute")
    power: Power
    logged: Interval = Field(description="the logging policy's own rate")
    checks: list[Check]
    diagnostics: dict[Literal["a", "b"], Diagnostics]
    calibration: list[GroupShare]
    segments: list[Segment]
    guardrails: list[str]
    multiplicity: Literal["holm", "by", "bh"]
    over_time: OverTime
    propensities_estimated: bool
    rows: int
    requests: int
    users: int = Field(description="or groups of users, where these were too many to be kept apart")
    source: str
    why: str
    how: str
    data: dict[str, Any]
    temperature: float | None = None
    bandit: Bandit | None = None
    truth: Truth | None = None


def schema() -> str:
    """The JSON schema, as it stands in docs/."""
    return json.dumps(Report.model_json_schema(), indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
