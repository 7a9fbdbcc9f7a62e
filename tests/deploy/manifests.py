"""Manifests as the tests look at them: built by Kustomize, checked against their schemas."""

import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SCHEMAS = Path(__file__).parent / "schemas"
OVERLAYS = ("small", "production", "canary")
VERSION = "1.32"  # the oldest Kubernetes that we look at; what it knows, later ones know
KINDS_OF_KUSTOMIZE = {"Kustomization", "Component"}

Manifest = dict[str, Any]


def documents(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def kustomize() -> list[str] | None:
    """The command that builds a folder, None where none is installed."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return ["kubectl", "kustomize"] if shutil.which("kubectl") else None


@functools.cache
def built(overlay: str) -> tuple[Manifest, ...]:
    command = kustomize()
    assert command is not None
    done = subprocess.run([*command, str(DEPLOY / "overlays" / overlay)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def check(manifest: Manifest) -> None:
    """Raises ValidationError for a field that its kind has not, or of another type. Every kind must be known, here or to Kubernetes."""
    own = SCHEMAS / f"{manifest['kind']}.yaml"
    if own.exists():
        jsonschema.validate(manifest, _schema(own), cls=jsonschema.Draft202012Validator)
    else:
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def check_template(template: Manifest) -> None:
    """A pod template inside a kind that Kubernetes does not know."""
    kubernetes_validate.validate({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}, "template": template}, VERSION, strict=True)


def pods(manifests: tuple[Manifest, ...] | list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Name and pod template's spec of each workload of Kubernetes' own kinds."""
    for manifest in manifests:
        if manifest["kind"] in {"StatefulSet", "Deployment", "Job"} and "template" in manifest["spec"]:
            yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]


# Kubernetes' Pod Security Standards, level "restricted": the volumes it allows.
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret", "name"}


def check_restricted(pod: Manifest) -> None:
    """The rules of the level "restricted", and ours: read-only root, no token, resources and a size for every scratch folder."""
    assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC", "hostUsers"))
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for volume in pod.get("volumes", []):
        assert set(volume) <= _VOLUMES
        assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"], volume
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]} and not context.get("privileged")
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]) and "memory" in container["resources"]["limits"]
        assert not any("hostPort" in port for port in container.get("ports", []))


@functools.cache
def _schema(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))
