"""A container engine for the tests: the one that runs, or one of our own where that can be started; a base image where none can be pulled."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BASE = "python:3.11-slim-bookworm"  # the Dockerfile's
OWN_BASE = "longtrail-base:test"
PACKAGES = "python3,python3-venv,git,ca-certificates,libgomp1"
_DAEMON = "--bridge=none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false"


class NoEngineError(Exception):
    """No container engine runs here, and none can be started; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """`docker` against one daemon. Containers use the host's network: a daemon of our own has no bridge."""

    environment: dict[str, str]
    own: bool

    def run(self, *arguments: str, check: bool = True, limit: float = 1800) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(["docker", *arguments], env=self.environment, capture_output=True, text=True, check=False, timeout=limit)
        assert not check or done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    def base(self) -> str:
        """An image with Python 3.11: the Dockerfile's, or one made of Debian's packages. Raises NoEngineError."""
        if self.run("image", "inspect", BASE, check=False).returncode == 0 or self.run("pull", "--quiet", BASE, check=False).returncode == 0:
            return BASE
        if self.run("image", "inspect", OWN_BASE, check=False).returncode == 0:
            return OWN_BASE
        ready = os.environ.get("LONGTRAIL_TEST_BASE")  # a root file system as a tar archive, made before
        if ready is None and shutil.which("mmdebstrap") is None:
            raise NoEngineError(f"{BASE} cannot be pulled, and mmdebstrap is not installed to make a base of Debian's packages")
        bundle = Path("/etc/ssl/certs/ca-certificates.crt")  # a mirror's certificate may be known to this machine alone
        command = f"cat {ready}" if ready else f"mmdebstrap --quiet --variant=minbase --include={PACKAGES} bookworm -"
        subprocess.run(f"{command} | docker import - longtrail-base:plain", shell=True, env=self.environment, check=True, capture_output=True)
        folder = Path(self.environment["DOCKER_CONFIG"])
        lines = ["FROM longtrail-base:plain"]
        if bundle.exists():
            shutil.copyfile(bundle, folder / "bundle.crt")
            lines += [f"COPY bundle.crt {bundle}", f"ENV PIP_CERT={bundle}"]
        (folder / "Dockerfile").write_text("\n".join(lines) + "\n")
        self.run("build", "--quiet", "-t", OWN_BASE, str(folder))
        return OWN_BASE


@contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    """Raises NoEngineError."""
    config = folder / "config"
    config.mkdir(parents=True)
    environment = {**os.environ, "DOCKER_CONFIG": str(config)}
    if shutil.which("docker") is None:
        raise NoEngineError("docker is not installed")
    if _answers(environment):
        yield Engine(environment=environment, own=False)
        return
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        raise NoEngineError("no engine answers `docker info`, and one can be started by root with dockerd installed alone")
    socket = f"unix://{folder}/docker.sock"
    environment |= {"DOCKER_HOST": socket, "DOCKER_BUILDKIT": "0"}
    places = ["--data-root", f"{folder}/data", "--exec-root", f"{folder}/run", "--pidfile", f"{folder}/pid", "-H", socket]
    limits = ["--default-ulimit", "nofile=4096:4096", "--default-ulimit", "nproc=4096:4096"]
    with (
        (folder / "dockerd.log").open("w") as log,
        subprocess.Popen(["dockerd", *_DAEMON.split(), *limits, *places], stdout=log, stderr=log) as daemon,
    ):
        try:
            deadline = time.monotonic() + 60
            while not _answers(environment):
                if daemon.poll() is not None or time.monotonic() > deadline:
                    raise NoEngineError(f"dockerd does not start here: {(folder / 'dockerd.log').read_text()[-500:]}")
                time.sleep(0.5)
            yield Engine(environment=environment, own=True)
        finally:
            daemon.terminate()
            daemon.wait(60)


def _answers(environment: dict[str, str]) -> bool:
    return subprocess.run(["docker", "info"], env=environment, capture_output=True, check=False).returncode == 0
