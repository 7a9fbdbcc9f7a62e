"""`make images push`, as docs/cluster.md has it, to a registry, with images of a few bytes: what is tried is the Makefile, not a network."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images.building import ROOT, asked_for, describe
from tests.images.engine import Engine, UnavailableError
from tests.images.registry import Registry, registry

pytestmark = asked_for
IMAGES = ("data", "spark", "train", "bento")
STAGE = 'FROM scratch AS {name}\nARG GIT_COMMIT\nLABEL org.opencontainers.image.revision="${{GIT_COMMIT}}"\nCOPY pyproject.toml /{name}\n'


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Registry]:
    try:
        with registry(tmp_path) as found:
            yield found
    except UnavailableError as error:
        pytest.skip(str(error))


def make(docker: Engine, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["make", *words], cwd=ROOT, env=docker.environment, capture_output=True, text=True, check=False, timeout=120)


def test_what_is_pushed_is_what_was_built_and_is_pulled_again_by_its_digest(docker: Engine, store: Registry, tmp_path: Path) -> None:
    if not docker.own and not docker.environment.get("DOCKER_HOST", "unix:").startswith("unix:"):
        pytest.skip("the engine is on another machine: its loopback is not the registry's")
    dockerfile, place = tmp_path / "Dockerfile", f"{store.address}/shop"
    dockerfile.write_text("".join(STAGE.format(name=name) for name in IMAGES))
    options = [f"IMAGES={' '.join(IMAGES)}", "TAG=pushed", f"REGISTRY={place}", f"BUILD_FLAGS=-f {dockerfile}"]
    done = make(docker, "images", "push", *options)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert sorted(store.get("_catalog")[0]["repositories"]) == sorted(f"shop/longtrail-{name}" for name in IMAGES)
    for name in IMAGES:
        repository, local = f"shop/longtrail-{name}", f"longtrail-{name}:pushed"
        assert store.get(f"{repository}/tags/list")[0]["tags"] == ["pushed"]
        held, digest = store.image(repository, "pushed")
        assert held["config"]["Labels"]["org.opencontainers.image.revision"].removesuffix("-dirty") == commit
        identity = describe(docker, local)["Id"]
        docker.run("rmi", local, f"{place}/longtrail-{name}:pushed")
        assert docker.run("image", "inspect", identity, check=False).returncode != 0
        docker.run("pull", f"{place}/longtrail-{name}@{digest}")
        assert describe(docker, f"{place}/longtrail-{name}@{digest}")["Id"] == identity
        docker.run("rmi", f"{place}/longtrail-{name}@{digest}")


def test_a_push_to_nowhere_or_of_nothing_fails(docker: Engine, store: Registry) -> None:
    done = make(docker, "push", "REGISTRY=")
    assert done.returncode != 0 and "make push needs REGISTRY" in done.stderr
    done = make(docker, "push", f"REGISTRY={store.address}", "IMAGES=never", "TAG=built")
    assert done.returncode != 0 and "longtrail-never" in done.stderr
