"""The champion of each stage: the best metric on the validation split among models within the budgets. And why each other lost."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from longtrail.config import SelectionSettings, StageSelection
from longtrail.errors import EvaluationError

STAGES = ("retrieval", "ranking")
ROLES = {"retrieval": "retriever", "ranking": "ranker"}
_SMALLER_IS_BETTER = ("log_loss", "ece")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an evaluation says that selection needs. `low` and `high` may be None, where there was one user."""

    name: str
    value: float
    low: float | None
    high: float | None
    latency_ms_p99: float
    model_bytes: int
    processor_ms_p99: float | None = None  # None in evaluations from before it was measured


@dataclass(frozen=True, kw_only=True)
class Loser:
    name: str
    value: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Champion:
    """The winner of a stage by `metric` on the validation split, and every other model of the stage with why it is not."""

    name: str
    metric: str
    value: float
    low: float | None
    high: float | None
    latency_ms_p99: float
    model_bytes: int
    losers: tuple[Loser, ...]
    processor_ms_p99: float | None = None

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "losers": [asdict(loser) for loser in self.losers]}


def merit(metric: str, value: float) -> float:
    """Greater is better, whatever the metric: errors are negated, and a calibration ratio is best at 1."""
    if metric == "calibration_ratio":
        return -abs(math.log(value)) if value > 0 else -math.inf
    return -value if metric in _SMALLER_IS_BETTER else value


def select_champion(evaluations: Mapping[str, Mapping[str, Any]], stage: str, settings: StageSelection, *, incumbent: str | None = None) -> Champion:
    """`evaluations` are evaluation.json by model name. The `incumbent` never wins: the A/B test is what asks whether it should go.

    Equal metrics: the smaller p99, then the name. Raises EvaluationError where a figure is missing, or no model is within the budgets.
    """
    measured = {name: _measured(name, e, settings.metric) for name, e in sorted(evaluations.items()) if e["stage"] == stage}
    over = {name: reason for name, m in measured.items() if (reason := _over_budget(m, settings))}
    fit = [m for name, m in measured.items() if name not in over and name != incumbent]
    if not fit:
        lines = [f"  {name}: {'the incumbent, which cannot be its own challenger' if name == incumbent else over[name]}" for name in measured]
        raise EvaluationError(
            f"no {stage} model is within selection.{stage} (max_latency_ms {settings.max_latency_ms:g}, max_bytes {settings.max_bytes:,.0f}):\n"
            + ("\n".join(lines) or "  there is none")
        )
    best = min(fit, key=lambda m: (-merit(settings.metric, m.value), m.latency_ms_p99, m.name))
    losers = [
        Loser(name=m.name, value=m.value, reason=over.get(m.name) or _lower(m, best, settings.metric, m.name == incumbent))
        for m in measured.values()
        if m is not best
    ]
    return Champion(**asdict(best), metric=settings.metric, losers=tuple(sorted(losers, key=lambda x: (-merit(settings.metric, x.value), x.name))))


def select(evaluations: Mapping[str, Mapping[str, Any]], settings: SelectionSettings) -> dict[str, Any]:
    """selection.json: the champions by role, and the incumbent. Raises what `select_champion` does, and where the incumbent was not evaluated."""
    if settings.incumbent not in evaluations:
        raise EvaluationError(f"the incumbent {settings.incumbent!r} was not evaluated; expected one of {', '.join(sorted(evaluations))}")
    return {
        "retriever": select_champion(evaluations, "retrieval", settings.retrieval).json(),
        "ranker": select_champion(evaluations, "ranking", settings.ranking, incumbent=settings.incumbent).json(),
        "incumbent": settings.incumbent,
    }


def _measured(name: str, evaluation: Mapping[str, Any], metric: str) -> Measured:
    try:
        found = evaluation["splits"]["valid"]["metrics"]
        cost = evaluation["cost"]
        latency, size = float(cost["latency_ms"]["p99"]), int(cost["model_bytes"])
        processor = cost.get("processor_ms", {}).get("p99")
    except (KeyError, TypeError) as error:
        raise EvaluationError(f"evaluation of {name}: no field {error}; expected an evaluation.json") from None
    if metric not in found:
        raise EvaluationError(f"selection.{evaluation['stage']}.metric is {metric!r}; the evaluation of {name} has {', '.join(sorted(found))}")
    estimate = found[metric]
    if estimate["value"] is None:
        raise EvaluationError(f"{metric} of {name} on the validation split is undefined ({estimate.get('reason')}), so it cannot be compared")
    costs = {"latency_ms_p99": latency, "processor_ms_p99": processor, "model_bytes": size}
    return Measured(name=name, value=estimate["value"], low=estimate["low"], high=estimate["high"], **costs)


def _over_budget(model: Measured, settings: StageSelection) -> str | None:
    parts = []
    latency, budget = model.latency_ms_p99, settings.max_latency_ms
    if latency > budget:
        parts.append(f"p99 latency {_ms(latency)} ms is {_ms(latency - budget)} ms over the budget of {budget:g} ms{_held_up(model, budget)}")
    if model.model_bytes > settings.max_bytes:
        parts.append(f"{model.model_bytes:,} bytes are {model.model_bytes - settings.max_bytes:,.0f} over the budget of {settings.max_bytes:,.0f}")
    return " and ".join(parts) or None


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _held_up(model: Measured, budget: float) -> str:
    """What to do where other work, and not the model, took the time."""
    took = model.processor_ms_p99
    if took is None or took > budget:
        return ""
    return (
        f" (its processor time is {_ms(took)} ms: the machine was busy; measure again on an idle one: dvc repro -f -s evaluate@{model.name}, "
        "or raise max_latency_ms)"
    )


def _lower(model: Measured, best: Measured, metric: str, is_incumbent: bool) -> str:
    gap = merit(metric, best.value) - merit(metric, model.value)
    if is_incumbent:
        verdict = f"the incumbent, never its own challenger; {metric} {model.value:.4f} against {best.value:.4f}"
    elif gap == 0:
        latencies = f"{_ms(model.latency_ms_p99)} against {_ms(best.latency_ms_p99)} ms"
        verdict = f"{metric} {model.value:.4f} is equal, and its p99 latency is not lower ({latencies})"
    else:
        verdict = f"{metric} {model.value:.4f} is worse than {best.value:.4f} by {abs(best.value - model.value):.4f}"
    if model.low is None or model.high is None or best.low is None or best.high is None:
        return verdict
    overlap = model.low <= best.high and best.low <= model.high
    ranges = f"{model.low:.4f}–{model.high:.4f} and {best.low:.4f}–{best.high:.4f}"
    return f"{verdict}; their intervals {ranges} {'overlap: the difference may be chance' if overlap else 'do not overlap'}"
