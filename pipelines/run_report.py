"""The words after a Kubeflow run, whichever way it ended: what ran, what failed, where the reports are. The exit handler's work.

Kubeflow tells an exit task nothing of the tasks before it on most of its releases (a task that asks for their status is refused by them), so it is
asked: over its API, as the page does. The local runner has no API; its tasks are told from the folders they wrote.
"""

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.report_page import Section, badge, page, paragraph, table_html
from longtrail.config.cluster import STEPS

log = logging.getLogger(__name__)

WEBHOOK = "LONGTRAIL_WEBHOOK"
TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # mounted where Kubeflow has several users
ENDED = {"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED", "CACHED"}
SETTLE_S = 60.0  # the record of a run lags behind the run
_TONES = {"SUCCEEDED": "good", "CACHED": "good", "FAILED": "bad", "CANCELED": "bad"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a run: its step, how it ended, when (ISO 8601, where known), and why."""

    name: str
    state: str
    started: str = ""
    ended: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended. `note` says what is not known."""

    tasks: list[Task]
    note: str = ""

    @property
    def failed(self) -> list[Task]:
        return [task for task in self.tasks if task.state in ("FAILED", "CANCELED")]

    @property
    def state(self) -> str:
        if self.failed:
            return "failed"
        return "succeeded" if self.tasks and not self.note else "unknown"

    def sentence(self, name: str) -> str:
        """One line for people."""
        if self.failed:
            return f"{name} failed in {', '.join(dict.fromkeys(task.name for task in self.failed))}"
        if self.state == "unknown":
            return f"{name} ended; how is not known: {self.note or 'no task is known'}"
        packaged = any(task.name == "package" and task.state != "SKIPPED" for task in self.tasks)
        return f"{name} succeeded: {'a Bento was packaged' if packaged else 'nothing was packaged, the champion did not win'}"


def tell(*, api: str, run_id: str, name: str, out: Path, uri: str, sleep: Callable[[float], None] = time.sleep) -> Ended:
    """Write the page `out` and tell the webhook of $LONGTRAIL_WEBHOOK, where there is one.

    `uri` is the page's own address: other artifacts of the run lie beside it. What cannot be asked or told is said in the page and the log, never
    raised: the report of a failure must not fail.
    """
    local = "://" not in uri
    ended = from_folder(out.parents[1]) if local else from_api(api, run_id, sleep=sleep)
    place = str(out.parents[1]) if local else uri.partition(f"/{run_id}/")[0] + f"/{run_id}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_page(ended, name, place), encoding="utf-8")
    log.info("%s; artifacts: %s", ended.sentence(name), place)
    _post(ended, name=name, run_id=run_id, place=place)
    return ended


def from_api(api: str, run_id: str, *, sleep: Callable[[float], None] = time.sleep) -> Ended:
    """The run's tasks that are steps of ours, once the record has settled."""
    waited, tasks = 0.0, []
    while True:
        try:
            answer = _get(f"{api.rstrip('/')}/apis/v2beta1/runs/{run_id}")
        except (OSError, ValueError) as error:
            return Ended(tasks=[], note=f"Kubeflow's API did not answer ({error})")
        details = answer.get("run_details", {}).get("task_details", [])
        tasks = [_task(detail) for detail in details if _step(detail.get("display_name", "")) in STEPS and _step(detail["display_name"]) != "report"]
        running = sorted({task.name for task in tasks if task.state not in ENDED})
        if tasks and not running:
            return Ended(tasks=sorted(tasks, key=lambda task: task.started))
        if waited >= SETTLE_S:
            return Ended(tasks=tasks, note=f"no end is recorded of {', '.join(running)}" if running else "the run has no tasks")
        sleep(5.0)
        waited += 5.0


def from_folder(folder: Path) -> Ended:
    """The local runner's tasks: one folder each; a task that came to its end left executor_output.json, which names what it wrote."""
    tasks = [
        Task(name=step, state="SUCCEEDED" if (path / "executor_output.json").is_file() else "FAILED")
        for path, step in _task_folders(folder)
        if step != "report"
    ]
    return Ended(tasks=sorted(tasks, key=lambda task: STEPS.index(task.name)))


def _task_folders(folder: Path) -> Iterator[tuple[Path, str]]:
    """(folder, step) of each task, those inside loops and conditions too: these are folders of their own."""
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        step = _step(path.name.rstrip("0123456789").rstrip("-"))
        if step in STEPS:
            yield path, step
        else:
            yield from _task_folders(path)


def _step(name: str) -> str:
    return name.replace("-", "_")


def _task(detail: dict[str, Any]) -> Task:
    return Task(
        name=_step(detail["display_name"]),
        state=str(detail.get("state", "UNKNOWN")),
        started=str(detail.get("start_time", "")),
        ended=str(detail.get("end_time", "")),
        error=str((detail.get("error") or {}).get("message", "")),
    )


def _get(url: str) -> Any:
    headers = {"Authorization": f"Bearer {TOKEN.read_text().strip()}"} if TOKEN.is_file() else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        return json.loads(answer.read())


def _page(ended: Ended, name: str, place: str) -> str:
    tone = {"failed": "bad", "succeeded": "good"}.get(ended.state, "warn")
    rows = [[task.name, badge(task.state.lower(), _TONES.get(task.state, "plain")), task.started, task.ended, task.error] for task in ended.tasks]
    reports = f"Pages: page of validate, train, evaluate and ab_test in the run's graph; figures: metrics beside them. Files: {place}"
    sections = [Section("Steps", table_html(["step", "state", "started", "ended", "error"], rows, stack=True), ended.note)]
    return page(name, [*sections, Section("Reports", paragraph(reports))], lead=ended.sentence(name), tone=tone)


def _post(ended: Ended, *, name: str, run_id: str, place: str) -> None:
    """The address is a secret: neither it nor an error that may quote it is logged."""
    url = os.environ.get(WEBHOOK, "")
    if not url.startswith(("http://", "https://")):
        if url:
            log.warning("the webhook could not be told: its address is none of http or https")
        return
    failed = [{"step": task.name, "error": task.error} for task in ended.failed]
    body = {"text": ended.sentence(name), "run": run_id, "name": name, "state": ended.state, "failed": failed, "artifacts": place}
    try:
        request = urllib.request.Request(url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=20):
            log.info("the webhook was told")
    except (OSError, ValueError) as error:
        reason = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
        log.warning("the webhook could not be told: %s", reason)
