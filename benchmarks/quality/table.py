"""From cells to a board's table: mean and standard deviation over seeds, and whether a model has learnt anything."""

from typing import Any

import numpy as np

from benchmarks.quality.board import Board

OTHERWISE = "†"  # trained with other settings than the board has now, or on other features than its baseline


def summary(name: str, board: Board, found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Model → {"seeds", "current", "metrics": {name: {"mean", "std"}}, "cpu_minutes", …}; models without a cell are left out, and metrics that a
    split could not tell (null).

    Only cells trained alike are averaged: those of the board's settings and the baseline's features, or, where there are none, those like the first
    seed's.
    """
    features = next((c["features"] for c in found if c["board"] == name and c["model"] == board.baseline and "features" in c), None)
    rows: dict[str, dict[str, Any]] = {}
    for model in board.models:
        cells = _alike(board, features, [c for c in found if c["board"] == name and c["model"] == model])
        if not cells:
            continue
        values = {m: np.array([c["metrics"][m] for c in cells]) for m in board.metrics if all(c["metrics"].get(m) is not None for c in cells)}
        rows[model] = {
            "seeds": len(cells),
            "current": _is_current(board, features, cells[0]),
            "metrics": {m: {"mean": float(v.mean()), "std": float(v.std(ddof=1)) if len(v) > 1 else None} for m, v in values.items()},
            "best_epochs": [c["best_epoch"] for c in cells],
            "epochs": [c["epochs"] for c in cells],
            "cpu_minutes": float(np.mean([c["train_cpu_seconds"] for c in cells]) / 60),
            "resumed": any(c.get("resumed", False) for c in cells),
            "state_bytes": cells[0]["state_bytes"],
            "peak_memory_bytes": max(c["peak_memory_bytes"] for c in cells),
        }
    main = board.metrics[0]
    floor = rows.get(board.baseline, {}).get("metrics", {}).get(main, {}).get("mean")
    for model, row in rows.items():
        row["learnt"] = None if floor is None or model == board.baseline or main not in row["metrics"] else row["metrics"][main]["mean"] > floor
    return rows


def markdown(board: Board, rows: dict[str, dict[str, Any]]) -> str:
    """The table, best first; models that have not been run stand below it."""
    main = board.metrics[0]
    order = sorted(rows, key=lambda model: -rows[model]["metrics"].get(main, {"mean": -np.inf})["mean"])
    published = ["published"] if board.published else []
    lines = [_row(heads := ["model", *board.metrics, *published, "seeds", "best epoch", "CPU min", "MB", "peak MB", ""]), _row(["---"] * len(heads))]
    for model in order:
        row = rows[model]
        figures = [_figure(row["metrics"].get(m)) for m in board.metrics]
        paper = [", ".join(f"{m} {v:g}" for m, v in board.published.get(model, {}).items())] if board.published else []
        learns = not board.models[model].kind.startswith(("popularity", "markov"))
        epochs = f"{_range(row['best_epochs'])} of {_range(row['epochs'])}" if learns else ""
        cost = ("≥ " if row["resumed"] else "") + f"{row['cpu_minutes']:.1f}"
        sizes = [f"{row['state_bytes'] / 1e6:.2f}", f"{row['peak_memory_bytes'] / 1e6:,.0f}"]
        note = f"has learnt nothing that {board.baseline} does not know" if row["learnt"] is False else ""
        lines.append(_row([model + ("" if row["current"] else f" {OTHERWISE}"), *figures, *paper, str(row["seeds"]), epochs, cost, *sizes, note]))
    absent = [model for model in board.models if model not in rows]
    if absent:
        lines += ["", f"Not run: {', '.join(absent)}."]
    return "\n".join([*lines, ""])


def _alike(board: Board, features: str | None, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    current = [c for c in cells if _is_current(board, features, c)]
    return current or [c for c in cells if (c["settings"], c.get("features")) == (cells[0]["settings"], cells[0].get("features"))]


def _is_current(board: Board, features: str | None, cell: dict[str, Any]) -> bool:
    """Cells of before features were digested are believed."""
    return board.is_current(cell) and (features is None or cell.get("features", features) == features)


def _figure(value: dict[str, float | None] | None) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:.4f}" + (f" ± {value['std']:.4f}" if value["std"] is not None else "")


def _range(values: list[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)}–{max(values)}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
