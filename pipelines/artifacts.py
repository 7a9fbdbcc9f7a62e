"""Between Kubeflow's artifacts and the steps' folders."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml


def settings_file(settings: dict[str, Any]) -> Path:
    """A params.yaml that holds these sections; every other section has its default."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False, encoding="utf-8") as file:
        yaml.safe_dump(settings, file)
    return Path(file.name)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers by dotted name; what is not a number is left out."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = float(value)
    return found


def log_metrics(artifact: Any, metrics: Path) -> None:
    """Show a step's JSON figures as a Kubeflow Metrics artifact."""
    for name, value in flat(json.loads(metrics.read_text(encoding="utf-8"))).items():
        artifact.log_metric(name, value)


def copy_page(page: Path, artifact: Any) -> None:
    """Show a step's HTML page as a Kubeflow HTML artifact, where the step got as far as writing one."""
    if page.is_file():
        target = Path(artifact.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, target)


def gather(artifacts: list[Any], folder: Path) -> Path:
    """Lay the artifacts of a parallel loop out as one folder of folders, as DVC has them, each by the name of its model."""
    folder.mkdir(parents=True)
    for artifact in artifacts:
        source = Path(artifact.path)
        card = json.loads(next(p for p in (source / "model.json", source / "evaluation.json") if p.is_file()).read_text(encoding="utf-8"))
        name = card["name"] if "name" in card else card["model"]
        shutil.copytree(source, folder / name)
    return folder
