"""Start the packaged service: `python -m serving.run --bento build/bento --port 3000`. What `make serve` runs."""

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from serving.state import STATE_VARIABLE

QUIET = {
    "BENTOML_DO_NOT_TRACK": "True",
    "BENTOML_BUNDLE_LOCAL_BUILD": "false",
    "FEAST_USAGE": "False",
    "POSTHOG_DISABLED": "1",
    "PYTHONWARNINGS": "ignore",
}


def serve(
    bento: Annotated[Path, typer.Option(help="the packaged Bento, a folder")] = Path("build/bento"),
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for every network")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=1, max=65535)] = 3000,
    state: Annotated[Path | None, typer.Option(help=f"folder for logs and histories; default: ${STATE_VARIABLE} or var/serving")] = None,
) -> None:
    """Serve a Bento until interrupted."""
    if not (bento / "bento.yaml").is_file():
        raise _stop(f"{bento} is no Bento: no {bento / 'bento.yaml'}. Package one first: make run")
    if not _free(host, port):
        raise _stop(f"port {port} of {host} is taken: choose another with --port (make serve PORT=…)")
    folder = (state or Path(os.environ.get(STATE_VARIABLE) or "var/serving")).absolute()
    # BentoML 1.4 joins a relative path to itself, and changes into the Bento: both get absolute ones.
    environment = {**os.environ, **QUIET, STATE_VARIABLE: str(folder), "PYTHONPYCACHEPREFIX": str(folder / "pycache")}  # a Bento is not written to
    # BentoML empties this folder's Prometheus files when it starts: those of another service on the machine must not stand there.
    environment["BENTOML_HOME"] = str(folder / "bentoml" / str(port))
    environment.setdefault("NUMBA_CACHE_DIR", str(folder / "pycache" / "numba"))
    command = [sys.executable, "-m", "bentoml", "serve", str(bento.absolute()), "--host", host, "--port", str(port)]
    print(f"Serving {bento} on http://{host}:{port} (API docs there, too; state in {folder}). Ready in some 20 seconds; Ctrl-C stops it.", flush=True)
    os.execve(sys.executable, command, environment)


def _stop(message: str) -> SystemExit:
    print(f"error: {message}", file=sys.stderr)
    return SystemExit(1)


def _free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(serve)
    app()
