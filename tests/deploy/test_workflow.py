"""The workflow for GitHub: its targets exist, its actions are pinned, its rights are the least, and a security linter has nothing to say."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
JOBS = {"lint", "test", "compile", "images"}


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_every_target_it_calls_exists(workflow: dict[str, Any]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    called = {name for step in steps(workflow) for name in re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))}
    assert called == {"lint", "test", "pipeline", "manifests", "images", "push"}
    for name in called:
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name


def test_actions_are_pinned_by_commit_and_say_their_version() -> None:
    used = [line.split("uses:")[1].strip() for line in WORKFLOW.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in used), used


def test_a_job_may_read_the_code_and_nothing_else(workflow: dict[str, Any]) -> None:
    assert workflow["permissions"] == {} and set(workflow["jobs"]) == JOBS
    for job in workflow["jobs"].values():
        assert job["permissions"] == {"contents": "read"} and job["timeout-minutes"] <= 90
    for step in steps(workflow):
        settings = step.get("with", {})
        if step.get("uses", "").startswith("actions/checkout@"):
            assert settings["persist-credentials"] is False
        if step.get("uses", "").startswith("actions/setup-python@"):
            assert (ROOT / settings["cache-dependency-path"]).is_file()


def zizmor(path: Path) -> subprocess.CompletedProcess[str]:
    command = shutil.which("zizmor", path=str(Path(sys.executable).parent))
    assert command is not None
    return subprocess.run([command, "--offline", "--persona", "pedantic", str(path)], capture_output=True, text=True, check=False)


def test_a_security_linter_finds_nothing(tmp_path: Path) -> None:
    found = zizmor(WORKFLOW)
    assert found.returncode == 0, found.stdout + found.stderr
    worse = tmp_path / "ci.yml"
    worse.write_text(WORKFLOW.read_text(encoding="utf-8").replace("run: make images", 'run: echo "${{ github.event.pull_request.title }}"'))
    assert "template-injection" in zizmor(worse).stdout
