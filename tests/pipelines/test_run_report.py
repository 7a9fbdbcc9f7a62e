"""The words after a run: from Kubeflow's own record of it, from a local run's folders, and what the webhook is told."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from kfp import local

from longtrail.config import parse_config
from pipelines.kubeflow import build
from pipelines.run_report import from_api, from_folder, tell
from tests.pipelines.kubeflow_api import kubeflow_api

HOOK = "secret-part-of-the-address"


def record(**states: str) -> dict[str, Any]:
    """A run as Kubeflow keeps it: our tasks, its own drivers and groups beside them."""
    ours = [
        {"display_name": name.replace("_", "-"), "state": state, "start_time": f"2026-11-22T00:0{at}:00Z", "end_time": f"2026-11-22T00:0{at}:30Z"}
        for at, (name, state) in enumerate(states.items())
    ]
    for task in ours:
        if task["state"] == "FAILED":
            task["error"] = {"code": 5, "message": "main: <exit code 1>"}  # type: ignore[assignment]
    theirs = [{"display_name": name, "state": "RUNNING"} for name in ("root", "exit-handler-1", "ingest-driver", "executor", "report")]
    return {"run_id": "abc", "run_details": {"task_details": [*theirs, *ours]}}


def test_a_failed_run_is_told_to_page_and_webhook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "page"
    with kubeflow_api(
        runs={"abc": [record(ingest="SUCCEEDED", validate="RUNNING"), record(ingest="SUCCEEDED", build_features="FAILED")]}
    ) as kubeflow:
        monkeypatch.setenv("LONGTRAIL_WEBHOOK", f"{kubeflow.address}/hook?{HOOK}")
        waited: list[float] = []
        uri = "s3://longtrail/kubeflow/longtrail/abc/report/1/page"
        ended = tell(api=kubeflow.address, run_id="abc", name="tuesday", out=out, uri=uri, sleep=waited.append)
        (told,) = kubeflow.posted("/hook")
    assert [(task.name, task.state) for task in ended.tasks] == [("ingest", "SUCCEEDED"), ("build_features", "FAILED")] and waited == [5.0]
    assert told == {
        "text": "tuesday failed in build_features",
        "run": "abc",
        "name": "tuesday",
        "state": "failed",
        "failed": [{"step": "build_features", "error": "main: <exit code 1>"}],
        "artifacts": "s3://longtrail/kubeflow/longtrail/abc",
    }
    page = out.read_text()
    assert "tuesday failed in build_features" in page and "main: &lt;exit code 1&gt;" in page and "s3://longtrail/kubeflow/longtrail/abc" in page
    assert HOOK not in page + caplog.text


def test_what_a_good_run_came_to() -> None:
    with kubeflow_api(
        runs={"a": [record(ingest="SUCCEEDED", package="SUCCEEDED")], "b": [record(ingest="SUCCEEDED", package="SKIPPED")]}
    ) as kubeflow:
        assert from_api(kubeflow.address, "a").sentence("x") == "x succeeded: a Bento was packaged"
        assert "nothing was packaged" in from_api(kubeflow.address, "b").sentence("x")


def test_what_is_not_known_is_said_and_never_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with kubeflow_api(runs={"c": [record(train="RUNNING")]}, answers={"/hook": (500, "{}")}) as kubeflow:
        slept: list[float] = []
        still = from_api(kubeflow.address, "c", sleep=slept.append)
        assert still.state == "unknown" and "no end is recorded of train" in still.note and sum(slept) == 60
        nothing = from_api(kubeflow.address, "nobody")
        assert nothing.state == "unknown" and "HTTP Error 404" in nothing.note
        monkeypatch.setenv("LONGTRAIL_WEBHOOK", f"{kubeflow.address}/hook?{HOOK}")
        tell(api=kubeflow.address, run_id="nobody", name="x", out=tmp_path / "page", uri="s3://r/longtrail/nobody/report/1/page")
        monkeypatch.setenv("LONGTRAIL_WEBHOOK", f"file:///etc/{HOOK}")
        tell(api=kubeflow.address, run_id="nobody", name="x", out=tmp_path / "page", uri="s3://r/longtrail/nobody/report/1/page")
    assert "told: HTTP 500" in caplog.text and "none of http or https" in caplog.text and HOOK not in caplog.text
    assert "how is not known" in (tmp_path / "page").read_text()


def test_a_run_that_fails_here_is_reported_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The compiled pipeline itself, on a log that is not there: no try after an error of the input, nothing after it but the report."""
    settings = {"dataset": {"kind": "movielens", "source": str(tmp_path / "nothing")}, "cluster": {"retries": 3, "retry_wait_s": 100}}
    with kubeflow_api() as kubeflow:
        monkeypatch.setenv("LONGTRAIL_WEBHOOK", f"{kubeflow.address}/hook")
        local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "root"), raise_on_error=True)
        with pytest.raises(RuntimeError, match=re.escape("Inner task failed")):
            build(parse_config(settings))()
        (told,) = kubeflow.posted("/hook")
    (run,) = (tmp_path / "root").iterdir()
    assert {path.name for path in run.iterdir()} == {"look", "ingest", "report"}
    assert told["state"] == "failed" and [f["step"] for f in told["failed"]] == ["ingest"] and told["artifacts"] == str(run)
    assert "failed in ingest" in (run / "report" / "page").read_text()
    said = capfd.readouterr().out
    assert "no such file or folder" in said and "trying again" not in said


def test_a_local_run_s_tasks_are_its_folders(tmp_path: Path) -> None:
    for name in ("train-1", "train-2", "ab-test", "look", "report", "something-else"):
        (tmp_path / name).mkdir()
        if name != "ab-test":
            (tmp_path / name / "executor_output.json").write_text(json.dumps({}))
    found = from_folder(tmp_path)
    assert [(task.name, task.state) for task in found.tasks] == [
        ("look", "SUCCEEDED"), ("train", "SUCCEEDED"), ("train", "SUCCEEDED"), ("ab_test", "FAILED"),
    ]  # fmt: skip
    assert found.state == "failed"


def test_a_local_run_s_loops_and_conditions_are_folders_around_tasks(tmp_path: Path) -> None:
    for name in ("look", "for-loop-2-iteration-0/train", "for-loop-2-iteration-1/train", "condition-3/package"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "executor_output.json").write_text(json.dumps({}))
    found = from_folder(tmp_path)
    assert [task.name for task in found.tasks] == ["look", "train", "train", "package"] and "a Bento was packaged" in found.sentence("it")
    (tmp_path / "for-loop-2-iteration-1" / "train" / "executor_output.json").unlink()
    assert [task.name for task in from_folder(tmp_path).failed] == ["train"]
