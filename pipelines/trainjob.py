"""One model's training on several machines, for Kubeflow Trainer: `python -m pipelines.trainjob --model sasrec | kubectl apply -f -`.

The settings are those of the pipeline's training step, the command is `components.train` under torchrun, and image and resources stand in `cluster`.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from components.command import run
from longtrail.config import Config, load_config
from longtrail.errors import ConfigError
from longtrail.files import atomic_file
from pipelines.kubeflow import settings_of

RUNTIME = "longtrail"
SETTINGS, DATA = "/etc/longtrail", "/data"
USER = 10001  # the image's

Manifest = dict[str, Any]


class Kind(StrEnum):
    """Which of Kubeflow's interfaces the cluster has."""

    TRAIN_JOB = "TrainJob"  # Kubeflow Trainer 2
    PYTORCH_JOB = "PyTorchJob"  # training operator 1


def command(name: str) -> list[str]:
    """What every machine runs. Kubeflow tells torchrun by PET_* variables how many there are, which one this is and where the first one is."""
    places = {"features": "features", "out": f"models/{name}", "checkpoints": "checkpoints"}
    options = [word for option, place in places.items() for word in (f"--{option}", f"{DATA}/{place}")]
    return ["torchrun", "-m", "components.train", "--model", name, "--params", f"{SETTINGS}/params.yaml", *options]


def settings_map(config: Config, name: str) -> Manifest:
    """The sections of params.yaml that the training step reads, for this model."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"train-{label(name)}"},
        "data": {"params.yaml": yaml.safe_dump(settings_of("train", config), sort_keys=False)},
    }


def resources(config: Config) -> Manifest:
    """Of one machine. The GPUs of a training step are one process each."""
    wanted = config.cluster.of("train")
    limits: Manifest = {"cpu": wanted.cpu, "memory": wanted.memory} | ({wanted.gpu_type: wanted.gpus} if wanted.gpus else {})
    return {"requests": dict(limits), "limits": limits}


def pod(config: Config, name: str, container: str) -> Manifest:
    """The pod of one machine, restricted, as both kinds of job use it."""
    wanted = config.cluster.of("train")
    mounts = {"settings": SETTINGS, "data": DATA, "tmp": "/tmp", "shared-memory": "/dev/shm"}
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **({"nodeSelector": wanted.node_selector} if wanted.node_selector else {}),
        **({"tolerations": [toleration.model_dump(exclude_none=True) for toleration in wanted.tolerations]} if wanted.tolerations else {}),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": container,
                "image": wanted.image,
                "command": command(name),
                "env": [{"name": "HOME", "value": "/tmp"}],
                "resources": resources(config),
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in mounts.items()],
            }
        ],
        "volumes": [
            {"name": "settings", "configMap": {"name": f"train-{label(name)}"}},
            {"name": "data", "persistentVolumeClaim": {"claimName": config.cluster.claim}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "10Gi"}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},  # NCCL's; a container's own is 64 MB
        ],
    }


def train_job(config: Config, name: str) -> list[Manifest]:
    """A runtime of our own and the job. The cluster's runtime `torch-distributed` would do, but for the volumes."""
    cluster, own = config.cluster, f"{RUNTIME}-{label(name)}"
    template = {
        "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},  # marks the container that the job's trainer overrides
        "spec": {"backoffLimit": cluster.retries, "template": {"spec": {**pod(config, name, "node"), "restartPolicy": "Never"}}},
    }
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {"name": own, "labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": cluster.nodes, "torch": {}},
            "template": {"spec": {"replicatedJobs": [{"name": "node", "template": template}], "failurePolicy": {"maxRestarts": cluster.retries}}},
        },
    }
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": f"train-{label(name)}"},
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": own},
            "trainer": {
                "image": cluster.of("train").image,
                "command": command(name),
                "numNodes": cluster.nodes,
                "numProcPerNode": max(cluster.of("train").gpus, 1),
                "resourcesPerNode": resources(config),
            },
        },
    }
    return [settings_map(config, name), runtime, job]


def pytorch_job(config: Config, name: str) -> list[Manifest]:
    """For clusters that have the training operator and not yet Trainer 2."""
    cluster = config.cluster

    def replicas(count: int) -> Manifest:
        template = {"metadata": {"annotations": {"sidecar.istio.io/inject": "false"}}, "spec": pod(config, name, "pytorch")}
        return {"replicas": count, "restartPolicy": "OnFailure", "template": template}

    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": f"train-{label(name)}"},
        "spec": {
            "nprocPerNode": str(max(cluster.of("train").gpus, 1)),
            "runPolicy": {"backoffLimit": cluster.retries, "cleanPodPolicy": "None"},
            "pytorchReplicaSpecs": {"Master": replicas(1)} | ({"Worker": replicas(cluster.nodes - 1)} if cluster.nodes > 1 else {}),
        },
    }
    return [settings_map(config, name), job]


def label(name: str) -> str:
    """A model's name as Kubernetes names things."""
    return name.lower().replace("_", "-").replace(".", "-")


def trainjob(
    model: Annotated[str, typer.Option(help="name of a model in `models` of params.yaml")],
    params: Annotated[Path, typer.Option(help="settings")] = Path("params.yaml"),
    kind: Annotated[Kind, typer.Option(help="PyTorchJob for clusters without Kubeflow Trainer 2")] = Kind.TRAIN_JOB,
    out: Annotated[Path | None, typer.Option(help="file to write; default: standard output")] = None,
) -> None:
    """Write the manifests that train one model on `cluster.nodes` machines with `cluster.gpus` GPUs each."""
    config = load_config(params)
    if model not in config.models:
        raise ConfigError(f"--model {model}: {params} has no such model; expected one of {', '.join(config.models)}")
    if not hasattr(config.models[model], "max_epochs"):
        raise ConfigError(f"--model {model}: it counts and is not trained; expected a model that is worth several machines")
    manifests = train_job(config, model) if kind is Kind.TRAIN_JOB else pytorch_job(config, model)
    text = yaml.safe_dump_all(manifests, sort_keys=False, width=1000)
    if out is None:
        print(text, end="")
        return
    with atomic_file(out) as aside:
        aside.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(trainjob)
