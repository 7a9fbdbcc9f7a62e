"""The compiled pipeline asks, step by step, for what the settings say; what it may reuse, and how often it tries."""

import importlib
import inspect
import re
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig

from longtrail.config import ClusterSettings, Config, Settings, parse_config
from longtrail.config.cluster import STEPS
from longtrail.errors import ConfigError
from pipelines.kubeflow import SECTIONS, settings_of, uncached, write
from pipelines.placing import pinned
from pipelines.steps import ClassificationMetrics
from tests.pipelines.test_graph import tasks_of

DIGEST = "@sha256:" + "0123456789abcdef" * 4
CLUSTER: dict[str, Any] = {
    "image": "registry.example:5000/longtrail-train:1.4",
    "data_image": f"registry.example:5000/longtrail-data{DIGEST}",
    "gpus": 1,
    "memory": "16G",
    "labels": {"team": "shop"},
    "tolerations": [{"key": "batch", "value": "yes", "effect": "NoSchedule"}],
    "retries": 3,
    "retry_wait_s": 5,
    "pipeline_root": "s3://longtrail/kubeflow",
    "webhook_secret": "hook",
    "storage_secret": "store",
    "previous": "models",
    "claim": "shared",
    "api": "http://api.example:8888",
    "steps": {
        "train": {
            "gpus": 4,
            "gpu_type": "amd.com/gpu",
            "cpu": "16",
            "memory": "128Gi",
            "node_selector": {"gpu": "mi300"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "labels": {"queue": "gpu"},
        },
        "ab_test": {"image": "registry.example/other:latest", "cpu": "500m"},
        "evaluate": {"gpus": 1},
    },
}


def compiled(folder: Path, **cluster: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(pipeline, containers by step, what Kubernetes is told by step)."""
    write(parse_config({"cluster": cluster}), folder / "pipeline.yaml")
    spec, *platform = yaml.safe_load_all((folder / "pipeline.yaml").read_text())
    kubernetes = platform[0]["platforms"]["kubernetes"]["deploymentSpec"]["executors"] if platform else {}
    for executor in kubernetes.values():
        json_format.ParseDict(executor, KubernetesExecutorConfig())

    def by_step(executors: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix("exec-").replace("-", "_"): executor for name, executor in executors.items()}

    return spec, {step: e["container"] for step, e in by_step(spec["deploymentSpec"]["executors"]).items()}, by_step(kubernetes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    return compiled(tmp_path_factory.mktemp("whole"), **CLUSTER)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    return compiled(tmp_path_factory.mktemp("plain"), pod_retries=2)


def test_every_step_that_settings_may_name_is_a_task(whole: Any, plain: Any) -> None:
    assert set(whole[1]) == set(STEPS) == set(SECTIONS) | {"look", "publish", "report"}
    assert set(plain[1]) == set(STEPS) - {"publish"}


def test_resources_are_the_step_s_own_over_the_cluster_s(whole: Any) -> None:
    asked = {step: container["resources"] for step, container in whole[1].items()}
    train = asked["train"]
    assert (train["resourceCpuLimit"], train["resourceMemoryLimit"], train["resourceMemoryRequest"]) == ("16", "128Gi", "128Gi")
    assert (train["accelerator"]["resourceType"], train["accelerator"]["resourceCount"]) == ("amd.com/gpu", "4")
    assert (asked["evaluate"]["accelerator"]["resourceType"], asked["evaluate"]["accelerator"]["resourceCount"]) == ("nvidia.com/gpu", "1")
    assert {step for step, resources in asked.items() if "accelerator" in resources} == {"train", "evaluate"}
    assert asked["ab_test"]["resourceCpuLimit"] == "500m" and asked["select"]["resourceCpuLimit"] == "2"
    assert {step for step, resources in asked.items() if resources["resourceMemoryLimit"] == "16G"} == set(STEPS) - {"train", "look", "report"}


def test_images_are_the_step_s_own_over_the_cluster_s(whole: Any) -> None:
    images = {step: container["image"] for step, container in whole[1].items()}
    assert {step for step, image in images.items() if image == CLUSTER["data_image"]} == {"look", "ingest", "validate", "build_features", "report"}
    assert images["ab_test"] == "registry.example/other:latest" and images["train"] == CLUSTER["image"]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"ingest": {"engine": "spark"}}, {"ingest", "build_features"}),
        ({"features": {"offline_store": "spark"}}, {"build_features"}),
        ({"ingest": {"engine": "spark"}, "cluster": {"steps": {"ingest": {"image": "mine:1", "cpu": "16"}}}}, {"build_features"}),
        ({}, set()),
    ],
)
def test_a_step_that_runs_spark_gets_the_image_that_has_it(settings: dict[str, Any], steps: set[str], tmp_path: Path) -> None:
    own = settings.get("cluster", {})
    cluster = {"image": "longtrail-train:1", "data_image": "longtrail-data:1", "spark_image": "longtrail-spark:1", **own}
    write(parse_config(settings | {"cluster": cluster}), tmp_path / "pipeline.yaml")
    executors = next(iter(yaml.safe_load_all((tmp_path / "pipeline.yaml").read_text())))["deploymentSpec"]["executors"]
    images = {name.removeprefix("exec-").replace("-", "_"): executor["container"]["image"] for name, executor in executors.items()}
    assert {step for step, image in images.items() if image == "longtrail-spark:1"} == steps
    assert images["validate"] == "longtrail-data:1" and images["ab_test"] == "longtrail-train:1"
    if own:
        assert images["ingest"] == "mine:1"
    without = settings | {"cluster": {"image": "longtrail-train:1", **own}}
    if steps:
        with pytest.raises(ConfigError, match=rf"cluster\.spark_image: {min(steps, key=list(SECTIONS).index)} runs Spark"):
            write(parse_config(without), tmp_path / "refused.yaml")
        assert not (tmp_path / "refused.yaml").exists()


def test_the_engine_s_settings_reach_both_steps_that_use_it() -> None:
    config = parse_config({"ingest": {"engine": "spark", "memory_limit": "7GB", "spark": {"driver_memory": "9g"}}})
    for step in ("ingest", "build_features"):
        ingest = settings_of(step, config)["ingest"]
        assert (ingest["engine"], ingest["memory_limit"], ingest["spark"]["driver_memory"]) == ("spark", "7GB", "9g")


def test_nothing_that_is_written_down_is_lost_on_the_way_to_a_step() -> None:
    """Kubeflow's parameters hold no null: what is null is left out and has its default there, which must be null too."""
    for settings in every_settings(Config):
        for name, field in settings.model_fields.items():
            if NoneType in get_args(field.annotation) and not field.is_required():
                assert field.get_default(call_default_factory=True) is None, (settings, name)
    unlimited = {"training": {"validation_targets_per_user": None}, "ab_test": {"max_requests_per_user": "all"}}
    config = parse_config(unlimited)
    assert parse_config(settings_of("train", config)).training.validation_targets_per_user == "all"
    assert parse_config(settings_of("ab_test", config)).ab_test.max_requests_per_user == "all"


def every_settings(found: Any) -> set[Any]:
    """All classes of settings that an annotation leads to."""
    if isinstance(found, type) and issubclass(found, Settings):
        return {found}.union(*(every_settings(field.annotation) for field in found.model_fields.values()))
    return set().union(*map(every_settings, get_args(found)))


def test_nodes_labels_and_tolerations(whole: Any, plain: Any) -> None:
    told = whole[2]
    batch = {"key": "batch", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}
    assert told["train"]["nodeSelector"]["labels"] == {"gpu": "mi300"}
    assert [{k: v for k, v in t.items() if v} for t in told["train"]["tolerations"]] == [batch, {"key": "gpu", "operator": "Exists"}]
    assert told["train"]["podMetadata"]["labels"] == {"team": "shop", "queue": "gpu"}
    for step in set(STEPS) - {"train"}:
        assert "nodeSelector" not in told[step] and told[step]["podMetadata"]["labels"] == {"team": "shop"} and len(told[step]["tolerations"]) == 1
    assert not any({"nodeSelector", "tolerations", "podMetadata"} & set(executor) for executor in plain[2].values())


def test_secrets_and_the_volume_go_to_the_steps_that_need_them(whole: Any, plain: Any) -> None:
    secrets = {step: {s["secretName"] for s in executor.get("secretAsEnv", [])} for step, executor in whole[2].items()}
    assert {step for step, names in secrets.items() if names == {"store"}} == {"look", "ingest", "train", "publish"}
    assert secrets["report"] == {"hook"} and not any(secrets[step] for step in ("validate", "build_features", "select", "ab_test", "package"))
    assert {step for step, executor in whole[2].items() if "pvcMount" in executor} == {"train", "publish"}
    assert whole[2]["train"]["pvcMount"][0]["constant"] == "shared"
    assert not any("secretAsEnv" in executor or "pvcMount" in executor for executor in plain[2].values())


def test_what_may_be_taken_from_the_cache(whole: Any, plain: Any) -> None:
    """Not what looks at the world or tells of a run, nor what a tag that moves would bring: ab_test here, and everything of the default image."""
    cached = {name.replace("-", "_") for name, task in tasks_of(whole[0]).items() if task.get("cachingOptions", {}).get("enableCache")}
    assert cached == set(SECTIONS) - {"ab_test"}
    assert not any(task.get("cachingOptions", {}).get("enableCache") for task in tasks_of(plain[0]).values())
    assert {step for step, executor in whole[2].items() if executor.get("imagePullPolicy") == "Always"} == {"ab_test"}
    assert {step for step, executor in plain[2].items() if executor.get("imagePullPolicy") == "Always"} == set(STEPS) - {"publish"}
    assert "other:latest: a tag that moves" in uncached(parse_config({"cluster": CLUSTER}))
    assert uncached(parse_config({"cluster": {"image": "longtrail:1.4"}})) == ""


def test_a_changed_source_setting_or_image_changes_what_the_cache_looks_for(whole: Any) -> None:
    """Kubeflow's key: the image, the command, and every input. So each must be one of these."""
    tasks = tasks_of(whole[0])
    given = tasks["ingest"]["inputs"]["parameters"]
    assert given["source"]["taskOutputParameter"]["producerTask"] == "look" and "ingest_settings" in given["settings"]["componentInputParameter"]
    for step in SECTIONS:
        assert f"{step}_settings" in str(tasks[step.replace("_", "-")]["inputs"]["parameters"]["settings"]), step
        assert "LONGTRAIL_RETRIES" in str(whole[1][step]["env"]) and "LONGTRAIL_RETRIES" not in str(whole[1][step]["command"])


@pytest.mark.parametrize(
    ("image", "fixed"),
    [
        ("longtrail", False), ("longtrail:latest", False), ("registry.example:5000/longtrail", False), ("longtrail:", False),
        ("registry.example:5000/longtrail:main", False), ("longtrail:1.4-3-gabc-dirty", False), ("longtrail@sha256:abc", False),
        ("longtrail:1.4", True), ("registry.example:5000/shop/longtrail:4b203a3", True), (f"longtrail{DIGEST}", True),
        (f"longtrail:latest{DIGEST}", True),
    ],
)  # fmt: skip
def test_names_that_mean_one_image(image: str, fixed: bool) -> None:
    assert pinned(image) == fixed


def test_errors_are_tried_again_by_the_step_and_pods_only_if_asked(whole: Any, plain: Any) -> None:
    assert not any("retryPolicy" in task for task in tasks_of(whole[0]).values())
    for container in whole[1].values():
        assert {variable["name"]: variable["value"] for variable in container["env"]} == {"LONGTRAIL_RETRIES": "3", "LONGTRAIL_RETRY_WAIT": "5.0"}
    tried = {name.replace("-", "_"): task["retryPolicy"] for name, task in tasks_of(plain[0]).items() if "retryPolicy" in task}
    assert set(tried) == set(STEPS) - {"publish", "report"}
    assert all(policy["maxRetryCount"] == 2 and policy["backoffDuration"] == "30s" and policy["backoffFactor"] == 2 for policy in tried.values())


def test_the_report_follows_the_run_however_it_ended(whole: Any) -> None:
    tasks = whole[0]["root"]["dag"]["tasks"]
    assert set(tasks) == {"exit-handler-1", "report"}  # nothing runs outside
    report = tasks["report"]
    assert report["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"} and report["dependentTasks"] == ["exit-handler-1"]
    given = {name: value["runtimeValue"]["constant"] for name, value in report["inputs"]["parameters"].items()}
    assert given == {"api": CLUSTER["api"], "run_id": "{{$.pipeline_job_uuid}}", "run_name": "{{$.pipeline_job_name}}"}
    # A task that asks for the final status of others is refused by most releases of Kubeflow Pipelines.
    assert "taskFinalStatus" not in str(whole[0])


def test_the_page_shows_what_dvc_shows(whole: Any) -> None:
    shown = {
        name.removeprefix("comp-").replace("-", "_"): {
            key: artifact["artifactType"]["schemaTitle"].removeprefix("system.")
            for key, artifact in component["outputDefinitions"]["artifacts"].items()
        }
        for name, component in whole[0]["components"].items()
        if "executorLabel" in component and component.get("outputDefinitions", {}).get("artifacts")
    }
    assert ClassificationMetrics.schema_title == f"system.{shown['evaluate']['classification']}"
    assert {step for step, artifacts in shown.items() if "HTML" in artifacts.values()} == {"validate", "train", "evaluate", "ab_test", "report"}
    metrics = {step for step, artifacts in shown.items() if "Metrics" in artifacts.values()}
    assert metrics == {"ingest", "validate", "train", "evaluate", "select", "ab_test"}
    assert {step for step, artifacts in shown.items() if "Model" in artifacts.values()} == {"train", "select", "package"}


def test_models_go_on_from_the_last_run_s_and_are_left_for_the_next(whole: Any, plain: Any, tmp_path: Path) -> None:
    def store(spec: dict[str, Any]) -> str:
        return tasks_of(spec)["train"]["inputs"]["parameters"]["previous"]["runtimeValue"]["constant"]

    publish = tasks_of(whole[0])["publish"]
    assert store(whole[0]) == "/data/models" == publish["inputs"]["parameters"]["store"]["runtimeValue"]["constant"]
    assert "select" in publish["dependentTasks"] and store(plain[0]) == "" and "publish" not in tasks_of(plain[0])
    assert whole[0]["defaultPipelineRoot"] == CLUSTER["pipeline_root"] and "defaultPipelineRoot" not in plain[0]
    remote = compiled(tmp_path, previous="s3://shop/models", image="longtrail:1")
    assert store(remote[0]) == "s3://shop/models" and not any("pvcMount" in executor for executor in remote[2].values())


@pytest.mark.parametrize(
    ("cluster", "says"),
    [
        ({"steps": {"trian": {}}}, "cluster.steps.trian"),
        ({"steps": {"train": {"gpu": 1}}}, "cluster.steps.train.gpu: unknown key"),
        ({"memory": "8 GB"}, "cluster.memory"),
        ({"steps": {"select": {"cpu": "two"}}}, "cluster.steps.select.cpu"),
        ({"tolerations": [{"key": "a"}]}, "operator is Equal; expected a key and a value"),
        ({"tolerations": [{"operator": "Exists", "value": "a"}]}, "operator is Exists and value is 'a'; expected no value"),
        ({"tolerations": [{"operator": "Exists", "effect": "Never"}]}, "cluster.tolerations.0.effect"),
    ],
)
def test_settings_that_no_cluster_would_take_are_refused_here(cluster: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config({"cluster": cluster})
    assert says in str(refused.value)


def test_the_documentation_s_settings_load_and_its_commands_have_their_options() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block.split("```")[0]) for block in page.split("```yaml\n")[1:]]
    assert blocks and all(parse_config(block) for block in blocks)
    commands = re.findall(r"python -m (pipelines\.\w+)([^\n`|#]*)", page)
    assert {module for module, _ in commands} >= {"pipelines.submit", "pipelines.trainjob", "pipelines.picture"}
    for module, arguments in commands:
        function = getattr(importlib.import_module(module), module.partition(".")[2])
        known = {f"--{name.replace('_', '-')}" for name in inspect.signature(function).parameters}
        assert set(re.findall(r"--[a-z-]+", arguments)) <= known, f"{module}{arguments}"


def test_every_field_says_what_it_is() -> None:
    plain_by_name = {"cpu", "memory", "gpu_type", "steps", "tolerations"}
    assert {name for name, field in ClusterSettings.model_fields.items() if not field.description} <= plain_by_name
