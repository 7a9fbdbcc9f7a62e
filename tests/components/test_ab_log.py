"""`components.ab_test --log`: any log in the impressions schema, without the rest of the pipeline; and the live test's command."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from components.ab_log import compare_log
from components.ab_schema import Report, schema
from components.ab_test import ab_test
from components.live_test import live_test
from longtrail.config import ABTestSettings
from longtrail.errors import EvaluationError
from longtrail.files import read_json
from tests.components.ab_logs import DAY, START, write

ROOT = Path(__file__).parents[2]
QUICK = ABTestSettings(replicates=200)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("log") / "log.parquet")


def test_the_command_judges_a_log_alone(log: Path, tmp_path: Path) -> None:
    """As a person would call it, in a folder without params.yaml."""
    command = [sys.executable, "-m", "components.ab_test", "--log", str(log), "--a", "old", "--b", "new", "--segment", "device", "--report", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"})
    assert done.returncode == 0, done.stderr
    result = read_json(tmp_path / "out" / "report.json")
    assert result["verdict"] == "win" and f"win: {result['sentence']}" in done.stderr
    assert result["a"]["name"] == "old" and result["b"]["name"] == "new"
    assert {s["kind"] for s in result["segments"]} == {"history length", "user", "device"} and len(result["over_time"]["until"]) == 10
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "new against old" in html and "device: phone" in html and (tmp_path / "out" / "over_time.csv").read_text().count("\n") == 11
    assert read_json(tmp_path / "out" / "metrics.json")["win"] == 1


def test_every_report_fits_the_schema(log: Path) -> None:
    assert (ROOT / "docs" / "ab_report.schema.json").read_text(encoding="utf-8") == schema(), "run: python -m components.ab_schema"
    for result in (compare_log(QUICK, log, "old", "new"), compare_log(QUICK, log, "propensity", "new", estimate=True)):
        plain = json.loads(json.dumps(result, allow_nan=False))
        Report.model_validate(plain)
        jsonschema.validate(plain, json.loads(schema()))


def test_a_policy_of_its_own_file_is_the_same(log: Path, tmp_path: Path) -> None:
    table = pq.read_table(log)
    pq.write_table(table.select(["request_id", "position"]).append_column("probability", table["new"]), tmp_path / "new.parquet")
    one, two = compare_log(QUICK, log, "old", "new"), compare_log(QUICK, log, "old", str(tmp_path / "new.parquet"))
    assert one["difference"] == two["difference"] and two["b"]["name"] == "new"


def test_several_challengers_are_judged_the_more_strictly(log: Path, tmp_path: Path) -> None:
    ab_test(log_file=log, a="old", b=["new", "propensity"], params=tmp_path / "none.yaml", report=tmp_path / "out")
    found = {path.parent.name: read_json(path) for path in (tmp_path / "out").glob("*/report.json")}
    assert set(found) == {"new", "propensity"} and all(r["challengers"] == 2 and r["confidence"] == pytest.approx(0.975) for r in found.values())


@pytest.mark.parametrize(
    ("b", "message"),
    [
        ([".."], r"--b '\.\.' names no policy; expected a column"),
        (["new", ".."], r"--b '\.\.' names no policy"),
        (["x/.."], r"--b 'x/\.\.' names no policy"),
        (["."], r"--b '\.' names no policy"),
        ([""], "--b '' names no policy"),
        (["...parquet"], r"--b '\.\.\.parquet' names no policy"),
        (["one/new.parquet", "new"], r"--b 'one/new\.parquet' and --b 'new' would both be reported as 'new'"),
    ],
)
def test_challengers_need_names_for_their_reports(b: list[str], message: str, log: Path, tmp_path: Path) -> None:
    """Each is a folder within the report: `..` would be written outside it, and of two alike one would be lost."""
    with pytest.raises(EvaluationError, match=message):
        ab_test(log_file=log, a="old", b=b, params=tmp_path / "none.yaml", report=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_a_log_is_said(log: Path, tmp_path: Path) -> None:
    flat = compare_log(QUICK, write(tmp_path / "flat.parquet", rows=12_000, sharper=0.2), "old", "new")
    assert flat["verdict"] == "do not trust" and flat["sentence"].startswith("Do not trust this log")
    estimated = compare_log(QUICK, log, "old", "new", estimate=True)
    assert estimated["propensities_estimated"] and "estimated" in estimated["how"]
    table = pq.read_table(log)
    twice = pa.concat_tables([table.slice(0, 300), table.slice(0, 300), table.slice(300)]).sort_by("request_id")
    pq.write_table(twice.replace_schema_metadata(table.schema.metadata), tmp_path / "twice.parquet")
    found = compare_log(QUICK, tmp_path / "twice.parquet", "old", "new")
    assert found["verdict"] == "do not trust" and "duplicated requests" in found["failed_checks"]
    for wrong, message in (({"b": "nothing"}, "no column 'nothing'"), ({"kind": "exact"}, "expected conditional or marginal")):
        with pytest.raises(EvaluationError, match=message):
            compare_log(QUICK, log, "old", **{"b": "new", **wrong})  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="--log needs --b"):
        ab_test(log_file=log, params=tmp_path / "none.yaml", report=tmp_path / "out")


# ---------------------------------------------------------------- live


def live_log(path: Path, lift: float, *, seed: int = 0, lost: float = 0.0) -> Path:
    """Ten days before the test by `old` alone, ten with both arms by user; `lost` of B's users never reach the log."""
    rng = np.random.default_rng(seed)
    rows, users = 12_000, 600
    user = rng.integers(1, users + 1, rows)
    rate, treated = rng.beta(2, 6, users + 1), rng.random(users + 1) < 0.5
    day = rng.integers(0, 20, rows)
    inside = day >= 10
    b = inside & treated[user]
    click = rng.random(rows) < np.clip(rate[user] + lift * b, 0, 1)
    gone = b & (rng.random(users + 1) < lost)[user]
    table = pa.table(
        {
            "user_id": user,
            "timestamp": pa.array(START + day * DAY + rng.integers(0, DAY, rows), pa.timestamp("us", tz="UTC")),
            "click": click.astype(np.int8),
            "policy": pa.array(np.where(b, "new", "old").tolist()),
        }
    )
    pq.write_table(table.filter(pa.array(~gone)), path)
    return path


