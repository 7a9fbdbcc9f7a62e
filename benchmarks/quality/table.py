"""From cells to a board's table: mean and standard deviation over seeds, and whether a model has learnt anything."""

from typing import Any

import numpy as np

from benchmarks.quality.board import Board


def summary(name: str, board: Board, found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Model → {"seeds", "metrics": {name: {"mean", "std"}}, "cpu_minutes", "state_bytes", "learnt"}; models without a cell are left out."""
    rows: dict[str, dict[str, Any]] = {}
    for model in board.models:
        cells = [c for c in found if c["board"] == name and c["model"] == model]
        if not cells:
            continue
        values = {m: np.array([c["metrics"][m] for c in cells]) for m in board.metrics if m in cells[0]["metrics"]}
        rows[model] = {
            "seeds": len(cells),
            "metrics": {m: {"mean": float(v.mean()), "std": float(v.std(ddof=1)) if len(v) > 1 else None} for m, v in values.items()},
            "cpu_minutes": float(np.mean([c["train_cpu_seconds"] for c in cells]) / 60),
            "state_bytes": cells[0]["state_bytes"],
        }
    main = board.metrics[0]
    floor = rows.get(board.baseline, {}).get("metrics", {}).get(main, {}).get("mean")
    for model, row in rows.items():
        row["learnt"] = None if floor is None or model == board.baseline else row["metrics"][main]["mean"] > floor
    return rows


def markdown(board: Board, rows: dict[str, dict[str, Any]]) -> str:
    """The table, best first; models that have not been run stand below it."""
    main = board.metrics[0]
    order = sorted(rows, key=lambda model: -rows[model]["metrics"][main]["mean"])
    heads = ["model", *board.metrics, "published", "seeds", "CPU min", "MB", ""]
    lines = [f"### {board.title}", "", board.about, "", _row(heads), _row(["---"] * len(heads))]
    for model in order:
        row = rows[model]
        figures = [_figure(row["metrics"].get(m)) for m in board.metrics]
        paper = ", ".join(f"{m} {v:g}" for m, v in board.published.get(model, {}).items()) or ""
        note = f"has learnt nothing that {board.baseline} does not know" if row["learnt"] is False else ""
        lines.append(_row([model, *figures, paper, str(row["seeds"]), f"{row['cpu_minutes']:.1f}", f"{row['state_bytes'] / 1e6:.2f}", note]))
    absent = [model for model in board.models if model not in rows]
    if absent:
        lines += ["", f"Not run: {', '.join(absent)}."]
    return "\n".join([*lines, ""])


def _figure(value: dict[str, float | None] | None) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:.4f}" + (f" ± {value['std']:.4f}" if value["std"] is not None else "")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
