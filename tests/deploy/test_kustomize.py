"""The endpoint's manifests: strict schemas, restricted pods, and that the parts fit each other and the service. No cluster, no network."""

import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from longtrail.config import CanarySettings, StopSettings
from tests.deploy.manifests import DEPLOY, KINDS_OF_KUSTOMIZE, OVERLAYS, ROOT, Manifest, built, check, check_restricted, documents, kustomize, pods

needs_kustomize = pytest.mark.skipif(
    kustomize() is None, reason="neither kustomize nor kubectl is installed: files are checked, overlays are not built"
)
FILES = sorted(path for path in DEPLOY.rglob("*.yaml") if path.name not in ("kustomization.yaml", "adapter.yaml"))
PATCHES = {path.parent / patch["path"] for path in DEPLOY.rglob("kustomization.yaml") for patch in documents(path)[0].get("patches", [])}


def named(overlay: str, kind: str, name: str) -> Manifest:
    (found,) = [manifest for manifest in built(overlay) if (manifest["kind"], manifest["metadata"]["name"]) == (kind, name)]
    return found


# ---------------------------------------------------------------- files, as they lie there


def test_every_file_that_is_no_patch_is_valid_by_itself() -> None:
    whole = [path for path in FILES if path not in PATCHES]
    assert len(whole) >= 15
    for path in whole:
        for manifest in documents(path):
            check(manifest)


def test_every_file_is_used_and_is_there() -> None:
    used: set[Path] = set()
    for path in DEPLOY.rglob("kustomization.yaml"):
        (kustomization,) = documents(path)
        assert kustomization["kind"] in KINDS_OF_KUSTOMIZE
        files = [file for entry in kustomization.get("configMapGenerator", []) for file in entry["files"]]
        patches = [patch["path"] for patch in kustomization.get("patches", [])]
        for name in [*kustomization.get("resources", []), *kustomization.get("components", []), *files, *patches]:
            target = (path.parent / name).resolve()
            assert target.exists(), f"{path}: {name}"
            assert target.is_file() or (target / "kustomization.yaml").is_file(), f"{path}: {name}"
            used.add(target)
    assert {path for path in FILES if path.resolve() not in used} == set()


def test_a_patch_names_what_a_resource_below_it_is() -> None:
    for path in PATCHES:
        for patch in documents(path):
            targets = [d for file in FILES if file not in PATCHES for d in documents(file)]
            assert any((d["kind"], d["metadata"]["name"]) == (patch["kind"], patch["metadata"]["name"]) for d in targets), path


def test_a_wrong_field_is_found() -> None:
    """The checks above can fail: by Kubernetes' own schemas and by ours."""
    (service,) = documents(DEPLOY / "base" / "service.yaml")
    service["spec"]["port"] = 80
    with pytest.raises(jsonschema.ValidationError, match="port"):
        check(service)
    (monitor,) = documents(DEPLOY / "monitoring" / "servicemonitor.yaml")
    monitor["spec"]["endpoints"][0]["interval"] = "15 seconds"
    with pytest.raises(jsonschema.ValidationError, match="15 seconds"):
        check(monitor)
    (workload,) = documents(DEPLOY / "base" / "statefulset.yaml")
    pod = workload["spec"]["template"]["spec"]
    check_restricted(pod)
    pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False
    with pytest.raises(AssertionError):
        check_restricted(pod)


def test_no_secret_stands_in_a_file() -> None:
    for path in FILES:
        for manifest in documents(path):
            assert manifest["kind"] != "Secret", path
            for _, pod in pods([manifest]):
                for variable in (variable for container in pod["containers"] for variable in container.get("env", [])):
                    secret = re.search("PASSWORD|TOKEN|SECRET|AUTH", variable["name"]) and not variable["name"].endswith("_FILE")
                    assert not secret or "secretKeyRef" in variable.get("valueFrom", {}), variable


# ---------------------------------------------------------------- overlays, built


@needs_kustomize
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_valid_and_restricted(overlay: str) -> None:
    manifests = built(overlay)
    for manifest in manifests:
        check(manifest)
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "longtrail", manifest["metadata"]
    assert named(overlay, "Namespace", "longtrail")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for _, pod in pods(manifests):
        check_restricted(pod)
        if pod["containers"][0]["name"] == "longtrail":
            mounted = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if not mount.get("readOnly")}
            variables = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
            assert {variables["LONGTRAIL_STATE"], variables["HOME"]} == mounted  # all that may be written to


