"""Step `select`: from all evaluations to the folder of champions."""

import logging
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from components.command import run
from longtrail.config import load_config
from longtrail.errors import EvaluationError
from longtrail.files import atomic_directory, read_json, write_json

log = logging.getLogger("select")


def select(
    models: Annotated[Path, typer.Option(help="folder of model folders, written by train")] = Path("build/models"),
    evaluations: Annotated[Path, typer.Option(help="folder of evaluation folders, written by evaluate")] = Path("build/evaluations"),
    params: Annotated[Path, typer.Option(help="settings")] = Path("params.yaml"),
    champion: Annotated[Path, typer.Option(help="folder to write")] = Path("build/champion"),
) -> None:
    """Choose the champion retriever and ranker: best metric on the validation split within the budgets. Says why each other lost.

    Rankers that `serving.experiment` names are put beside them, for packaging.
    """
    from longtrail.selection import ROLES
    from longtrail.selection import select as choose

    config = load_config(params)
    found = {name: _evaluation(models / name, evaluations / name) for name in config.pipeline.models}
    selection = choose(found, config.selection)
    with atomic_directory(champion) as folder:
        for role in ROLES.values():
            _copy(models / selection[role]["name"], folder / role)
        _copy(models / selection["incumbent"], folder / "incumbent")
        for name in config.serving.experiment.models:
            if name in config.models:  # else a role: one of those above
                _copy(models / name, folder / "arms" / name)
        write_json(folder / "selection.json", selection)
    for role in ROLES.values():
        chosen = selection[role]
        log.info("%s: %s, %s %.4f on the validation split", role, chosen["name"], chosen["metric"], chosen["value"])
        for loser in chosen["losers"]:
            log.info("  not %s: %s", loser["name"], loser["reason"])


def _copy(model: Path, to: Path) -> None:
    """The model itself; learning curves stay behind."""
    to.mkdir(parents=True)
    for name in ("model.safetensors", "model.json", "lineage.json"):
        if (model / name).is_file():
            shutil.copyfile(model / name, to / name)


def _evaluation(model: Path, evaluation: Path) -> dict[str, Any]:
    """The model's evaluation, of these very weights."""
    try:
        found = read_json(evaluation / "evaluation.json")
        card = read_json(model / "model.json")
    except FileNotFoundError as error:
        raise EvaluationError(f"{error.filename}: no such file; expected every model of pipeline.models trained and evaluated") from None
    except ValueError as error:
        raise EvaluationError(f"{evaluation} or {model}: not JSON: {error}") from None
    if found.get("weights") != card["weights"]["sha256"]:
        raise EvaluationError(f"{evaluation / 'evaluation.json'}: judges other weights than those in {model}; run evaluate again")
    return found


if __name__ == "__main__":
    run(select)
