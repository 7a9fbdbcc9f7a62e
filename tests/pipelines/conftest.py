"""What the tests of pipelines share: a compiler that is not slowed down by the depth of pytest's stack."""

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from kfp.dsl import pipeline_task


def _stack() -> list[tuple[object, str, int, str]]:
    """What Kubeflow reads of `inspect.stack()`, the callers' names, without looking every frame's source up."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        found.append((frame, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    return found


@pytest.fixture(scope="session", autouse=True)
def _shallow_stack() -> Iterator[None]:
    """Every setting of a task asks for the whole stack to name its caller in an error: 0.1 s each below pytest, 7 s a pipeline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_task, "inspect", SimpleNamespace(stack=_stack))
        yield
