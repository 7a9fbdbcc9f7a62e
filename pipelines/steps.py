"""The pipeline's steps as Kubeflow components: each only hands paths to the function of the same name in `components/`.

Kubeflow ships the source of these functions, so each imports what it needs inside. `settings` holds the sections of params.yaml that the
step depends on, the same that `dvc.yaml` lists for it: a changed section reruns (and un-caches) only the steps that read it. `look`, `publish` and
`report` have no stage in dvc.yaml: on one machine DVC, and pipelines/local.py, see the files themselves.
"""

from kfp import dsl
from kfp.dsl import HTML, Artifact, ClassificationMetrics, Dataset, Input, Metrics, Model, Output

from longtrail.config import ClusterSettings

IMAGE = ClusterSettings().image


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def look(settings: dict) -> str:  # type: ignore[type-arg]
    """What the raw log looks like now, so that `ingest` reads it again if, and only if, something came or changed."""
    from longtrail.config import parse_config
    from pipelines.attempts import attempt
    from pipelines.source import state

    return attempt(state, dataset=parse_config(settings).dataset)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ingest(settings: dict, source: str, tables: Output[Dataset], counts: Output[Metrics]):  # type: ignore[type-arg]
    """The raw log to the four tables. `source` only tells caching that the log has changed."""
    from pathlib import Path

    from components.ingest import ingest as step
    from pipelines.artifacts import log_metrics, scratch_cache, settings_file
    from pipelines.attempts import attempt

    attempt(step, params=settings_file(settings), tables=Path(tables.path), cache=scratch_cache())
    log_metrics(counts, Path(tables.path) / "counts.json")


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def validate(
    settings: dict,  # type: ignore[type-arg]
    tables: Input[Dataset],
    validation: Output[Artifact],
    metrics: Output[Metrics],
    page: Output[HTML],
):
    """Judges the tables. A failed verdict ends this task well, because Kubeflow keeps nothing of a failed one and its report must be seen; it is
    build_features that refuses such tables, and nothing else follows."""
    import json
    from pathlib import Path

    from components.validate import validate as step
    from longtrail.errors import ValidationError
    from pipelines.artifacts import copy_page, settings_file
    from pipelines.attempts import attempt

    out = Path(validation.path)
    try:
        attempt(step, tables=Path(tables.path), params=settings_file(settings), validation=out)
    except ValidationError as error:
        print(f"error: {error}")
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    metrics.log_metric("success", float(result["success"]))
    metrics.log_metric("critical_failures", float(result["critical_failures"]))
    metrics.log_metric("warnings", float(result["warnings"]))
    copy_page(out / "summary.html", page)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def build_features(settings: dict, tables: Input[Dataset], validation: Input[Artifact], features: Output[Dataset]):  # type: ignore[type-arg]
    """Tables to history store, point-in-time examples and the online store. Refuses tables that did not pass validation."""
    from pathlib import Path

    from components.build_features import build_features as step
    from pipelines.artifacts import settings_file
    from pipelines.attempts import attempt

    attempt(
        step,
        tables=Path(tables.path),
        validation=Path(validation.path),
        params=settings_file(settings),
        features=Path(features.path),
    )


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    settings: dict,  # type: ignore[type-arg]
    model_name: str,
    previous: str,
    features: Input[Dataset],
    model: Output[Model],
    metrics: Output[Metrics],
    page: Output[HTML],
):
    """One model. With `previous`, the store of earlier runs' models, it goes on from the newest of the same settings."""
    import tempfile
    from pathlib import Path

    from pipelines.artifacts import describe_model, log_curve, write_curve_page
    from pipelines.attempts import attempt
    from pipelines.continuing import train_or_continue

    out = Path(model.path)
    with tempfile.TemporaryDirectory() as scratch:
        attempt(
            train_or_continue,
            settings=settings,
            name=model_name,
            store=previous,
            features=Path(features.path),
            out=out,
            scratch=Path(scratch),
        )
    describe_model(model, out)
    log_curve(metrics, out / "learning_curve.csv")
    write_curve_page(page, out / "learning_curve.csv", model_name)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    settings: dict,  # type: ignore[type-arg]
    model: Input[Model],
    features: Input[Dataset],
    evaluation: Output[Artifact],
    metrics: Output[Metrics],
    classification: Output[ClassificationMetrics],
    page: Output[HTML],
):
    """One model's unsampled metrics, with intervals and slices; of a ranker its ROC curve and confusion matrix on the test split."""
    from pathlib import Path

    from components.evaluate import evaluate as step
    from pipelines.artifacts import copy_page, log_classification, log_metrics, settings_file
    from pipelines.attempts import attempt

    out = Path(evaluation.path)
    attempt(step, model=Path(model.path), features=Path(features.path), params=settings_file(settings), out=out)
    log_metrics(metrics, out / "metrics.json")
    log_classification(classification, out / "evaluation.json")
    copy_page(out / "report.html", page)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def select(
    settings: dict,  # type: ignore[type-arg]
    models: Input[list[Model]],
    evaluations: Input[list[Artifact]],
    champion: Output[Model],
    metrics: Output[Metrics],
):
    """The champions, under the budgets."""
    import json
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from components.select import select as step
    from pipelines.artifacts import gather, settings_file
    from pipelines.attempts import attempt

    with TemporaryDirectory() as folder:
        trained = gather(models, Path(folder) / "models")
        names = sorted(path.name for path in trained.iterdir())  # those of this run's parameter `models`
        attempt(
            step,
            models=trained,
            evaluations=gather(evaluations, Path(folder) / "evaluations"),
            params=settings_file({**settings, "pipeline": {"models": names}}),
            champion=Path(champion.path),
        )
    selection = json.loads((Path(champion.path) / "selection.json").read_text(encoding="utf-8"))
    champion.metadata["incumbent"] = selection["incumbent"]
    for role in ("retriever", "ranker"):
        champion.metadata[role] = selection[role]["name"]
        metrics.log_metric(f"{role}.{selection[role]['metric']}", selection[role]["value"])


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ab_test(
    settings: dict,  # type: ignore[type-arg]
    tables: Input[Dataset],
    features: Input[Dataset],
    champion: Input[Model],
    report: Output[Artifact],
    metrics: Output[Metrics],
    page: Output[HTML],
) -> str:
    """Champion against incumbent, offline. Returns the verdict."""
    import json
    from pathlib import Path

    from components.ab_test import ab_test as step
    from pipelines.artifacts import copy_page, log_metrics, settings_file
    from pipelines.attempts import attempt

    out = Path(report.path)
    attempt(
        step,
        tables=Path(tables.path),
        features=Path(features.path),
        champion=Path(champion.path),
        params=settings_file(settings),
        report=out,
    )
    log_metrics(metrics, out / "metrics.json")
    copy_page(out / "report.html", page)
    return json.loads((out / "report.json").read_text())["verdict"]


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def package(
    settings: dict,  # type: ignore[type-arg]
    champion: Input[Model],
    features: Input[Dataset],
    tables: Input[Dataset],
    validation: Input[Artifact],
    report: Input[Artifact],
    bento: Output[Model],
):
    """The winner as a Bento."""
    from pathlib import Path

    from components.package import package as step
    from pipelines.artifacts import describe_bento, settings_file
    from pipelines.attempts import attempt

    attempt(
        step,
        champion=Path(champion.path),
        features=Path(features.path),
        tables=Path(tables.path),
        validation=Path(validation.path),
        report=Path(report.path),
        params=settings_file(settings),
        bento=Path(bento.path),
    )
    describe_bento(bento, Path(bento.path))


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def publish(store: str, models: Input[list[Model]]):
    """The run's models to where the next run goes on from them."""
    from pathlib import Path

    from pipelines.attempts import attempt
    from pipelines.previous import publish as step

    for place in attempt(step, models=[Path(model.path) for model in models], store=store):
        print(place)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report(api: str, run_id: str, run_name: str, page: Output[HTML]):
    """What ran, what failed, where the reports are: after the run, however it ended."""
    from pathlib import Path

    from pipelines.run_report import tell

    tell(api=api, run_id=run_id, name=run_name, out=Path(page.path), uri=page.uri)
