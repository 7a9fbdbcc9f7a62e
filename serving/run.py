"""Start the packaged service: `python -m serving.run --bento build/bento --port 3000`. What `make serve` runs.

This process holds the listening socket and keeps a worker (serving.worker) serving on it; `python -m serving.swap` has it swapped for another.
"""

import asyncio
import errno
import logging
import os
import shutil
import socket
from pathlib import Path
from typing import Annotated

import typer

from serving.demo.switch import DEMO_VARIABLE, own_machine
from serving.state import STATE_VARIABLE
from serving.supervisor import Supervisor
from serving.swap import listen, runs, stop

BACKLOG = 2_048  # connections that wait to be taken, also while no worker runs

QUIET = {
    "BENTOML_DO_NOT_TRACK": "True",
    "BENTOML_BUNDLE_LOCAL_BUILD": "false",
    "FEAST_USAGE": "False",
    "POSTHOG_DISABLED": "1",
    "PYTHONWARNINGS": "ignore",
    # Threads that wait for each other by spinning make a request ten times slower as soon as anything else wants the cores.
    "OMP_WAIT_POLICY": "PASSIVE",
}


# glibc gives the large arrays of a request back to the system and asks for them anew at the next one; keeping them took an eighth off SAM's pass.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


def serve(
    bento: Annotated[Path, typer.Option(help="the packaged Bento, a folder")] = Path("build/bento"),
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for every network")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=1, max=65535)] = 3000,
    state: Annotated[Path | None, typer.Option(help=f"folder for logs and histories; default: ${STATE_VARIABLE} or var/serving")] = None,
) -> None:
    """Serve a Bento until interrupted."""
    if not (bento / "bento.yaml").is_file():
        raise stop(f"{bento} is no Bento: no {bento / 'bento.yaml'}. Package one first: make run")
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise stop(f"port {port} of {host} is taken: choose another with --port (make serve PORT=…)") from None
        raise stop(f"{host}: {error.strerror}; expected an address of this machine, such as 127.0.0.1") from None
    folder = (state or Path(os.environ.get(STATE_VARIABLE) or "var/serving")).absolute()
    if runs(folder):
        raise stop(f"{folder} is the state folder of a service that runs: choose another with --state, or swap its Bento (python -m serving.swap)")
    print(f"Serving {bento} on http://{host}:{port} (API docs there, too; state in {folder}). Ready in some 20 seconds; Ctrl-C stops it.", flush=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(_supervise(listening, bento.absolute(), folder, host, port))


async def _supervise(listening: socket.socket, bento: Path, folder: Path, host: str, port: int) -> None:
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    reached = everywhere.get(host, host)
    url = f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
    supervisor = Supervisor(listening, environment(folder, host, port), url)
    async with await listen(folder, supervisor.swap):
        await supervisor.run(bento)


def environment(folder: Path, host: str, port: int) -> dict[str, str]:
    """A worker's: where it keeps what changes, and quiet libraries."""
    home = folder / "bentoml" / str(port)  # of this service alone, for BentoML empties it when it starts
    shutil.rmtree(home / "metrics", ignore_errors=True)
    (home / "metrics").mkdir(parents=True)
    more = {
        STATE_VARIABLE: str(folder),
        DEMO_VARIABLE: own_machine(host),
        "BENTOML_HOME": str(home),
        "PROMETHEUS_MULTIPROC_DIR": str(home / "metrics"),
        # A Bento is not written to: its code compiles in 0.3 s, and that of the libraries was compiled when they were installed.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    inherited = {"NUMBA_CACHE_DIR": str(folder / "numba"), **KEPT_MEMORY, **os.environ}
    return {**inherited, **QUIET, **more}


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(serve)
    app()
