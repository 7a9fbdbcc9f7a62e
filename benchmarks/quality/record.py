"""Where cells are kept: one JSON file each while a board is being run, one JSON of all that is recorded, and the tables of a page."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.board import Board, Cell
from longtrail.commits import short_commit
from longtrail.errors import ConfigError
from longtrail.files import atomic_file

DIGITS = {"metrics": 5, "valid": 5, "train_cpu_seconds": 1, "train_seconds": 1}


def to_run(wanted: Iterable[Cell], boards: Mapping[str, Board], work: Path) -> list[Cell]:
    """The cells that are not there, or were trained with other settings than the board has now."""
    return [cell for cell in wanted if not _is_done(work / "cells" / cell.file, boards[cell.board])]


def read_cells(boards: Mapping[str, Board], work: Path, results: Path) -> list[dict[str, Any]]:
    """Every cell of `boards` under `work`, and those of `results` that a newer one does not stand in for, in order.

    Cells of another protocol than their board's now (other data, another split) are left out: nothing could be compared with them. A cell of `work`
    whose model has other settings now gives way to one of `results` that has not.
    """
    recorded = json.loads(results.read_text())["cells"] if results.exists() else []
    trained = [json.loads(path.read_text()) for path in sorted((work / "cells").glob("*/*.json"))]
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for cell in (*recorded, *trained):
        key, board = (cell["board"], cell["model"], cell["seed"]), boards.get(cell["board"])
        if board is None or cell["model"] not in board.models or cell.get("protocol") != board.protocol:
            continue
        if key not in found or board.is_current(cell) or not board.is_current(found[key]):
            found[key] = _rounded(cell)
    return [found[key] for key in sorted(found)]


def write_results(path: Path, document: Mapping[str, Any]) -> None:
    """`document` as JSON with a line for each of its cells, so that two versions can be compared by line."""
    cells = ",\n".join(json.dumps(cell, sort_keys=True) for cell in document["cells"])
    head = json.dumps({name: value for name, value in document.items() if name != "cells"})
    with atomic_file(path) as aside:
        aside.write_text(f'{head[:-1]}, "cells": [\n{cells}\n]}}\n', encoding="utf-8")


def with_tables(text: str, tables: Mapping[str, str], *, name: str) -> str:
    """`text` of a page with the table between `<!-- board: NAME -->` and `<!-- end -->` renewed, for each of `tables` that it has.

    Raises ConfigError if the page `name` names a board that there is not.
    """

    def renew(match: re.Match[str]) -> str:
        board = match.group(1)
        if board not in tables:
            raise ConfigError(f"{name}: <!-- board: {board} -->: no such board; expected one of {', '.join(tables)}")
        return f"<!-- board: {board} -->\n\n{tables[board].strip()}\n\n<!-- end -->"

    return re.sub(r"<!-- board: ([\w-]+) -->\n.*?<!-- end -->", renew, text, flags=re.DOTALL)


def _is_done(path: Path, board: Board) -> bool:
    return path.exists() and board.is_current(json.loads(path.read_text()))


def _rounded(cell: dict[str, Any]) -> dict[str, Any]:
    commit = {"commit": short_commit(cell["commit"])} if cell.get("commit") else {}
    return {**cell, **{name: _digits(cell[name], digits) for name, digits in DIGITS.items() if name in cell}, **commit}


def _digits(value: Any, digits: int) -> Any:
    """A metric that a split cannot tell is null."""
    if isinstance(value, dict):
        return {name: _digits(v, digits) for name, v in value.items()}
    return None if value is None else round(value, digits)
