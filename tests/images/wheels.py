"""pip's settings of this machine for a build in a container: folders of wheels are served on loopback, addresses are passed on."""

import ast
import functools
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SETTINGS = {"index-url": "PIP_INDEX_URL", "extra-index-url": "PIP_EXTRA_INDEX_URL", "find-links": "PIP_FIND_LINKS"}
# The last word of pip, apt or the engine where the machine is to blame: its network, its registry, its disk.
_OUTSIDE = re.compile(
    r"^(ERROR|E|Err:\d+|WARNING: Retrying|.*(error|Error)):?.*(name resolution|resolve|[Cc]onnection (refused|reset|aborted|broken|timed out)"
    r"|[Tt]imed? ?out|IncompleteRead|SSLError|CERTIFICATE_VERIFY|5\d\d (Server )?Error|429 |Failed to fetch|unreachable|No space left)",
    re.MULTILINE,
)


def settings() -> dict[str, str]:
    """pip's own: its files, and over them the environment."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    return read_settings(listed)


def read_settings(listed: str) -> dict[str, str]:
    """What `pip config list` printed, of the settings that say where packages come from."""
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for name, value in re.findall(rf"^{section}\.([\w-]+)=(.+)$", listed, re.MULTILINE):
            if name in SETTINGS:
                found[name] = ast.literal_eval(value)
    return found


@contextmanager
def served(found: dict[str, str], folder: Path) -> Iterator[dict[str, str]]:
    """pip's variables for a container on this machine's network. Local folders are linked below the empty `folder`, which is served."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            yield {SETTINGS[name]: " ".join(_reachable(name, word, folder, address) for word in value.split()) for name, value in found.items()}
        finally:
            server.shutdown()


def _reachable(name: str, word: str, folder: Path, address: str) -> str:
    place = Path(word.removeprefix("file://"))
    if not place.is_dir():
        return word
    index = name != "find-links"  # an index's pages point to files beside it
    link = folder / str(len(list(folder.iterdir())))
    link.symlink_to(place.parent if index else place)
    return f"{address}/{link.name}/{place.name if index else ''}".rstrip("/") + "/"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def locked(name: str) -> str:
    (line,) = re.findall(rf"^{name}==.+$", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
    return line


def needs_cuda(report: str) -> bool:
    """Whether what `pip install --dry-run --report -` would install asks for NVIDIA's libraries: gigabytes."""
    wanted = [word for package in json.loads(report)["install"] for word in package["metadata"].get("requires_dist", [])]
    return any(re.match(r"nvidia-|cuda-", requirement) and "extra ==" not in requirement for requirement in wanted)


def from_outside(output: str) -> bool:
    """Whether a failed build ended by the network or the disk, not by the Dockerfile."""
    return _OUTSIDE.search(output[-3000:]) is not None