def test_a_live_test_is_read_from_the_log(tmp_path: Path) -> None:
    live_test(log_file=live_log(tmp_path / "log.parquet", 0.1), a="old", b="new", start=None, report=tmp_path / "live")
    result = read_json(tmp_path / "live" / "report.json")
    assert result["verdict"] == "win" and 0.05 < result["any_time"]["value"] < 0.15 and result["variance_saved"] > 0.1
    assert len(result["days"]) == 10 and result["users"] <= 600
    html = (tmp_path / "live" / "report.html").read_text(encoding="utf-8")
    assert "new against old" in html and "<svg" in html and "saves" in html


def test_a_live_test_that_loses_users_is_not_trusted(tmp_path: Path) -> None:
    live_test(log_file=live_log(tmp_path / "log.parquet", 0.1, lost=0.4), a="old", b="new", report=tmp_path / "live")
    result = read_json(tmp_path / "live" / "report.json")
    assert result["verdict"] == "do not trust" and result["failed_checks"] == ["sample ratio"]
    with pytest.raises(EvaluationError, match="no rows of arm 'other'"):
        live_test(log_file=tmp_path / "log.parquet", a="old", b="other", report=tmp_path / "live")


def test_a_live_test_starts_at_the_given_hour_of_utc(tmp_path: Path) -> None:
    """As the command is called, on a machine far from Greenwich."""
    log = live_log(tmp_path / "log.parquet", 0.1)
    moments = pc.cast(pq.read_table(log)["timestamp"], pa.int64()).to_numpy()
    since = START + 12 * DAY
    hour = datetime.fromtimestamp(since / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    command = [sys.executable, "-m", "components.live_test", "--log", log, "--a", "old", "--b", "new", "--start", hour, "--report", tmp_path / "live"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "TZ": "America/New_York"}, check=True, capture_output=True)
    assert read_json(tmp_path / "live" / "report.json")["impressions"] == int((moments >= since).sum())
