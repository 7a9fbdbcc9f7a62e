"""A container engine for the tests: the one that runs, or one of our own where that can be started; a base image where none can be pulled.

What the machine lacks raises UnavailableError; what comes after it is ours to answer for.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.images.wheels import locked, needs_cuda

BASE = "python:3.11-slim-bookworm"  # the Dockerfile's
OWN_BASE = "longtrail-base:test"
PACKAGES = "python3,python3-venv,git,ca-certificates"
FIGURES: list[str] = []  # sizes and times, shown at the end
SPACE = 15e9  # bytes; build stages and images took 9e9
_DAEMON = "--bridge=none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false"
_LOOK = "python3 -m venv /tmp/venv && /tmp/venv/bin/pip install --quiet --dry-run --ignore-installed --no-deps --report - "


class UnavailableError(Exception):
    """This machine has no engine, no base, no room or no packages; the message says what."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """`docker` against one daemon. Containers use the host's network: a daemon of our own has no bridge."""

    environment: dict[str, str]
    folder: Path
    own: bool

    def run(self, *arguments: str, check: bool = True, limit: float = 1200) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(["docker", *arguments], env=self.environment, capture_output=True, text=True, check=False, timeout=limit)
        assert not check or done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    def base(self) -> str:
        """An image with Python 3.11: the Dockerfile's, or one made of Debian's packages. Raises UnavailableError."""
        for image in (OWN_BASE, BASE):
            if self.run("image", "inspect", image, check=False).returncode == 0:
                return image
        if self.run("pull", "--quiet", BASE, check=False, limit=300).returncode == 0:
            return BASE
        ready = os.environ.get("LONGTRAIL_TEST_BASE")  # a root file system as a tar archive, made before
        if ready is None and shutil.which("mmdebstrap") is None:
            raise UnavailableError(f"{BASE} cannot be pulled, and mmdebstrap is not installed to make a base of Debian's packages")
        archive = Path(ready) if ready else self.folder / "base.tar"
        if ready is None:
            _tried("mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(archive))
        _tried("docker", "import", str(archive), "longtrail-base:plain", environment=self.environment)
        return self._with_certificates()

    def _with_certificates(self) -> str:
        """OWN_BASE: a mirror's certificate may be known to this machine alone."""
        context, bundle = self.folder / "base", Path("/etc/ssl/certs/ca-certificates.crt")
        context.mkdir()
        lines = ["FROM longtrail-base:plain"]
        if bundle.exists():
            shutil.copyfile(bundle, context / "bundle.crt")
            lines += [f"COPY bundle.crt {bundle}", f"ENV PIP_CERT={bundle}"]
        (context / "Dockerfile").write_text("\n".join(lines) + "\n")
        _tried("docker", "build", "--quiet", "-t", OWN_BASE, str(context), environment=self.environment)
        return OWN_BASE

    def look(self, base: str, pip: dict[str, str]) -> None:
        """Whether containers run, reach pip's registry and are given a CPU's torch there. Raises UnavailableError."""
        variables = [word for name, value in pip.items() for word in ("-e", f"{name}={value}")]
        command = ["run", "--rm", "--network", "host", *variables, base, "sh", "-c", f"{_LOOK} {locked('torch')} {locked('tqdm')}"]
        try:
            done = self.run(*command, check=False, limit=300)
        except subprocess.TimeoutExpired:
            raise UnavailableError("pip in a container got no answer from its registry within 300 s") from None
        if done.returncode:
            raise UnavailableError(f"no packages in a container: {(done.stderr.strip() or done.stdout.strip())[-600:]}")
        if needs_cuda(done.stdout):
            raise UnavailableError("pip finds torch for CUDA alone: gigabytes. Name an index or a folder with a CPU's (PIP_FIND_LINKS)")


@contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    """The engine that runs, or one of our own with its data below `folder`, removed at the end. Raises UnavailableError."""
    config = folder / "config"
    config.mkdir(parents=True)
    environment = {**os.environ, "DOCKER_CONFIG": str(config)}
    if shutil.which("docker") is None:
        raise UnavailableError("docker is not installed")
    if _driver(environment):
        yield Engine(environment=environment, folder=folder, own=False)
        return
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        raise UnavailableError("no engine answers `docker info`, and one can be started by root with dockerd installed alone")
    if (free := shutil.disk_usage(folder).free) < SPACE:
        raise UnavailableError(f"{free / 1e9:.0f} GB are free at {folder}, the images need {SPACE / 1e9:.0f}")
    address = f"unix://{folder}/docker.sock"
    environment |= {"DOCKER_HOST": address, "DOCKER_BUILDKIT": "0"}
    places = ["--data-root", f"{folder}/data", "--exec-root", f"{folder}/run", "--pidfile", f"{folder}/pid", "-H", address]
    limits = ["--default-ulimit", "nofile=4096:4096", "--default-ulimit", "nproc=4096:4096"]
    with (
        (folder / "dockerd.log").open("w") as log,
        subprocess.Popen(["dockerd", *_DAEMON.split(), *limits, *places], stdout=log, stderr=log) as daemon,
    ):
        try:
            _wait(daemon, environment, folder / "dockerd.log")
            yield Engine(environment=environment, folder=folder, own=True)
        finally:
            daemon.terminate()
            daemon.wait(60)
            subprocess.run(["umount", f"{folder}/run/netns/default"], capture_output=True, check=False)  # which dockerd leaves behind
            shutil.rmtree(folder / "data", ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(daemon: subprocess.Popen[bytes], environment: dict[str, str], log: Path) -> None:
    deadline = time.monotonic() + 60
    while not (driver := _driver(environment)):
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise UnavailableError(f"dockerd does not start here: {log.read_text()[-500:]}")
        time.sleep(0.5)
    if driver == "vfs":
        raise UnavailableError("dockerd has no storage driver here that shares layers")


def _driver(environment: dict[str, str]) -> str:
    """The storage driver of the engine that answers, or nothing."""
    done = subprocess.run(["docker", "info", "--format", "{{.Driver}}"], env=environment, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else ""


def _tried(*command: str, environment: dict[str, str] | None = None) -> None:
    """A step before anything of ours is built."""
    try:
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{command[0]} took more than 600 s") from None
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"{' '.join(command)}: {error.stderr.strip()[-600:]}") from None
