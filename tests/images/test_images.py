"""The images, built by a real engine; every step run in its own, with a read-only root. `make test-images`: minutes, so not in `make test`."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.images.engine import Engine, NoEngineError, engine

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not os.environ.get("LONGTRAIL_TEST_IMAGES"), reason="builds images for minutes: make test-images")
# Megabytes. CPU-only wheels of torch; those for CUDA come on top.
BUDGET = {"data": 1_500, "train": 3_000, "bento": 2_500}
READ_ONLY = ("--rm", "--read-only", "--tmpfs", "/tmp:exec", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "host")
SETTINGS: dict[str, Any] = {
    "dataset": {"kind": "world", "users": 120, "items": 60},
    "features": {"online_store": "sqlite", "online_history_length": 100},
    "models": {
        "popular_items": {"stage": "retrieval", "kind": "popularity"},
        "popularity": {"stage": "ranking", "kind": "popularity"},
        "din": {"stage": "ranking", "kind": "din", "width": 8, "hidden": [16], "max_history": 20, "max_epochs": 1},
    },
    "pipeline": {"models": ["popular_items", "popularity", "din"]},
    "training": {"accelerator": "cpu", "threads": 1},
    "evaluation": {"replicates": 20},
    "ab_test": {"rounds": 5},
}
DATA = [
    ("data", "ingest --tables build/tables"),
    ("data", "validate --tables build/tables --validation build/validation"),
    ("data", "build_features --tables build/tables --validation build/validation --features build/features"),
]
MODELS = [
    ("train", f"{step} --{'out build/models' if step == 'train' else 'model build/models'}/{model} {rest}")
    for model in SETTINGS["pipeline"]["models"]
    for step, rest in (
        ("train", f"--model {model} --features build/features --checkpoints build/checkpoints"),
        ("evaluate", f"--features build/features --out build/evaluations/{model}"),
    )
]
LAST = [
    ("train", "select --models build/models --evaluations build/evaluations --champion build/champion"),
    ("train", "ab_test --tables build/tables --features build/features --champion build/champion --report build/ab"),
    (
        "train",
        "package --champion build/champion --features build/features --tables build/tables --validation build/validation "
        "--report build/ab --bento build/bento",
    ),
]


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    try:
        with engine(tmp_path_factory.mktemp("engine")) as found:
            yield found
    except NoEngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's tracked files to build in, so that build/bento is the test's own."""
    folder = tmp_path_factory.mktemp("repository")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def base(docker: Engine) -> str:
    try:
        return docker.base()
    except NoEngineError as error:
        pytest.skip(str(error))


def build(docker: Engine, place: Path, base: str, target: str) -> str:
    """Builds a target and returns its name. pip's variables reach the build where the environment has them."""
    passed = [word for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS") if os.environ.get(name) for word in ("--build-arg", name)]
    arguments = ["--network", "host", "--target", target, "--build-arg", f"BASE={base}", "--build-arg", "GIT_COMMIT=0123abc"]
    docker.run("build", "-t", f"longtrail-{target}:test", *arguments, *passed, str(place))
    return f"longtrail-{target}:test"


@pytest.fixture(scope="module")
def images(docker: Engine, place: Path, base: str) -> dict[str, str]:
    return {target: build(docker, place, base, target) for target in ("data", "train")}


@pytest.fixture(scope="module")
def pipeline(docker: Engine, images: dict[str, str], place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder after every step has run in its container."""
    work = tmp_path_factory.mktemp("work")
    (work / "build").mkdir()
    (work / "params.yaml").write_text(yaml.safe_dump(SETTINGS))
    for path in (work, work / "build"):
        path.chmod(0o777)  # the image's user is nobody's here
    for image, step in [*DATA, *MODELS, *LAST]:
        mount = ["-v", f"{work}:/work", "-w", "/work"]
        name, _, rest = step.partition(" ")
        docker.run("run", *READ_ONLY, *mount, images[image], "python", "-m", f"components.{name}", "--params", "params.yaml", *rest.split())
    shutil.copytree(work / "build" / "bento", place / "build" / "bento")
    return work


def describe(docker: Engine, image: str) -> dict[str, Any]:
    return json.loads(docker.run("image", "inspect", image).stdout)[0]


@pytest.mark.parametrize("target", ["data", "train"])
def test_an_image_is_small_enough_and_says_what_it_is(target: str, docker: Engine, images: dict[str, str]) -> None:
    about = describe(docker, images[target])
    assert about["Size"] / 1e6 <= BUDGET[target]
    assert about["Config"]["Labels"]["org.opencontainers.image.revision"] == "0123abc"
    assert about["Config"]["User"] == "10001:10001"
    print(f"{target}: {about['Size'] / 1e6:,.0f} MB")


def test_nothing_can_be_written_but_scratch(docker: Engine, images: dict[str, str]) -> None:
    for path, works in (("/tmp/x", True), ("/longtrail/x", False), ("/venv/x", False)):
        assert (docker.run("run", *READ_ONLY, images["data"], "touch", path, check=False).returncode == 0) == works, path


def test_every_step_runs_in_its_container(pipeline: Path) -> None:
    assert (pipeline / "build" / "bento" / "bento.yaml").is_file()
    lineage = json.loads((pipeline / "build" / "models" / "din" / "lineage.json").read_text())
    assert lineage["code"] == "0123abc"


def test_the_service_answers_from_its_image(docker: Engine, place: Path, base: str, pipeline: Path) -> None:
    image = build(docker, place, base, "bento")
    about = describe(docker, image)
    assert about["Size"] / 1e6 <= BUDGET["bento"]
    print(f"bento: {about['Size'] / 1e6:,.0f} MB")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    volume = ["-v", "/state", "-e", f"LONGTRAIL_TOKENS=test read,events {'t' * 32}"]
    identity = docker.run("run", "-d", *READ_ONLY, *volume, image, "--host", "127.0.0.1", "--port", str(port)).stdout.strip()
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 180
        while not _ready(address):
            assert time.monotonic() < deadline, docker.run("logs", identity, check=False).stderr[-4000:]
            time.sleep(1)
        body = json.dumps({"user_id": "nobody", "k": 3}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {'t' * 32}"}
        with urllib.request.urlopen(urllib.request.Request(f"{address}/recommend", body, headers), timeout=30) as answer:
            assert len(json.load(answer)["items"]) == 3
        started = time.monotonic()
        docker.run("stop", "--time", "30", identity)
        assert time.monotonic() - started < 25, "SIGTERM did not stop it"
    finally:
        docker.run("kill", identity, check=False)


def _ready(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/readyz", timeout=2).status == 200
    except OSError:
        return False
