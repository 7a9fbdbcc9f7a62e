"""The images, built by a real engine, and the whole compiled pipeline run in them: `make test-images`, for it takes minutes.

What the machine lacks skips, with the reason; what is wrong with an image or in it fails.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from longtrail.config import parse_config
from tests.end_to_end.equal import Outputs, differences, of_build, of_kubeflow
from tests.images.engine import FIGURES, Engine, UnavailableError, engine
from tests.images.wheels import from_outside, served, settings

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not os.environ.get("LONGTRAIL_TEST_IMAGES"), reason="builds images for minutes: make test-images")
# Megabytes. CPU-only wheels of torch; those for CUDA come on top.
BUDGET = {"data": 1_500, "train": 3_000, "bento": 2_500}
READ_ONLY = ("--rm", "--read-only", "--tmpfs", "/tmp:exec", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "host")
COMMIT = "0123abc"
# A small world in which DIN clearly beats popularity, so that the pipeline packages it.
SETTINGS: dict[str, Any] = {
    "dataset": {
        "kind": "world",
        "users": 240,
        "items": 60,
        "events_per_user": 40,
        "requests_per_user": 30,
        "logger_temperature": 4.0,
        "click_logit": -0.5,
    },
    "features": {"online_store": "sqlite", "online_history_length": 100},
    "models": {
        "popular_items": {"stage": "retrieval", "kind": "popularity"},
        "popularity": {"stage": "ranking", "kind": "popularity"},
        "din": {"stage": "ranking", "kind": "din", "width": 8, "hidden": [16], "max_history": 20, "max_epochs": 5, "learning_rate": 0.02},
    },
    "pipeline": {"models": ["popular_items", "popularity", "din"]},
    "training": {"accelerator": "cpu", "threads": 1},
    "selection": {
        "retrieval": {"metric": "ndcg@10", "max_latency_ms": 10_000, "max_bytes": 1_000_000_000},
        "ranking": {"metric": "auc", "max_latency_ms": 10_000, "max_bytes": 1_000_000_000},
    },
    "evaluation": {"replicates": 20, "latency_requests": 5, "latency_candidates": 20},
    "ab_test": {"temperature": 2.0, "max_weight_share": 1.0},
}


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    try:
        with engine(tmp_path_factory.mktemp("engine")) as found:
            yield found
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """pip's variables for the builds."""
    with served(settings(), tmp_path_factory.mktemp("served")) as variables:
        yield variables


@pytest.fixture(scope="module")
def base(docker: Engine, pip: dict[str, str]) -> str:
    try:
        found = docker.base()
        docker.look(found, pip)
    except UnavailableError as error:
        pytest.skip(str(error))
    return found


def copy(folder: Path) -> Path:
    """A copy of the repository's tracked files to build or to run in, with the settings above."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    complete = parse_config(SETTINGS).model_dump(mode="json", exclude_none=True)  # dvc.yaml names sections that have defaults here
    (folder / "params.yaml").write_text(yaml.safe_dump(complete, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The context of the builds."""
    return copy(tmp_path_factory.mktemp("repository"))


def build(docker: Engine, place: Path, base: str, pip: dict[str, str], target: str) -> str:
    """Builds a target and returns its name."""
    started = time.monotonic()
    variables = [word for name, value in pip.items() for word in ("--build-arg", f"{name}={value}")]
    arguments = ["--network", "host", "--target", target, "--build-arg", f"BASE={base}", "--build-arg", f"GIT_COMMIT={COMMIT}"]
    done = docker.run("build", "-t", f"longtrail-{target}:test", *arguments, *variables, str(place), check=False)
    said = f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    if done.returncode and from_outside(f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"):
        pytest.skip(f"the build of {target} was cut off from outside: {done.stderr[-600:]}")
    assert done.returncode == 0, said
    FIGURES.append(f"{target}: {describe(docker, f'longtrail-{target}:test')['Size'] / 1e6:,.0f} MB, built in {time.monotonic() - started:.0f} s")
    return f"longtrail-{target}:test"


@pytest.fixture(scope="module")
def images(docker: Engine, place: Path, base: str, pip: dict[str, str]) -> dict[str, str]:
    return {target: build(docker, place, base, pip, target) for target in ("data", "train")}


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
def by_dvc(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """What `dvc repro` writes on this machine from the same settings."""
    place = copy(tmp_path_factory.mktemp("dvc"))
    started = time.monotonic()
    variables = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    for command in (["init", "--no-scm", "--force"], ["repro"]):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *command],
            cwd=place,
            env={**os.environ, **variables, "DVC_NO_ANALYTICS": "1", "LONGTRAIL_COMMIT": COMMIT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:]
    FIGURES.append(f"dvc repro: {time.monotonic() - started:.0f} s")
    return of_build(place / "build")


@pytest.fixture(scope="module")
def service(docker: Engine, place: Path, base: str, pip: dict[str, str], in_containers: Outputs) -> str:
    """The image of the Bento that was packaged in a container."""
    shutil.copytree(in_containers["bento"], place / "build" / "bento")
    return build(docker, place, base, pip, "bento")


def describe(docker: Engine, image: str) -> dict[str, Any]:
    return json.loads(docker.run("image", "inspect", image).stdout)[0]


def check_what_it_says(docker: Engine, image: str, target: str) -> None:
    about = describe(docker, image)
    assert about["Size"] / 1e6 <= BUDGET[target]
    assert about["Config"]["Labels"]["org.opencontainers.image.revision"] == COMMIT
    assert about["Config"]["User"] == "10001:10001"
    history = docker.run("history", "--no-trunc", image).stdout
    assert "PIP_INDEX_URL" not in history and "PIP_FIND_LINKS" not in history  # an index may have a password


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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


def test_containers_and_dvc_write_the_same(in_containers: Outputs, by_dvc: Outputs) -> None:
    assert not differences(in_containers, by_dvc)


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
