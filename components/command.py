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


def run(step: Callable[..., Any]) -> None:
    """Run `step` with arguments from the command line.

    An error of the input's is one plain message and exit code 1; any other keeps its traceback.
    """
    os.environ.update(QUIET)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(step)
    try:
        app()
    except LongtrailError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
