"""Put another Bento into service without dropping a request: `python -m serving.swap --bento build/bento-new`.

Beside a running `python -m serving.run`, which does it (serving.supervisor) and listens for it in the state folder.
"""

import asyncio
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from serving.state import STATE_VARIABLE
from serving.supervisor import SwapError

SOCKET = "control.sock"  # in the state folder


def swap(
    bento: Annotated[Path, typer.Option(help="the packaged Bento to serve from now on, a folder")] = Path("build/bento"),
    state: Annotated[Path | None, typer.Option(help=f"state folder of the running service; default: ${STATE_VARIABLE} or var/serving")] = None,
) -> None:
    """Swap the running service's Bento. Exit code 1, and the old one serves on, where the new one does not become ready."""
    folder = (state or Path(os.environ.get(STATE_VARIABLE) or "var/serving")).absolute()
    if not (bento / "bento.yaml").is_file():
        raise stop(f"{bento} is no Bento: no {bento / 'bento.yaml'}")
    try:
        answer = ask(folder, {"swap": str(bento.absolute())})
    except OSError as error:
        raise stop(f"{folder / SOCKET}: {error.strerror}; expected a service started by python -m serving.run with this state folder") from None
    if "error" in answer:
        raise stop(f"not swapped, the old one serves on: {answer['error']}")
    print(f"{bento} serves now")


def ask(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """The supervisor's answer. Raises OSError where none listens in this state folder."""
    directory = os.open(folder, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(_address(directory))
            connection.sendall(json.dumps(question).encode() + b"\n")
            with connection.makefile("rb") as lines:
                line = lines.readline()
    finally:
        os.close(directory)
    return json.loads(line) if line else {"error": "the supervisor ended"}


def runs(folder: Path) -> bool:
    """Whether a service runs with this state folder."""
    try:
        return "error" in ask(folder, {})
    except OSError:
        return False


async def listen(folder: Path, swap_to: Callable[[Path], Awaitable[None]]) -> asyncio.Server:
    """Take questions in the state folder, from this user alone."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer: dict[str, Any] = {}
        try:
            await swap_to(Path(json.loads(await reader.readline())["swap"]))
        except SwapError as error:
            answer = {"error": str(error)}
        except (ValueError, KeyError, TypeError) as error:
            answer = {"error": f"not understood: {error}"}
        writer.write(json.dumps(answer).encode() + b"\n")
        writer.close()

    folder.mkdir(parents=True, exist_ok=True)
    (folder / SOCKET).unlink(missing_ok=True)
    directory = os.open(folder, os.O_PATH)
    before = os.umask(0o177)
    try:
        return await asyncio.start_unix_server(serve, _address(directory))
    finally:
        os.umask(before)
        os.close(directory)


def _address(directory: int) -> str:
    """Of SOCKET in an open folder: a socket's own path may have 107 bytes only."""
    return f"/proc/self/fd/{directory}/{SOCKET}"


def stop(message: str) -> SystemExit:
    """What to raise where a command cannot go on: it is said, and the exit code is 1."""
    print(f"error: {message}", file=sys.stderr)
    return SystemExit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(swap)
    app()
