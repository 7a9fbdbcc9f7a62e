"""The pipeline for Kubeflow: the same steps and edges as dvc.yaml. `python -m pipelines.kubeflow --help`."""

from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from kfp import compiler, dsl

from components.command import run
from longtrail.config import Config, load_config
from longtrail.errors import ConfigError
from longtrail.files import atomic_file
from pipelines import steps
from pipelines.placing import VOLUME, pinned, placed, placement

# The sections of params.yaml that each step reads: those of the `params` of the stage of the same name in dvc.yaml.
SECTIONS = {
    "ingest": ("dataset", "ingest"),
    "validate": ("validation", "split"),
    "build_features": ("features", "split", "ingest"),  # the engine, its memory and threads
    "train": ("models", "pipeline", "training", "selection", "retrieval"),
    "evaluate": ("evaluation", "retrieval"),
    "select": ("selection", "models", "pipeline", "serving"),
    "ab_test": ("ab_test", "dataset"),  # in a simulated world the truth is reported beside the estimate
    "package": tuple(name for name in Config.model_fields if name != "cluster"),  # their hash is part of the Bento's lineage
}


def settings_of(step: str, config: Config) -> dict[str, Any]:
    """The sections that `step` reads, as plain values."""
    return config.model_dump(mode="json", include=set(SECTIONS[step]), exclude_none=True)


def build(config: Config) -> Any:
    """The pipeline function, placed by `config.cluster` and with `config`'s other sections as the defaults of its parameters.

    Everything stands in an exit handler, so that a report follows a run however it ended. With `cluster.previous`, models go on from those of
    the run before and are left for the next. Raises ConfigError where a step runs Spark and no image with Spark is named.
    """
    cluster = placement(config)
    store = cluster.previous or ""
    if store and "://" not in store:
        store = str(PurePosixPath(VOLUME) / store)

    @dsl.pipeline(name="longtrail", description="Raw log to an A/B-tested recommender, packaged as a Bento", pipeline_root=cluster.pipeline_root)
    def longtrail(
        models: list = list(config.pipeline.models),  # type: ignore[type-arg]  # noqa: B006
        ingest_settings: dict = settings_of("ingest", config),  # type: ignore[type-arg]  # noqa: B008
        validate_settings: dict = settings_of("validate", config),  # type: ignore[type-arg]  # noqa: B008
        build_features_settings: dict = settings_of("build_features", config),  # type: ignore[type-arg]  # noqa: B008
        train_settings: dict = settings_of("train", config),  # type: ignore[type-arg]  # noqa: B008
        evaluate_settings: dict = settings_of("evaluate", config),  # type: ignore[type-arg]  # noqa: B008
        select_settings: dict = settings_of("select", config),  # type: ignore[type-arg]  # noqa: B008
        ab_test_settings: dict = settings_of("ab_test", config),  # type: ignore[type-arg]  # noqa: B008
        package_settings: dict = settings_of("package", config),  # type: ignore[type-arg]  # noqa: B008
    ) -> None:
        run_id, run_name = dsl.PIPELINE_JOB_ID_PLACEHOLDER, dsl.PIPELINE_JOB_NAME_PLACEHOLDER
        report = placed(steps.report(api=cluster.api, run_id=run_id, run_name=run_name), cluster)
        with dsl.ExitHandler(report, name="run"):
            looked = placed(steps.look(settings=ingest_settings), cluster)
            ingested = placed(steps.ingest(settings=ingest_settings, source=looked.output), cluster)
            tables = ingested.outputs["tables"]
            validated = placed(steps.validate(settings=validate_settings, tables=tables), cluster)
            validation = validated.outputs["validation"]
            built = placed(steps.build_features(settings=build_features_settings, tables=tables, validation=validation), cluster)
            features = built.outputs["features"]
            with dsl.ParallelFor(items=models, parallelism=cluster.parallelism, name="models") as model_name:
                trained = placed(steps.train(settings=train_settings, model_name=model_name, previous=store, features=features), cluster)
                evaluated = placed(steps.evaluate(settings=evaluate_settings, model=trained.outputs["model"], features=features), cluster)
            chosen = steps.select(
                settings=select_settings,
                models=dsl.Collected(trained.outputs["model"]),
                evaluations=dsl.Collected(evaluated.outputs["evaluation"]),
            )
            champion = placed(chosen, cluster).outputs["champion"]
            if store:  # after select: models that cannot be judged are not gone on from
                placed(steps.publish(store=store, models=dsl.Collected(trained.outputs["model"])).after(chosen), cluster)
            tested = placed(steps.ab_test(settings=ab_test_settings, tables=tables, features=features, champion=champion), cluster)
            with dsl.If(tested.outputs["Output"] == "win", name="the champion won"):
                packaged = steps.package(
                    settings=package_settings,
                    champion=champion,
                    features=features,
                    tables=tables,
                    validation=validation,
                    report=tested.outputs["report"],
                )
                placed(packaged, cluster)

    return longtrail


def write(config: Config, out: Path) -> None:
    """Compile the pipeline to the file `out`, whole or not at all. Raises ConfigError where its name does not end in .yaml."""
    if out.suffix not in (".yaml", ".json"):
        raise ConfigError(f"{out}: expected a name that ends in .yaml")
    with TemporaryDirectory() as folder:  # the compiler insists on a name that ends in .yaml
        compiled = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(build(config), package_path=str(compiled))
        with atomic_file(out) as aside:
            aside.write_bytes(compiled.read_bytes())


def uncached(config: Config) -> str:
    """A sentence on the steps that are never cached because of their images; empty where there is none."""
    cluster = placement(config)
    moving = sorted({cluster.of(step).image for step in SECTIONS if not pinned(cluster.of(step).image)})
    if not moving or not cluster.caching:
        return ""
    return f"{', '.join(moving)}: a tag that moves, so nothing is taken from the cache; name a version or a digest (cluster.image)"


def compile_pipeline(
    params: Annotated[Path, typer.Option(help="settings; its sections become the defaults of the pipeline's parameters")] = Path("params.yaml"),
    out: Annotated[Path, typer.Option(help="output: the compiled pipeline")] = Path("build/pipeline.yaml"),
) -> None:
    """Compile the pipeline to the YAML that Kubeflow Pipelines runs."""
    config = load_config(params, whole=True)
    write(config, out)
    print(f"{out}: compiled; send it with python -m pipelines.submit, or run it here: see docs/cluster.md")
    if note := uncached(config):
        print(note)


if __name__ == "__main__":
    run(compile_pipeline)
