"""The launcher says what is wrong before it starts anything."""

import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "serving.run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_no_bento(tmp_path: Path) -> None:
    done = run("--bento", str(tmp_path))
    assert done.returncode == 1 and "is no Bento" in done.stderr and "make run" in done.stderr and "Traceback" not in done.stderr


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "bento.yaml").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("--bento", str(tmp_path), "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1 and "is taken" in done.stderr


def test_help() -> None:
    done = run("--help")
    assert done.returncode == 0 and "--bento" in done.stdout
