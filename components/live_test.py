"""A live A/B test from the service's log: two arms, people in one of them each, looked at as often as one likes. Not a step of the pipeline."""

import logging
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.command import run
from longtrail.errors import EvaluationError
from longtrail.files import atomic_directory, write_json
from longtrail.times import micros

if TYPE_CHECKING:
    from longtrail.offpolicy.online import Fallbacks, LiveLog

log = logging.getLogger("live_test")

COLUMNS = ["timestamp", "click", "policy"]
USER, FALLBACK = ("user_id", "user"), "fallback"  # in a table of ingest, in the service's export; optional: why the arm did not choose the list
HOW = (
    "Each user is in the arm that they saw first. Lists that an arm could not make count for it, where the log has them (intention to treat). Rates "
    "are clicks over impressions, errors by user. The difference is adjusted for what each user did before the test (CUPED): the arms cannot have "
    "touched that, so it takes noise away and no truth. The verdict rests on an any-time interval, so it may be read every day."
)


def live_test(
    log_file: Annotated[
        Path, typer.Option("--log", help="assigned.parquet of serving.export_log, impressions.parquet of ingest, or a folder of such files")
    ],
    a: Annotated[str, typer.Option(help="the arm in service: a value of the column policy")],
    b: Annotated[str, typer.Option(help="the challenger's arm")],
    start: Annotated[
        datetime | None, typer.Option(help="when the test began, UTC; rows before it are what was known. Default: B's first row")
    ] = None,
    share: Annotated[float, typer.Option(help="the share of users that was planned for B", min=0.01, max=0.99)] = 0.5,
    margin: Annotated[float, typer.Option(help="a difference smaller than this share of A's rate does not matter", min=0)] = 0.01,
    confidence: Annotated[float, typer.Option(help="of the intervals", min=0.5, max=0.999)] = 0.95,
    report: Annotated[Path, typer.Option(help="folder to write: report.json, report.html")] = Path("build/live"),
) -> None:
    """Say whether B's arm beats A's, from people who really saw them; safe to run every day while the test is on."""
    from components.live_report import html

    live = read_log(log_file, a, b, None if start is None else micros(start))
    result = judge_live(live, a=a, b=b, share=share, margin=margin, confidence=confidence)
    with atomic_directory(report) as folder:
        write_json(folder / "report.json", result)
        (folder / "report.html").write_text(html(result), encoding="utf-8")
    log.info("%s: %s", result["verdict"], result["sentence"])
    log.info("report: %s", report / "report.html")


def read_log(path: Path, a: str, b: str, start: int | None) -> "LiveLog":
    """The rows of both arms since `start` (UTC µs), and everybody's rows before it. Raises EvaluationError where an arm has none.

    Users are named by `user_id` or `user`, of any type; `fallback`, if it is there, is null in lists that the arm itself chose.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.dataset as ds

    from longtrail.offpolicy.online import LiveLog

    try:
        log_files = ds.dataset(path)
        user = next((name for name in USER if name in log_files.schema.names), USER[0])
        said = FALLBACK in log_files.schema.names
        table = log_files.to_table(columns=[user, *COLUMNS, *([FALLBACK] if said else [])])
    except (FileNotFoundError, pa.ArrowInvalid, KeyError) as error:
        raise EvaluationError(f"{path}: not a log in the impressions schema: {error}") from None
    times = table["timestamp"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()
    policy, users = table["policy"].to_numpy(zero_copy_only=False), _codes(table[user])
    clicks = table["click"].to_numpy().astype(np.float64)
    for arm in (a, b):
        if not (policy == arm).any():
            raise EvaluationError(f"{path}: no rows of arm {arm!r}; the column policy holds {', '.join(sorted(set(policy.tolist()))[:10])}")
    start = int(times[policy == b].min()) if start is None else start
    inside, before = (times >= start) & ((policy == a) | (policy == b)), times < start
    return LiveLog(
        users_N=users[inside],
        times_N=times[inside],
        treated_N=(policy == b)[inside],
        clicks_N=clicks[inside],
        before_users_M=users[before],
        before_clicks_M=clicks[before],
        fallback_N=table[FALLBACK].is_valid().to_numpy()[inside] if said else None,
    )


def _codes(users: Any) -> Any:
    """[N] int64, equal where the users are."""
    import numpy as np

    return users.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)


def judge_live(live: "LiveLog", *, a: str, b: str, share: float, margin: float, confidence: float) -> dict[str, Any]:
    """What the command does, without files. Raises EvaluationError where an arm has too few users."""
    from longtrail.offpolicy.online import arm_checks, compare_arms, compare_fallbacks, fallback_check, monitor
    from longtrail.offpolicy.power import power_analysis
    from longtrail.offpolicy.verdict import decide

    users, crossed = live.until(int(live.times_N.max()) + 1)
    found = compare_arms(users, confidence=confidence)
    counts = (int((~users.treated_U).sum()), int(users.treated_U.sum()))
    fallbacks = compare_fallbacks(live, confidence=confidence)
    failing = fallback_check(fallbacks)
    checks = [*arm_checks(counts, crossed, found.adjusted, shares=(1 - share, share)), failing]
    absolute = margin * found.adjusted.a.value
    power = power_analysis(
        difference=found.adjusted.difference.value,
        error=found.adjusted.error,
        rate_a=found.adjusted.a.value,
        users=sum(counts),
        margin=absolute,
        confidence=confidence,
    )
    verdict = decide([found.any_time], checks, a=a, b=b, confidence=confidence, margin=absolute, power=power)
    days = monitor(live, confidence=confidence)
    failing_a, failing_b = _failing(fallbacks)
    return {
        "verdict": verdict.outcome,
        "sentence": verdict.sentence + _fallback_words(fallbacks, a, b) * (failing.state == "warn"),
        "failed_checks": list(verdict.failed),
        "broken_guardrails": [],
        "confidence": confidence,
        "margin": absolute,
        "a": {"name": a, "users": counts[0], "plain": found.plain.a.json(), "adjusted": found.adjusted.a.json(), **failing_a},
        "b": {"name": b, "users": counts[1], "plain": found.plain.b.json(), "adjusted": found.adjusted.b.json(), **failing_b},
        "plain": found.plain.difference_json(),
        "adjusted": found.adjusted.difference_json(),
        "any_time": found.any_time.json(),
        "variance_saved": found.saved,
        "power": power.json(),
        "checks": [check.json() for check in checks],
        "days": days,
        "users": sum(counts),
        "impressions": int(users.impressions_U.sum()),
    }


def _failing(found: "Fallbacks | None") -> tuple[dict[str, Any], dict[str, Any]]:
    """Of A and B: the share of what was shown that the arm did not choose, and the rate where it did; None where that is not known."""
    if found is None:
        return ({"fallback_share": None, "own_rate": None},) * 2
    a, b = (None if rate != rate else rate for rate in found.own_rates)
    return {"fallback_share": found.shares.a.value, "own_rate": a}, {"fallback_share": found.shares.b.value, "own_rate": b}


def _fallback_words(found: "Fallbacks | None", a: str, b: str) -> str:
    if found is None:
        return ""
    return f" Fallbacks, which count: {found.shares.a.value:.1%} of what {a}'s users saw, {found.shares.b.value:.1%} of what {b}'s did."


if __name__ == "__main__":
    run(live_test)
