"""The pages' examples run against a real server, and the runbook knows every reason and message that the code has."""

import ast
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import Running

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "serving.md", *sorted((ROOT / "docs" / "serving").glob("*.md"))]
RUNBOOK = ROOT / "docs" / "serving" / "runbook.md"
KEYS = {"196": "u0007", "242": "i0001", "302": "i0002", "377": "i0003"}  # MovieLens' keys in the pages, ours here


def here(text: str, running: Running) -> str:
    for key, ours in KEYS.items():
        text = text.replace(f'"{key}"', f'"{ours}"')
    return re.sub(r"(http://)?(127\.0\.0\.1|localhost):3000", str(running.client.base_url).rstrip("/"), text)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.S | re.M)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_examples_run(running: Running, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One after another, as a reader would."""
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(here(block, running), str(page), "exec"), names)
    assert "i0001" in capsys.readouterr().out


def test_curl_examples_answer(running: Running) -> None:
    lines = [line for block in blocks(ROOT / "docs" / "serving.md", "sh") for line in block.splitlines() if line.startswith("curl")]
    assert {re.search(r"3000/(\w+)", line)[1] for line in lines} >= {"recommend", "rank", "events", "readyz"}  # type: ignore[index]
    for line in lines:
        command = [*shlex.split(here(line, running)), "--write-out", "\n%{http_code}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        assert done.stdout.splitlines()[-1] == "200", (line, done.stdout)


def test_links_and_settings_of_the_pages_exist() -> None:
    from longtrail.config import ServingSettings

    def has(settings: Any, dotted: list[str]) -> bool:
        fields = settings.model_fields
        if dotted[0] not in fields:
            return False
        return len(dotted) == 1 or has(fields[dotted[0]].annotation, dotted[1:])

    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                headings = [
                    re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                    for line in path.read_text().splitlines()
                    if line.startswith("#")
                ]
                assert anchor in headings or f'<a id="{anchor}">' in path.read_text(), f"{page.name}: {target}"
        for name in re.findall(r"`serving\.((?:logs|evidence|drift|gate|store|event_log|stop|answer_log)(?:\.\w+)?)`", text):
            assert has(ServingSettings, name.split(".")), f"{page.name}: serving.{name} is no setting"


# ---------------------------------------------------------------- the runbook is whole


def trees() -> list[tuple[Path, ast.AST]]:
    return [(file, ast.parse(file.read_text())) for file in sorted((ROOT / "serving").glob("*.py"))]


def template(node: ast.AST) -> str:
    """The text of a literal or f-string, its values left out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "…".join(part.value for part in node.values if isinstance(part, ast.Constant))
    return ""


def cells() -> list[str]:
    """What stands in backticks in the runbook."""
    text = re.sub(r"^```.*?^```", "", RUNBOOK.read_text(), flags=re.S | re.M)
    return [" ".join(cell.replace("…", "").split()) for cell in re.findall(r"`([^`]+)`", text)]


def test_every_fallback_and_refusal_reason_is_in_the_runbook() -> None:
    from serving.engine import ARM_FAILED
    from serving.guard import AVOIDED, DOWN, SLOW
    from serving.lists import UNKNOWN_USER

    reasons = {ARM_FAILED, AVOIDED, DOWN, SLOW, UNKNOWN_USER}
    for file, tree in trees():
        for node in ast.walk(tree):
            if file.name == "gate.py" and isinstance(node, ast.keyword) and node.arg == "reason" and isinstance(node.value, ast.Constant):
                reasons.add(node.value.value)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "refused":
                reasons |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    assert len(reasons) >= 15 and reasons - {None} <= set(cells()), reasons - set(cells())


OFFLINE = {"replay.py", "drift.py", "export_log.py", "segments.py", "swap.py"}  # tools: their errors are their users'
OPENING = {"ModelError", "StateError", "ConfigError", "EventLogError"}


def test_every_message_of_a_service_that_is_not_ready_is_in_the_runbook() -> None:
    known, missing = cells(), []
    for file, tree in trees():
        for node in ast.walk(tree):
            if (
                file.name not in OFFLINE
                and isinstance(node, ast.Raise)
                and isinstance(node.exc, ast.Call)
                and getattr(node.exc.func, "id", "") in OPENING
            ):
                texts = [text for part in ast.walk(node.exc) if (text := template(part))]
                if not any(len(text) > 5 for text in texts):
                    continue  # what is wrong is said elsewhere: a list of faults, the keys of a file
                if not any(cell in text for text in texts for cell in known if len(cell) > 5):
                    missing.append(f"{file.name}:{node.lineno}: {texts}")
    assert not missing, "\n".join(missing)


def test_every_error_that_is_logged_is_in_the_runbook() -> None:
    known, missing = cells(), []
    skipped = OFFLINE | {
        "shadow.py",
        "user_states.py",
        "watch.py",
        "supervisor.py",
        "protocol.py",
        "event_ids.py",
    }  # nothing to do, or said by others
    for file, tree in trees():
        for node in ast.walk(tree):
            if file.name not in skipped and isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("error", "exception"):
                if getattr(getattr(node.func, "value", None), "id", "") != "logger" or not node.args:
                    continue
                text = template(node.args[0])
                plain = re.sub(r"%[a-z.]*", "", text)
                if not any(re.sub(r"\b(NAME|REASON|MESSAGE)\b", "", cell).strip() in plain or _same(cell, text) for cell in known if len(cell) > 8):
                    missing.append(f"{file.name}:{node.lineno}: {text}")
    assert not missing, "\n".join(missing)


def _same(cell: str, text: str) -> bool:
    """`arm NAME failed` and "arm %s failed"."""
    pattern = re.sub(r"[A-Z]{4,}", "%s", cell)
    return pattern in text