@needs_kustomize
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_selector_finds_the_pods_of_one_role(overlay: str) -> None:
    labels = {m["metadata"]["name"]: m["spec"]["template"]["metadata"]["labels"] for m in built(overlay) if m["kind"] == "StatefulSet"}

    def found(selector: dict[str, str]) -> set[str]:
        assert selector, "an empty selector is everything"
        return {name for name, has in labels.items() if selector.items() <= has.items()}

    for manifest in built(overlay):
        name, spec = manifest["metadata"]["name"], manifest.get("spec", {})
        if manifest["kind"] == "Service":
            assert found(spec["selector"]) == {name}
        elif manifest["kind"] in ("StatefulSet", "PodDisruptionBudget"):
            assert found(spec["selector"]["matchLabels"]) == {name}
        elif manifest["kind"] == "NetworkPolicy" and name != "longtrail-to-redis":
            assert found(spec["podSelector"]["matchLabels"]) == {name}
        if manifest["kind"] == "StatefulSet":
            assert named(overlay, "Service", spec["serviceName"])
            for constraint in spec["template"]["spec"].get("topologySpreadConstraints", []):
                assert found(constraint["labelSelector"]["matchLabels"]) == {name}
    guarded = {m["metadata"]["name"] for m in built(overlay) if m["kind"] == "NetworkPolicy"}
    assert set(labels) <= guarded


