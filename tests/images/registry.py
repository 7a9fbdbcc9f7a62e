"""A container registry of our own on loopback (Debian's docker-registry), asked over HTTP as any client of a registry asks."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.images.engine import UnavailableError, free_port

MANIFESTS = ("application/vnd.docker.distribution.manifest.v2+json", "application/vnd.oci.image.manifest.v1+json")
INDEXES = ("application/vnd.docker.distribution.manifest.list.v2+json", "application/vnd.oci.image.index.v1+json")


class Registry:
    """The registry at `address`, host:port. Engines speak plain http to loopback without being told to."""

    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str) -> tuple[Any, str]:
        """(the JSON at /v2/`path`, its digest)."""
        request = urllib.request.Request(f"http://{self.address}/v2/{path}", headers={"Accept": ", ".join(MANIFESTS + INDEXES)})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer), answer.headers.get("Docker-Content-Digest", "")

    def image(self, repository: str, tag: str) -> tuple[dict[str, Any], str]:
        """(an image's configuration, the digest that it is pulled by)."""
        manifest, digest = self.get(f"{repository}/manifests/{tag}")
        if "manifests" in manifest:  # an index, as some engines push: one image, and attestations
            (entry,) = [entry for entry in manifest["manifests"] if entry["platform"]["architecture"] != "unknown"]
            manifest, _ = self.get(f"{repository}/manifests/{entry['digest']}")
        return self.get(f"{repository}/blobs/{manifest['config']['digest']}")[0], digest


@contextmanager
def registry(folder: Path) -> Iterator[Registry]:
    """A registry with its data below `folder`, ended at the end. Raises UnavailableError."""
    if shutil.which("docker-registry") is None:
        raise UnavailableError("docker-registry is not installed (apt-get install docker-registry)")
    found = Registry(f"127.0.0.1:{free_port()}")
    settings = {"version": 0.1, "log": {"level": "warn"}, "storage": {"filesystem": {"rootdirectory": str(folder / "data")}}}
    (folder / "config.yml").write_text(yaml.safe_dump(settings | {"http": {"addr": found.address}}), encoding="utf-8")
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(["docker-registry", "serve", str(folder / "config.yml")], stdout=log, stderr=log) as process,
    ):
        try:
            _wait(found, process, folder / "log")
            yield found
        finally:
            process.terminate()


def _wait(found: Registry, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            found.get("")
            return
        except urllib.error.URLError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError(f"docker-registry does not start here: {log.read_text()[-500:]}") from None
            time.sleep(0.1)
