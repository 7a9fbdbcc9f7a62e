"""The quality board: every model on real data, unsampled, with several seeds.

    python -m benchmarks.quality                                     # all boards, 3 seeds: many hours on a CPU
    python -m benchmarks.quality --board ml-1m-next-item --seeds 1   # one board
    python -m benchmarks.quality --minutes 60 --workers 2            # as much as an hour allows; the next call goes on
    python -m benchmarks.quality --minutes 0                         # the tables of what has been run, nothing more
    python -m benchmarks.quality --minutes 0 --results benchmarks/quality/recorded.json --page docs/quality.md   # and record it

Each cell (board, model, seed) is trained in a process of its own and leaves a JSON file under --work, so that an interrupted board goes on where
it stopped. A cell whose settings are not the board's any more is trained again. The table and one JSON are made of the cells that are there and of
those that the JSON has already; a cell that was not run is missing from them, never guessed.
"""

import logging
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.quality.board import Cell, cells, load_boards
from benchmarks.quality.picture import save_picture
from benchmarks.quality.record import read_cells, to_run, with_tables, write_results
from benchmarks.quality.table import markdown, summary
from components.command import run
from longtrail.files import atomic_file

log = logging.getLogger("quality")


def quality(
    board: Annotated[list[str] | None, typer.Option(help="boards to run; default: all")] = None,
    model: Annotated[list[str] | None, typer.Option(help="models to run; default: all of each board")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    workers: Annotated[int, typer.Option(min=1, help="cells trained at a time, one thread each")] = 2,
    minutes: Annotated[float | None, typer.Option(help="start no new cell after this long")] = None,
    data: Annotated[Path, typer.Option(help="folder of the data files")] = Path("../shared/data"),
    work: Annotated[Path, typer.Option(help="features and cells, kept between calls")] = Path("build/quality"),
    results: Annotated[Path, typer.Option(help="the one JSON of all cells")] = Path("build/quality/quality.json"),
    page: Annotated[Path | None, typer.Option(help="a page in Markdown: its tables are renewed, and its images/quality/BOARD.svg")] = None,
) -> None:
    """Train and judge what has not been yet, then print the tables. Ends with status 1 where a cell failed."""
    boards = load_boards(board)
    missing = to_run(cells(boards, model, seeds), boards, work)
    until = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    log.info("%d cells to run", len(missing))
    (work / "logs").mkdir(parents=True, exist_ok=True)
    failed = 0
    with ThreadPoolExecutor(workers) as pool:
        for done, (cell, code) in enumerate(pool.map(lambda c: (c, _run(c, until, data=data, work=work)), missing), start=1):
            failed += bool(code)
            if code is not None:
                log.info("%d/%d %s: %s", done, len(missing), cell.file, "done" if code == 0 else f"failed, see {_log(cell, work)}")
    everything = load_boards()
    found = read_cells(everything, work, results)
    rows = {name: summary(name, chosen, found) for name, chosen in everything.items()}
    document = {
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "command": "python -m benchmarks.quality",
        "cells": found,
    }
    write_results(results, document)
    tables = {name: markdown(everything[name], rows[name]) for name in rows}
    if page is not None:
        text = with_tables(page.read_text(encoding="utf-8"), tables, name=str(page))
        with atomic_file(page) as aside:
            aside.write_text(text, encoding="utf-8")
        for name in everything:
            if (picture := f"images/quality/{name}.svg") in text:
                save_picture(everything[name], rows[name], page.parent / picture)
    for name, chosen in boards.items():
        typer.echo(f"### {chosen.title}\n\n{chosen.about}\n\n{tables[name]}")
    if failed:
        log.error("%d of %d cells failed: see %s", failed, len(missing), work / "logs")
        raise typer.Exit(1)


def _run(cell: Cell, until: float, *, data: Path, work: Path) -> int | None:
    if time.monotonic() >= until:
        return None
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = work / "cells" / cell.file
    out.parent.mkdir(parents=True, exist_ok=True)
    arguments = {"board": cell.board, "model": cell.model, "seed": cell.seed, "data": data, "work": work, "out": out}
    command = [sys.executable, "-m", "benchmarks.quality.cell", *(text for name, v in arguments.items() for text in (f"--{name}", str(v)))]
    with _log(cell, work).open("w") as text:
        return subprocess.run(command, env=environment, stdout=text, stderr=subprocess.STDOUT, check=False).returncode


def _log(cell: Cell, work: Path) -> Path:
    return work / "logs" / f"{cell.board}-{cell.model}-{cell.seed}.log"


if __name__ == "__main__":
    run(quality)
