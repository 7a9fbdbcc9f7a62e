"""The pipeline on this machine: `dvc repro`, with what DVC cannot see looked after, and a summary at the end."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from components.command import run
from components.summary import summarise
from longtrail.config import load_config
from longtrail.errors import LongtrailError
from longtrail.files import atomic_file
from pipelines.source import listing

FINGERPRINT = Path("var/source-fingerprint")
TABLES = Path("build/tables")
UP_TO_DATE = "Data and pipelines are up to date."


class PipelineError(LongtrailError):
    """A stage failed; its own message stands above."""


def repro(*arguments: str) -> bool:
    """Run `dvc repro`, passing its output on. True if every stage was up to date. Raises PipelineError if a stage failed."""
    command = [sys.executable, "-m", "dvc", "repro", *arguments]
    idle = False
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout is not None
        for line in process.stdout:
            idle = idle or UP_TO_DATE in line
            if "didn't change, skipping" not in line and not line.startswith("Use `dvc push`"):
                print(line, end="", flush=True)
    if process.returncode:
        raise PipelineError("the pipeline stopped; the failing stage's message stands above. Mend its cause and run again: finished stages are kept")
    return idle


def local(params: Annotated[Path, typer.Option(help="settings")] = Path("params.yaml")) -> None:
    """Run what is out of date of ingest, validate, build_features, train, evaluate, select, ab_test and package; then say what came out."""
    started = time.monotonic()
    config = load_config(params, whole=True)
    pinned = getattr(config.dataset, "repo", None) is not None  # then the files are known by the revision, which DVC sees
    now = "" if pinned else listing(config.dataset)
    known = FINGERPRINT.read_text(encoding="utf-8") if FINGERPRINT.is_file() else None
    if now and now != known and TABLES.is_dir():
        source = getattr(config.dataset, "source", config.dataset.kind)
        how = "may have changed since `dvc repro` read it" if known is None else "has changed since the last run"
        print(f"{source} {how}: reading it again", flush=True)
        repro("--force", "--single-item", "ingest")
    idle = repro()
    with atomic_file(FINGERPRINT) as aside:
        aside.write_text(now, encoding="utf-8")
    if idle:
        print("Nothing has changed since the last run, so nothing was done.\n")
    else:
        print(f"\nThe pipeline ran in {time.monotonic() - started:.0f} s.\n")
    summarise(Path("build"))


if __name__ == "__main__":
    run(local)
