"""The closing words of a run: the champions beside the baselines, the A/B verdict, where the reports are, how to serve.

`python -m components.summary` prints them; `--markdown` prints the tables as README.md shows them. Whatever is not there is left out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from components.command import run
from longtrail.files import read_json

_COLUMNS = {"retrieval": ("ndcg@10", "recall@10", "mrr", "coverage@10"), "ranking": ("auc", "request_gauc", "gauc", "log_loss")}
_HEADINGS = {"retrieval": "Retrieval", "ranking": "Ranking"}


def summary(
    build: Annotated[Path, typer.Option(help="folder of the pipeline's outputs")] = Path("build"),
    markdown: Annotated[bool, typer.Option(help="tables as Markdown, without the rest")] = False,
) -> None:
    """Say what the last run of the pipeline came to."""
    if markdown:
        print(markdown_results(build))
    else:
        summarise(build)


def summarise(build: Path) -> None:
    """Print the summary of the outputs under `build`; says so where there are none."""
    build = Path(build)
    blocks = [*_stages(build), _ab_test(build), _reports(build), _serve(build)]
    print("\n\n".join(block for block in blocks if block) or f"{build}: no results yet; make run produces them", flush=True)


def markdown_results(build: Path) -> str:
    """The tables of both stages in Markdown, a heading each."""
    evaluations, selection = _evaluations(build), _json(build / "champion" / "selection.json")
    tables = [(stage, *results_table(evaluations, stage, selection)) for stage in _COLUMNS]
    return "\n\n".join(f"**{_HEADINGS[stage]}** (test split)\n\n{markdown_table(head, rows)}" for stage, head, rows in tables if rows)


def results_table(evaluations: list[dict[str, Any]], stage: str, selection: dict[str, Any] | None) -> tuple[list[str], list[list[str]]]:
    """(headers, rows) of a stage's models on the test split, the champion first, then by the first metric that all have."""
    found = [e for e in evaluations if e.get("stage") == stage]
    names = [m for m in _metric_names(found, stage) if any(m in _metrics(e) for e in found)]
    roles = _roles(selection, stage)
    first = names[0] if names else ""
    found.sort(key=lambda e: (roles.get(e["model"]) != "champion", -(_metrics(e).get(first, {}).get("value") or 0.0), e["model"]))
    rows = [[e["model"], roles.get(e["model"], ""), *(_figure(_metrics(e).get(m)) for m in names), _latency(e)] for e in found]
    return ["model", "", *names, "p99 ms"], rows


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by spaces, the first to the left, the others too: intervals are easier to compare by their starts."""
    lines = [list(headers), *map(list, rows)]
    widths = [max(len(line[c]) for line in lines) for c in range(len(headers))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table; bars in cells are escaped."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _stages(build: Path) -> list[str]:
    evaluations, selection = _evaluations(build), _json(build / "champion" / "selection.json")
    blocks = []
    for stage, heading in _HEADINGS.items():
        headers, rows = results_table(evaluations, stage, selection)
        if rows:
            confidence = next(e.get("confidence", 0.95) for e in evaluations if e.get("stage") == stage)
            note = f"{heading}, test split ({confidence:.0%} intervals, resampled by user)"
            reasons = [f"  {name}: {reason}" for name, reason in _losers(selection, stage)]
            blocks.append(
                "\n".join([note, "", *(f"  {line}" for line in text_table(headers, rows).splitlines()), *([""] if reasons else []), *reasons])
            )
    return blocks


def _ab_test(build: Path) -> str:
    report = _json(build / "ab" / "report.json")
    if report is None:
        return ""
    verdict, sentence = str(report.get("verdict", "no verdict")), str(report.get("sentence", ""))
    return f"A/B test: {verdict}" + (f"\n  {sentence}" if sentence else "")


def _reports(build: Path) -> str:
    pages = [
        ("A/B test", build / "ab" / "report.html"),
        ("validation", build / "validation" / "summary.html"),
        *((f"evaluation of {path.parent.name}", path) for path in sorted((build / "evaluations").glob("*/report.html"))),
    ]
    there = [(name, path) for name, path in pages if path.is_file()]
    width = max((len(name) for name, _ in there), default=0)
    return "\n".join(["Reports", *(f"  {name.ljust(width)}  {path}" for name, path in there)]) if there else ""


def _serve(build: Path) -> str:
    if not (build / "bento").is_dir():
        return ""
    return f"Packaged in {build / 'bento'}; serve it on this machine with: make serve"


def _evaluations(build: Path) -> list[dict[str, Any]]:
    """Of the models that were selected from; of all, where nothing was selected yet. A folder left by an earlier run does not count."""
    found = [e for path in sorted((build / "evaluations").glob("*/evaluation.json")) if (e := _json(path)) is not None and "model" in e]
    selection = _json(build / "champion" / "selection.json")
    if selection is None:
        return found
    named = {selection.get("incumbent")}
    for role in ("retriever", "ranker"):
        named |= {selection[role]["name"], *(loser["name"] for loser in selection[role]["losers"])} if role in selection else set()
    return [e for e in found if e["model"] in named]


def _json(path: Path) -> Any:
    """None where the file is missing or not whole: a summary has no business failing."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _metrics(evaluation: dict[str, Any]) -> dict[str, Any]:
    return evaluation.get("splits", {}).get("test", {}).get("metrics", {})


def _metric_names(evaluations: list[dict[str, Any]], stage: str) -> Sequence[str]:
    """The usual ones; where other list lengths were asked for, the same metrics at the smallest."""
    usual = _COLUMNS[stage]
    held = {name for e in evaluations for name in _metrics(e)}
    if stage == "ranking" or "ndcg@10" in held:
        return usual
    ks = sorted(int(name.split("@")[1]) for name in held if name.startswith("ndcg@"))
    return [name.replace("@10", f"@{ks[0]}") for name in usual] if ks else usual


def _roles(selection: dict[str, Any] | None, stage: str) -> dict[str, str]:
    if selection is None:
        return {}
    role = "retriever" if stage == "retrieval" else "ranker"
    roles = {selection["incumbent"]: "incumbent"} if stage == "ranking" and "incumbent" in selection else {}
    return {**roles, selection[role]["name"]: "champion"} if role in selection else roles


def _losers(selection: dict[str, Any] | None, stage: str) -> list[tuple[str, str]]:
    chosen = (selection or {}).get("retriever" if stage == "retrieval" else "ranker", {})
    return [(loser["name"], loser["reason"]) for loser in chosen.get("losers", [])]


def _figure(estimate: dict[str, Any] | None) -> str:
    if estimate is None or estimate.get("value") is None:
        return "–"
    if estimate.get("low") is None:
        return f"{estimate['value']:.4f}"
    return f"{estimate['value']:.4f} ({estimate['low']:.4f}–{estimate['high']:.4f})"


def _latency(evaluation: dict[str, Any]) -> str:
    p99 = evaluation.get("cost", {}).get("latency_ms", {}).get("p99")
    return "–" if p99 is None else f"{p99:.2f}"


if __name__ == "__main__":
    run(summary)
