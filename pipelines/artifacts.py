"""Between Kubeflow's artifacts and the steps' folders."""

import csv
import json
import os
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


def scratch_cache() -> Path:
    """Where downloaded datasets are kept: data/ where a run on this machine has it, else the scratch folder, as in a pod with a read-only root."""
    here = Path("data")
    return here if os.access(here, os.W_OK) else Path(tempfile.gettempdir()) / "longtrail-data"


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


def log_classification(artifact: Any, evaluation: Path, split: str = "test") -> None:
    """Show a ranker's ROC curve and confusion matrix as a Kubeflow ClassificationMetrics artifact; of a retriever there is none to show."""
    found = json.loads(evaluation.read_text(encoding="utf-8")).get("classification", {}).get(split)
    if not found:
        return
    for point in found["roc"]:
        artifact.log_roc_data_point(fpr=point["false_positive_rate"], tpr=point["true_positive_rate"], threshold=point["threshold"])
    if found["confusion"]:
        artifact.log_confusion_matrix(["not clicked", "clicked"], found["confusion"]["matrix"])


def describe_model(artifact: Any, folder: Path) -> None:
    """What Kubeflow shows of a Model artifact: kind, weights and lineage."""
    card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    lineage = json.loads((folder / "lineage.json").read_text(encoding="utf-8"))
    artifact.metadata.update(
        name=card["name"],
        stage=card["settings"]["stage"],
        kind=card["settings"]["kind"],
        format="safetensors",
        weights_sha256=card["weights"]["sha256"],
        bytes=card["weights"]["bytes"],
        **{key: value for key, value in lineage.items() if value is not None},
    )


def describe_bento(artifact: Any, folder: Path) -> None:
    """The Bento's labels, its lineage among them, as the metadata that Kubeflow shows."""
    described = yaml.safe_load((folder / "bento.yaml").read_text(encoding="utf-8"))
    artifact.metadata.update({"name": described["name"], "version": described["version"], **described["labels"]})


def log_curve(artifact: Any, curve: Path) -> None:
    """The last row of a learning curve as Kubeflow Metrics; none where nothing was learnt epoch by epoch."""
    rows = _rows(curve)
    for name, value in (rows[-1] if rows else {}).items():
        artifact.log_metric(name, value)


def write_curve_page(artifact: Any, curve: Path, name: str) -> None:
    """A learning curve as a Kubeflow HTML artifact: a panel a figure, over the epochs."""
    from matplotlib.figure import Figure  # seconds to import, and only this page needs it

    from components.report_page import Section, figure_html, page, paragraph, table_html

    rows = _rows(curve)
    names = list(dict.fromkeys(key for row in rows for key in row))
    figures = [key for key in names if key != "epoch"]
    figure = Figure(figsize=(4 * max(len(figures), 1), 3), layout="constrained")
    for place, key in enumerate(figures):
        axes = figure.add_subplot(1, len(figures), place + 1)
        axes.plot([row["epoch"] for row in rows if key in row], [row[key] for row in rows if key in row], "o-", markersize=4)
        axes.set(title=key, xlabel="epoch")
    html = figure_html(figure, "learning curve") + table_html(names, [[row.get(k, "") for k in names] for row in rows]) if figures else ""
    target = Path(artifact.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(name, [Section("Learning curve", html or paragraph("It counts; there are no epochs."))]), encoding="utf-8")


def _rows(curve: Path) -> list[dict[str, float]]:
    if not curve.is_file():
        return []
    with curve.open(newline="", encoding="utf-8") as text:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(text)]


def gather(artifacts: list[Any], folder: Path) -> Path:
    """Lay the artifacts of a parallel loop out as one folder of folders, as DVC has them, each by the name of its model."""
    folder.mkdir(parents=True)
    for artifact in artifacts:
        source = Path(artifact.path)
        card = json.loads(next(p for p in (source / "model.json", source / "evaluation.json") if p.is_file()).read_text(encoding="utf-8"))
        name = card["name"] if "name" in card else card["model"]
        shutil.copytree(source, folder / name)
    return folder
