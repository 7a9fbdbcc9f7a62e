"""Manifests of distributed training: valid, restricted, and made of the settings and the command that there are."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.train import train
from longtrail.config import Config, parse_config
from longtrail.errors import ConfigError
from pipelines.kubeflow import build, settings_of
from pipelines.trainjob import Kind, command, trainjob
from tests.deploy.manifests import Manifest, check, check_restricted, check_template

CLUSTER: dict[str, Any] = {"image": "registry.example/longtrail:1", "nodes": 3, "gpus": 2, "memory": "32G", "cpu": "8", "claim": "shared"}
MODELS: dict[str, Any] = {
    "popular": {"stage": "retrieval", "kind": "popularity"},
    "sas_rec": {"stage": "retrieval", "kind": "sasrec"},
    "popularity": {"stage": "ranking", "kind": "popularity"},
    "din": {"stage": "ranking", "kind": "din"},
}


def values(**cluster: Any) -> dict[str, Any]:
    return {"models": MODELS, "pipeline": {"models": list(MODELS)}, "cluster": CLUSTER | cluster}


def manifests(folder: Path, kind: Kind, model: str = "sas_rec", **cluster: Any) -> dict[str, Manifest]:
    params, out = folder / "params.yaml", folder / "out.yaml"
    params.write_text(yaml.safe_dump(values(**cluster)))
    trainjob(model, params, kind, out)
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(out.read_text())}


def templates(found: dict[str, Manifest]) -> list[Manifest]:
    if "PyTorchJob" in found:
        return [replicas["template"] for replicas in found["PyTorchJob"]["spec"]["pytorchReplicaSpecs"].values()]
    return [job["template"]["spec"]["template"] for job in found["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]]


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("alone", [{}, {"nodes": 1, "gpus": 0}], ids=["three machines", "one, no GPU"])
def test_the_manifests_are_valid_and_restricted(kind: Kind, alone: dict[str, Any], tmp_path: Path) -> None:
    found = manifests(tmp_path, kind, **alone)
    for manifest in found.values():
        check(manifest)
    assert templates(found)
    for template in templates(found):
        check_template(template)
        check_restricted(template["spec"])
        (container,) = template["spec"]["containers"]
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert volumes["settings"]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
        assert volumes["data"]["persistentVolumeClaim"]["claimName"] == "shared"


def test_the_runtime_s_job_is_one_of_kubernetes(tmp_path: Path) -> None:
    (replicated,) = manifests(tmp_path, Kind.TRAIN_JOB)["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    check({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "any"}, "spec": replicated["template"]["spec"]})


def test_machines_and_processes_are_those_of_the_settings(tmp_path: Path) -> None:
    found = manifests(tmp_path, Kind.TRAIN_JOB)
    trainer = found["TrainJob"]["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 2)
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "8", "memory": "32G", "nvidia.com/gpu": 2}
    assert found["TrainJob"]["spec"]["runtimeRef"]["name"] == found["TrainingRuntime"]["metadata"]["name"]
    old = manifests(tmp_path, Kind.PYTORCH_JOB)["PyTorchJob"]["spec"]
    assert old["nprocPerNode"] == "2" and {name: r["replicas"] for name, r in old["pytorchReplicaSpecs"].items()} == {"Master": 1, "Worker": 2}
    alone = manifests(tmp_path, Kind.PYTORCH_JOB, nodes=1, gpus=0)["PyTorchJob"]["spec"]
    assert alone["nprocPerNode"] == "1" and list(alone["pytorchReplicaSpecs"]) == ["Master"]


@pytest.mark.parametrize("kind", Kind)
def test_what_the_training_step_asks_for_the_job_asks_for(kind: Kind, tmp_path: Path) -> None:
    own = {"memory": "64G", "gpus": 4, "node_selector": {"gpu": "h200"}, "tolerations": [{"key": "gpu", "operator": "Exists"}], "image": "other:1"}
    found = manifests(tmp_path, kind, steps={"train": own})
    for manifest in found.values():
        check(manifest)
    for template in templates(found):
        (container,) = template["spec"]["containers"]
        assert container["resources"]["limits"] == {"cpu": "8", "memory": "64G", "nvidia.com/gpu": 4} and container["image"] == "other:1"
        assert template["spec"]["nodeSelector"] == {"gpu": "h200"} and template["spec"]["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
        check_template(template)
    assert "4" in str(
        found["TrainJob"]["spec"]["trainer"]["numProcPerNode"] if kind is Kind.TRAIN_JOB else found["PyTorchJob"]["spec"]["nprocPerNode"]
    )


def test_the_job_trains_as_the_pipeline_s_step_does(tmp_path: Path) -> None:
    """The same image and the same settings; what the job's params.yaml leaves out is not read by the step."""
    found = manifests(tmp_path, Kind.TRAIN_JOB)
    config: Config = parse_config(values())
    assert yaml.safe_load(found["ConfigMap"]["data"]["params.yaml"]) == settings_of("train", config)
    again = parse_config(yaml.safe_load(found["ConfigMap"]["data"]["params.yaml"]))
    assert (again.models, again.training, again.selection) == (config.models, config.training, config.selection)
    step = build(config).pipeline_spec.deployment_spec["executors"]["exec-train"]["container"]
    assert step["image"] == found["TrainJob"]["spec"]["trainer"]["image"]


def test_the_command_uses_options_that_the_step_has() -> None:
    words = command("din")
    assert words[:3] == ["torchrun", "-m", "components.train"]
    given = {word for word in words[3:] if word.startswith("--")}
    assert given <= {f"--{name}" for name in inspect.signature(train).parameters}
    assert len(words) == 3 + 2 * len(given)


def test_models_that_are_not_trained_or_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--model popular: it counts and is not trained"):
        manifests(tmp_path, Kind.TRAIN_JOB, "popular")
    with pytest.raises(ConfigError, match="has no such model; expected one of din, popular, popularity, sas_rec"):
        manifests(tmp_path, Kind.TRAIN_JOB, "nothing")
