"""How a step's function becomes a command: `python -m components.NAME --help`."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from longtrail.errors import LongtrailError

QUIET = {
    "BENTOML_DO_NOT_TRACK": "True",
    "DVC_NO_ANALYTICS": "1",
    "FEAST_USAGE": "False",
    "POSTHOG_DISABLED": "1",
}
HOUSE = ("longtrail", "components", "features", "pipelines", "serving", "__main__")  # other libraries' chatter is not the user's


def run(step: Callable[..., Any]) -> None:
    """Run `step` with arguments from the command line.

    An error of the input's is one plain message and exit code 1; any other keeps its traceback.
    """
    os.environ.update(QUIET)
    # Read by OpenMP when torch is first imported. Threads that spin while they wait take the cores from everybody, each other included.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    # By name: a filter that held the step would hold its module, and some libraries never let go of a logger. DuckDB then prints leaks at the end.
    heard = {*HOUSE, step.__name__}
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.split(".")[0] in heard)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(step)
    try:
        app()
    except LongtrailError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
