"""What is wrong with a request, as (field, message): one wording for everything that checks one."""

from collections.abc import Iterable, Sequence
from typing import Any


def faults_of(errors: Iterable[Any]) -> list[tuple[str, str]]:
    """Pydantic's errors, field by field."""
    return [(_path(error["loc"]), _message(error)) for error in errors]


def _path(location: Sequence[str | int]) -> str:
    """["events", 3, "action"] -> events[3].action"""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".") or "body"


def _message(error: dict[str, Any]) -> str:
    if error["type"] == "missing":
        return "missing; expected a value"
    if error["type"] == "extra_forbidden":
        return "unknown field"
    return str(error["msg"])
