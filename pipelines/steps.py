"""The pipeline's steps as Kubeflow components: each only hands paths to the function of the same name in `components/`.

Kubeflow ships the source of these functions, so each imports what it needs inside. `settings` holds the sections of params.yaml that the
step depends on, the same that `dvc.yaml` lists for it: a changed section reruns (and un-caches) only the steps that read it.
"""

from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from longtrail.config import ClusterSettings

IMAGE = ClusterSettings().image
DATA_STEPS = ("ingest", "validate", "build_features")  # what the Dockerfile's target `data` has the packages for
STORE_STEPS = ("build_features", "package")  # what opens the online store


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ingest(settings: dict, tables: Output[Dataset], counts: Output[Metrics]):  # type: ignore[type-arg]
    """The raw log to the four tables."""
    from pathlib import Path

    from components.ingest import ingest as step
    from pipelines.artifacts import log_metrics, settings_file

    step(params=settings_file(settings), tables=Path(tables.path))
    log_metrics(counts, Path(tables.path) / "counts.json")


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def validate(settings: dict, tables: Input[Dataset], validation: Output[Artifact], page: Output[HTML]):  # type: ignore[type-arg]
    """Stops the pipeline where a critical expectation fails."""
    from pathlib import Path

    from components.validate import validate as step
    from pipelines.artifacts import copy_page, settings_file

    try:
        step(tables=Path(tables.path), params=settings_file(settings), validation=Path(validation.path))
    finally:
        copy_page(Path(validation.path) / "summary.html", page)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def build_features(settings: dict, tables: Input[Dataset], validation: Input[Artifact], features: Output[Dataset]):  # type: ignore[type-arg]
    """Tables to history store, point-in-time examples and the online store."""
    from pathlib import Path

    from components.build_features import build_features as step
    from pipelines.artifacts import settings_file

    step(
        tables=Path(tables.path),
        validation=Path(validation.path),
        params=settings_file(settings),
        features=Path(features.path),
    )


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(settings: dict, model_name: str, features: Input[Dataset], model: Output[Model]):  # type: ignore[type-arg]
    """One model."""
    import tempfile
    from pathlib import Path

    from components.train import train as step
    from pipelines.artifacts import settings_file

    with tempfile.TemporaryDirectory() as checkpoints:
        step(
            features=Path(features.path),
            params=settings_file(settings),
            model=model_name,
            out=Path(model.path),
            checkpoints=Path(checkpoints),
        )
    model.metadata["name"] = model_name


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    settings: dict,  # type: ignore[type-arg]
    model: Input[Model],
    features: Input[Dataset],
    evaluation: Output[Artifact],
    metrics: Output[Metrics],
    page: Output[HTML],
):
    """One model's unsampled metrics, with intervals and slices."""
    from pathlib import Path

    from components.evaluate import evaluate as step
    from pipelines.artifacts import copy_page, log_metrics, settings_file

    out = Path(evaluation.path)
    step(model=Path(model.path), features=Path(features.path), params=settings_file(settings), out=out)
    log_metrics(metrics, out / "metrics.json")
    copy_page(out / "report.html", page)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def select(settings: dict, models: Input[list[Model]], evaluations: Input[list[Artifact]], champion: Output[Model]):  # type: ignore[type-arg]
    """The champions, under the budgets."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from components.select import select as step
    from pipelines.artifacts import gather, settings_file

    with TemporaryDirectory() as folder:
        trained = gather(models, Path(folder) / "models")
        names = sorted(path.name for path in trained.iterdir())  # those of this run's parameter `models`
        step(
            models=trained,
            evaluations=gather(evaluations, Path(folder) / "evaluations"),
            params=settings_file({**settings, "pipeline": {"models": names}}),
            champion=Path(champion.path),
        )


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

    out = Path(report.path)
    step(
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
    bento: Output[Artifact],
):
    """The winner as a Bento."""
    from pathlib import Path

    from components.package import package as step
    from pipelines.artifacts import settings_file

    step(
        champion=Path(champion.path),
        features=Path(features.path),
        tables=Path(tables.path),
        validation=Path(validation.path),
        report=Path(report.path),
        params=settings_file(settings),
        bento=Path(bento.path),
    )


def placed(task: dsl.PipelineTask, cluster: ClusterSettings, *, gpu: bool = False) -> Any:
    """Image, retries and resources of one task, from the settings' `cluster` section."""
    task.set_container_image((cluster.data_image or cluster.image) if task.name.replace("-", "_") in DATA_STEPS else cluster.image)
    task.set_cpu_limit(cluster.cpu).set_memory_limit(cluster.memory)
    task.set_retry(num_retries=cluster.retries, backoff_duration="30s", backoff_factor=2.0)
    if cluster.redis_secret and task.name.replace("-", "_") in STORE_STEPS:
        kubernetes.use_secret_as_env(task, secret_name=cluster.redis_secret, secret_key_to_env={"password": "REDIS_PASSWORD"})
    if gpu and cluster.gpus:
        task.set_accelerator_type(cluster.gpu_type).set_accelerator_limit(cluster.gpus)
    return task
