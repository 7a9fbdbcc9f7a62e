"""The rankers of a live experiment, packaged beside the one that the A/B verdict chose: `artifacts/arms/NAME`, each with its own parity file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longtrail.config import ExperimentSettings
from longtrail.errors import ModelError

ARMS = "arms"


def sources(experiment: ExperimentSettings, choice: dict[str, Any], champion: Path) -> dict[str, Path]:
    """Name to folder of every ranker that an arm or the shadow needs, less the packaged one. Raises ModelError for one that is not there."""
    labels = choice["labels"]
    roles = {"packaged": labels["ranker"], "champion": labels["champion"], "incumbent": labels["incumbent"]}
    folders = {labels["champion"]: champion / "ranker", labels["incumbent"]: champion / "incumbent"}
    wanted = dict.fromkeys(roles.get(model, model) for model in experiment.models)
    found = {name: folders.get(name, champion / ARMS / name) for name in wanted if name != labels["ranker"]}
    for name, folder in found.items():
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such folder; expected the ranker {name!r} that serving.experiment names, as select writes it")
    return found


def write_arms(artifacts: Path, found: dict[str, Path], write_parity: Callable[[Path, Path], None]) -> None:
    """Copy each ranker; `write_parity(file, ranker)` writes its requests with their offline scores."""
    for name, source in found.items():
        target = artifacts / ARMS / name
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("dvclive"))
        write_parity(target / "parity.parquet", source)
