"""An A/B test of any log in the impressions schema, without the rest of the pipeline: streamed, so logs of any length fit."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtrail.config import ABTestSettings
from longtrail.errors import EvaluationError

if TYPE_CHECKING:
    from longtrail.offpolicy.evidence import Evidence
    from longtrail.offpolicy.stream import LogReader

HOURS = 3 * 86_400_000_000  # µs; a log that is shorter than this is cut into hours, not days


def compare_log(
    settings: ABTestSettings,
    log: Path,
    a: str,
    b: str,
    *,
    challengers: int = 1,
    kind: str | None = None,
    estimate: bool = False,
    independent_places: bool = False,
    segments: Sequence[str] = (),
) -> dict[str, Any]:
    """The report of B against A. Raises EvaluationError where the log cannot answer; see `longtrail.offpolicy.stream` for what it must hold.

    `a` and `b` are columns of the log (`propensity`: the logger itself) or Parquet files; `kind` overrules the file's metadata.
    """
    import pyarrow.parquet as pq

    from components.ab_test import rules
    from longtrail.offpolicy.experiment import judge
    from longtrail.offpolicy.stream import open_log
    from longtrail.schema import Propensity

    try:
        meaning = Propensity(kind) if kind else None
    except ValueError:
        raise EvaluationError(f"--propensity-kind is {kind!r}; expected conditional or marginal") from None
    more = [*segments, *(["candidates"] if "candidates" in pq.read_schema(_first(log)).names else [])]
    reader = open_log(log, a, b, kind=meaning, estimate=estimate, independent_places=independent_places, context=tuple(more))
    tried = settings.model_copy(update={"challengers": max(challengers, settings.challengers)})
    evidence = gather_log(reader)
    result = judge(evidence, rules(tried)).json()
    places = "lists" if reader.lists else "requests of one item"
    shown = "propensities estimated as shares of what was shown" if reader.estimated else f"{reader.kind.value} propensities as they were logged"
    return {
        **result,
        "how": f"{log}: {places}, {shown}. {reader.names[0]} and {reader.names[1]} are probabilities of the logged items, as given.",
        "source": "log file",
        "why": "the log was given on the command line",
        "data": {"log": str(log), "a": a, "b": b},
    }


def _first(log: Path) -> Path:
    """The log, or the first file of a folder. Raises EvaluationError where there is none."""
    files = sorted(log.rglob("*.parquet")) if log.is_dir() else [log]
    if not files or not files[0].is_file():
        raise EvaluationError(f"{log}: no such file, or no *.parquet in it; expected a log in the impressions schema")
    return files[0]


def gather_log(reader: "LogReader") -> "Evidence":
    """One pass over the log. Raises EvaluationError where it holds no rows."""
    import numpy as np

    from longtrail.offpolicy.columns import user_columns
    from longtrail.offpolicy.evidence import Evidence, LogHealth, gather

    evidence: Evidence | None = None
    hours = False
    for slates, a, b, context in reader:
        if evidence is None and "time" in context:
            hours = len(context["time"]) == reader.rows and int(np.ptp(context["time"])) < HOURS  # the whole log in one block
        found = gather(slates, a, b, columns=user_columns(slates, a, b), context=context, hours=hours)
        evidence = found if evidence is None else evidence.merge(found)
    if evidence is None:
        raise EvaluationError(f"{reader.files[0]}: the log holds no rows; expected at least one impression")
    health = LogHealth(
        repeated_rows=reader.repeated_rows,
        repeated_requests=evidence.health.repeated_requests,
        stray_clicks=reader.stray_clicks,
        clicks=reader.clicks + reader.stray_clicks,
        estimated=reader.estimated,
    )
    return Evidence(**{**vars(evidence), "health": health})