@needs_kustomize
def test_the_service_s_image_is_named_where_manifests_are_made() -> None:
    image = "registry.example:5000/shop/longtrail-bento:1.4"
    done = subprocess.run(["make", "-s", "manifests", "OVERLAY=production", f"BENTO={image}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    images = [pod["containers"][0]["image"] for _, pod in pods(list(yaml.safe_load_all(done.stdout)))]
    before = [pod["containers"][0]["image"] for _, pod in pods(built("production"))]
    assert images == [name.replace("longtrail-bento:latest", image) for name in before] and image in images
    failed = subprocess.run(["make", "-s", "manifests", "OVERLAY=none"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode != 0 and "none" in failed.stderr


@needs_kustomize
def test_one_process_owns_the_histories_of_sqlite() -> None:
    (workload,) = [m for m in built("small") if m["kind"] == "StatefulSet"]
    assert workload["spec"]["replicas"] == 1
    assert not [m for m in built("small") if m["kind"] == "HorizontalPodAutoscaler"]


@needs_kustomize
@pytest.mark.parametrize("overlay", ["production", "canary"])
def test_events_have_one_writer_and_lists_scale(overlay: str) -> None:
    assert named(overlay, "StatefulSet", "longtrail-writer")["spec"]["replicas"] == 1
    scaler = named(overlay, "HorizontalPodAutoscaler", "longtrail-lists")["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "longtrail-lists"}
    assert "replicas" not in named(overlay, "StatefulSet", "longtrail-lists")["spec"]
    backends = {
        match["path"]["value"]: {backend["name"]: backend.get("weight", 1) for backend in rule["backendRefs"]}
        for rule in named(overlay, "HTTPRoute", "longtrail")["spec"]["rules"]
        for match in rule["matches"]
    }
    assert backends["/events"] == {"longtrail-writer": 1}
    assert set(backends) == {"/events", "/recommend", "/rank"} and backends["/recommend"] == backends["/rank"]
    for name in {name for paths in backends.values() for name in paths}:
        assert named(overlay, "Service", name)["spec"]["ports"][0]["port"] == 80
    for name, pod in pods(built(overlay)):
        variables = [variable["name"] for variable in pod["containers"][0]["env"]]
        assert "REDIS_PASSWORD" in variables, name


@needs_kustomize
def test_the_canary_has_a_step_s_share_and_the_guardrails_of_an_arm() -> None:
    """The overlay says in Kubernetes' words what serving.experiment.canary says for an arm."""
    settings = CanarySettings(arm="any")
    (lists,) = [r for r in named("canary", "HTTPRoute", "longtrail")["spec"]["rules"] if r["matches"][0]["path"]["value"] == "/recommend"]
    weights = {backend["name"]: backend["weight"] for backend in lists["backendRefs"]}
    assert weights["longtrail-canary"] / sum(weights.values()) in settings.steps
    rules = {r["alert"]: r["expr"] for r in named("canary", "PrometheusRule", "longtrail-canary")["spec"]["groups"][0]["rules"]}
    assert float(rules["LongtrailCanaryFails"].rpartition(">")[2]) == settings.max_error_rate
    assert float(rules["LongtrailCanarySlow"].rpartition(">")[2]) * 1000 == settings.max_p99_ms
    images = {name: pod["containers"][0]["image"] for name, pod in pods(built("canary"))}
    assert images["longtrail-canary"] != images["longtrail-lists"] == images["longtrail-writer"]
    assert named("canary", "StatefulSet", "longtrail-canary")["spec"]["replicas"] == 1


# ---------------------------------------------------------------- the manifests and the service


def test_a_pod_may_take_as_long_to_stop_as_the_service_does() -> None:
    pod = documents(DEPLOY / "base" / "statefulset.yaml")[0]["spec"]["template"]["spec"]
    stop = StopSettings()
    before = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert before + stop.linger_seconds + stop.drain_seconds + 5 <= pod["terminationGracePeriodSeconds"]


def test_the_tokens_are_where_the_service_looks_for_them_and_prometheus_has_one() -> None:
    from serving.tokens import TOKENS_FILE

    pod = documents(DEPLOY / "base" / "statefulset.yaml")[0]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (file,) = [variable["value"] for variable in container["env"] if variable["name"] == TOKENS_FILE]
    (mount,) = [mount for mount in container["volumeMounts"] if file.startswith(f"{mount['mountPath']}/")]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
    assert [f"{mount['mountPath']}/{item['path']}" for item in volume["secret"]["items"]] == [file] and not volume["secret"].get("optional")
    monitor = documents(DEPLOY / "monitoring" / "servicemonitor.yaml")[0]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"]["name"] == volume["secret"]["secretName"]


def test_rules_speak_of_metrics_and_labels_that_the_service_has() -> None:
    from prometheus_client import CollectorRegistry

    from serving.metrics import Metrics

    registry = CollectorRegistry()
    instruments = vars(Metrics(registry)).values()
    labels = {name: set(i._labelnames) for i in instruments if hasattr(i, "_labelnames") for name in registry._collector_to_names[i]}
    added = {"namespace", "pod", "le"}  # by Prometheus and by a histogram's buckets
    checked = 0
    for path in FILES:
        for rule in (r for d in documents(path) if d["kind"] == "PrometheusRule" for g in d["spec"]["groups"] for r in g["rules"]):
            for metric, matchers in re.findall(r"(longtrail_\w+)(?:\{([^}]*)\})?", rule["expr"]):
                assert metric in labels, f"{path}: {metric}"
                assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= labels[metric] | added, f"{path}: {metric}"
                checked += 1
    assert checked >= 5
    recorded = {r["record"] for r in documents(DEPLOY / "monitoring" / "prometheusrule.yaml")[0]["spec"]["groups"][0]["rules"]}
    (adapted,) = yaml.safe_load((DEPLOY / "monitoring" / "adapter.yaml").read_text())["rules"]["custom"]
    scaler = documents(DEPLOY / "overlays" / "production" / "lists" / "horizontalpodautoscaler.yaml")[0]["spec"]
    assert {adapted["name"]["matches"], scaler["metrics"][0]["pods"]["metric"]["name"]} == recorded


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_redis_starts_with_its_file_asks_for_the_password_and_keeps_what_it_was_told(tmp_path: Path) -> None:
    import redis

    container = documents(DEPLOY / "redis" / "statefulset.yaml")[0]["spec"]["template"]["spec"]["containers"][0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        word.replace("$(REDIS_PASSWORD)", "secret").replace("/etc/redis/", f"{DEPLOY}/redis/").replace("/data", str(tmp_path))
        for word in container["command"]
    ]

    def start() -> Any:
        process = subprocess.Popen([*words, "--port", str(port)], stdout=subprocess.DEVNULL)
        client = redis.Redis(port=port, password="secret")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                client.ping()
                return process, client
            except redis.ConnectionError:
                time.sleep(0.05)
        process.kill()
        raise AssertionError("Redis did not start")

    process, client = start()
    try:
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port).ping()
        client.set("history", "long")
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    finally:
        process.terminate()
        process.wait(20)
    process, client = start()
    try:
        assert client.get("history") == b"long"
    finally:
        process.terminate()
        process.wait(20)
