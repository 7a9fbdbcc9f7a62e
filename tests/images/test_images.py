"""The images, built by a real engine, and the whole compiled pipeline run in them: `make test-images`, for it takes minutes.

What the machine lacks skips, with the reason; what is wrong with an image or in it fails.
"""

import json
import os
import shlex
import shutil
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from longtrail.config import parse_config
from tests.end_to_end.equal import Outputs, differences, of_build, of_kubeflow
from tests.images.building import COMMIT, READ_ONLY, SETTINGS, asked_for, build, check_what_it_says, describe
from tests.images.engine import FIGURES, Engine, free_port

pytestmark = asked_for


@pytest.fixture(scope="module")
def in_containers(docker: Engine, images: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """What the compiled pipeline writes, every step in its image. Kubeflow's runner mounts the root at its own path."""
    from kfp import local

    from pipelines.kubeflow import build as pipeline

    folder = tmp_path_factory.mktemp("containers")
    folder.chmod(0o777)  # the image's user is nobody's here
    cluster = {"cluster": {"image": images["train"], "data_image": images["data"]}}
    options: dict[str, Any] = {
        "read_only": True,
        "tmpfs": {"/tmp": "exec"},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "network_mode": "host",
        **({} if os.geteuid() == 0 else {"user": f"{os.getuid()}:{os.getgid()}"}),  # else nobody here could remove what it wrote
    }
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", docker.environment.get("DOCKER_HOST", "unix:///var/run/docker.sock"))
        local.init(runner=local.DockerRunner(**options), pipeline_root=str(folder), raise_on_error=True)
        pipeline(parse_config(SETTINGS | cluster))()
    FIGURES.append(f"the pipeline in containers: {time.monotonic() - started:.0f} s")
    return of_kubeflow(folder)


@pytest.fixture(scope="module")
def service(docker: Engine, place: Path, base: str, pip: dict[str, str], in_containers: Outputs) -> str:
    """The image of the Bento that was packaged in a container."""
    shutil.copytree(in_containers["bento"], place / "build" / "bento")
    return build(docker, place, base, pip, "bento")


def test_only_what_an_image_is_made_of_is_sent(docker: Engine, base: str, place: Path, tmp_path: Path) -> None:
    for name in (".env", "data/raw.csv", "longtrail/__pycache__/x.pyc"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("secret")
    (tmp_path / "Dockerfile").write_text(f"FROM {base}\nCOPY . /context\n")
    docker.run("build", "-t", "longtrail-context:test", "-f", str(tmp_path / "Dockerfile"), str(place))
    found = docker.run(
        "run", "--rm", "--network", "host", "longtrail-context:test", "find", "/context", "-type", "f", "-printf", "%P\n"
    ).stdout.split()
    places = {name.rpartition("/")[0] if name.startswith("tools") else name.split("/")[0] for name in found}
    assert places - {"build"} == {"requirements.lock", "pyproject.toml", "tools", "longtrail", "components", "features", "pipelines", "serving"}
    assert not [name for name in found if name.endswith(".pyc") or (name.startswith("build/") and not name.startswith("build/bento/"))]


@pytest.mark.parametrize("target", ["data", "train"])
def test_an_image_is_small_enough_and_says_what_it_is(target: str, docker: Engine, images: dict[str, str]) -> None:
    check_what_it_says(docker, images[target], target)


def test_nothing_can_be_written_but_scratch(docker: Engine, images: dict[str, str]) -> None:
    for path, works in (("/tmp/x", True), ("/longtrail/x", False), ("/venv/x", False)):
        assert (docker.run("run", *READ_ONLY, images["data"], "touch", path, check=False).returncode == 0) == works, path


def test_every_step_runs_in_its_container(in_containers: Outputs) -> None:
    assert {"tables", "features", "champion", "report", "bento"} <= in_containers.keys()
    lineage = json.loads((in_containers["model din"] / "lineage.json").read_text())
    assert lineage["code"] == COMMIT


def test_the_service_answers_from_its_image(docker: Engine, service: str) -> None:
    check_what_it_says(docker, service, "bento")
    port = free_port()
    command = describe(docker, service)["Config"]["Healthcheck"]["Test"][1:]
    health = shlex.join(word.replace(":3000/", f":{port}/") for word in command)  # the image's, at another port
    options = ["-v", "/state", "-e", f"LONGTRAIL_TOKENS=test read,events {'t' * 32}", "--health-cmd", health, "--health-interval", "3s"]
    started = time.monotonic()
    identity = docker.run("run", "-d", *READ_ONLY, *options, service, "--host", "127.0.0.1", "--port", str(port)).stdout.strip()
    try:
        address = f"http://127.0.0.1:{port}"
        wait(docker, identity, lambda: _ready(address))
        FIGURES.append(f"the service is ready after {time.monotonic() - started:.0f} s")
        body = json.dumps({"user_id": "nobody", "k": 3}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {'t' * 32}"}
        with urllib.request.urlopen(urllib.request.Request(f"{address}/recommend", body, headers), timeout=30) as answer:
            assert len(json.load(answer)["items"]) == 3
        wait(docker, identity, lambda: docker.run("inspect", "-f", "{{.State.Health.Status}}", identity).stdout.strip() == "healthy")
        started = time.monotonic()
        docker.run("stop", "--time", "60", identity)
        assert time.monotonic() - started < 55, "SIGTERM did not stop it"
    finally:
        docker.run("kill", identity, check=False)


def test_containers_and_dvc_write_the_same(in_containers: Outputs, repro: "Future[Path]") -> None:
    assert not differences(in_containers, of_build(repro.result()))


def wait(docker: Engine, identity: str, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not true():
        assert time.monotonic() < deadline, docker.run("logs", identity, check=False).stderr[-4000:]
        time.sleep(1)


def _ready(address: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{address}/readyz", timeout=2).status == 200)
    except OSError:
        return False
