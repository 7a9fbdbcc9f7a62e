"""The two graphs of the pipeline, DVC's and Kubeflow's, are the same, edge by edge and setting by setting."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp import compiler
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec

from longtrail.config import Config, load_config, parse_config
from pipelines.kubeflow import SECTIONS, build, compile_pipeline

ROOT = Path(__file__).parents[2]
Edges = set[tuple[str, str]]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(ROOT / "params.yaml")


@pytest.fixture(scope="module")
def compiled(config: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compiler.Compiler().compile(build(config), package_path=str(path))
    return next(iter(yaml.safe_load_all(path.read_text())))


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def paths_of(entries: list[Any]) -> list[str]:
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def dvc_edges(stages: dict[str, Any]) -> Edges:
    """(producer, consumer) for each dependency that lies in, or holds, another stage's output."""

    def plain(path: str) -> Path:
        return Path(path.replace("/${item.model}", "/*"))

    outputs = {plain(out): name for name, stage in stages.items() for kind in ("outs", "metrics", "plots") for out in paths_of(stage.get(kind, []))}
    return {
        (producer, consumer)
        for consumer, stage in stages.items()
        for dependency in map(plain, stage.get("deps", []))
        for output, producer in outputs.items()
        if output == dependency or dependency in output.parents or output in dependency.parents
    }


def kubeflow_edges(spec: dict[str, Any]) -> Edges:
    """(producer, consumer) for each artifact that a task is given, followed through loops and conditions."""
    components = spec["components"]
    edges: Edges = set()

    def produced_by(dag: dict[str, Any], task: str, key: str) -> str:
        component = components[dag["tasks"][task]["componentRef"]["name"]]
        if "dag" not in component:
            return task
        (selector,) = component["dag"]["outputs"]["artifacts"][key]["artifactSelectors"]
        return produced_by(component["dag"], selector["producerSubtask"], selector["outputArtifactKey"])

    def walk(dag: dict[str, Any], given: dict[str, str]) -> None:
        for name, task in dag["tasks"].items():
            sources = {}
            for key, source in task.get("inputs", {}).get("artifacts", {}).items():
                if "componentInputArtifact" in source:
                    sources[key] = given[source["componentInputArtifact"]]
                else:
                    output = source["taskOutputArtifact"]
                    sources[key] = produced_by(dag, output["producerTask"], output["outputArtifactKey"])
            component = components[task["componentRef"]["name"]]
            if "dag" in component:
                walk(component["dag"], sources)
            else:
                edges.update((producer, name) for producer in sources.values())

    walk(spec["root"]["dag"], {})
    named = {(a.replace("-", "_"), b.replace("-", "_")) for a, b in edges}
    return {edge for edge in named if edge[1] in SECTIONS}  # `publish` stands beside the steps


def test_the_edges_are_equal(stages: dict[str, Any], compiled: dict[str, Any]) -> None:
    edges = dvc_edges(stages)
    assert edges == kubeflow_edges(compiled)
    assert ("train", "evaluate") in edges and ("ab_test", "package") in edges and len(edges) >= 15


def test_each_step_reads_the_same_settings(stages: dict[str, Any]) -> None:
    assert set(stages) == set(SECTIONS)
    for name, stage in stages.items():
        in_dvc = {parameter.split(".")[0] for parameter in stage["params"]}
        if "matrix" in stage:
            in_dvc |= {"pipeline"} & set(SECTIONS[name])  # the list that the matrix runs over
        assert in_dvc == set(SECTIONS[name]), name


def test_the_commands_use_options_that_their_step_has(stages: dict[str, Any]) -> None:
    """A step's function and its dvc.yaml command cannot drift apart; the Kubeflow wrappers are run to the end in tests/end_to_end."""
    import importlib
    import inspect

    for name, stage in stages.items():
        step = getattr(importlib.import_module(f"components.{name}"), name)
        options = {f"--{parameter.replace('_', '-')}" for parameter in inspect.signature(step).parameters}
        in_command = {word for word in stage["cmd"].split() if word.startswith("--")}
        assert in_command <= options, name
        assert f"components.{name} " in stage["cmd"]


def test_a_stage_depends_on_the_code_it_runs(stages: dict[str, Any]) -> None:
    for name, stage in stages.items():
        assert f"components/{name}.py" in stage["deps"], name
        for dependency in stage["deps"]:
            if not dependency.startswith("build/"):
                assert (ROOT / dependency).exists(), f"{name}: {dependency} is not there"


def test_it_is_a_valid_pipeline(compiled: dict[str, Any]) -> None:
    json_format.ParseDict(compiled, PipelineSpec())


def test_models_train_in_parallel_and_packaging_waits_for_a_win(compiled: dict[str, Any]) -> None:
    tasks = tasks_of(compiled)
    loop = tasks["for-loop-2"]
    assert loop["iteratorPolicy"]["parallelismLimit"] == 2 and loop["parameterIterator"]["items"]["inputParameter"].endswith("models")
    (condition,) = [task for task in tasks.values() if "condition" in task.get("triggerPolicy", {})]
    assert "== 'win'" in condition["triggerPolicy"]["condition"]
    packaging = compiled["components"][condition["componentRef"]["name"]]["dag"]["tasks"]
    assert list(packaging) == ["package"] and "package" not in compiled["components"]["comp-exit-handler-1"]["dag"]["tasks"]


def tasks_of(compiled: dict[str, Any]) -> dict[str, Any]:
    """Every task of the pipeline, at whatever depth."""
    dags = [compiled["root"]["dag"], *(c["dag"] for c in compiled["components"].values() if "dag" in c)]
    return {name: task for dag in dags for name, task in dag["tasks"].items()}


def test_the_password_of_the_online_store_is_given_by_reference_to_the_steps_that_open_it() -> None:
    plain = json_format.MessageToDict(build(parse_config({})).platform_spec)["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert not any("secretAsEnv" in executor for executor in plain.values())
    placed = json_format.MessageToDict(build(parse_config({"cluster": {"image": "longtrail:1", "redis_secret": "the-secret"}})).platform_spec)
    executors = placed["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(executors) == {"exec-build-features", "exec-package"}
    for executor in executors.values():
        (secret,) = executor["secretAsEnv"]
        assert secret["keyToEnv"] == [{"secretKey": "password", "envVar": "REDIS_PASSWORD"}] and "the-secret" in str(secret)


def test_without_gpus_none_is_asked_for(compiled: dict[str, Any]) -> None:
    executors = compiled["deploymentSpec"]["executors"]
    assert all("accelerator" not in e["container"]["resources"] for e in executors.values())


def test_the_compiled_file_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "pipeline.yaml"
    compile_pipeline(ROOT / "params.yaml", out)
    compiled = next(iter(yaml.safe_load_all(out.read_text())))
    assert json_format.ParseDict(compiled, PipelineSpec()).pipeline_info.name == "longtrail"
    assert list(tmp_path.iterdir()) == [out]
