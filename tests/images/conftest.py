import pytest

from tests.images.engine import FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Sizes and times, whatever passed or failed."""
    for line in FIGURES:
        terminalreporter.write_line(line)
