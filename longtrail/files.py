"""Outputs that are whole or absent: written aside, then renamed. And hashes that identify them."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it becomes `path`, on an exception it is removed and `path` stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
    aside.replace(path)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a file name beside `path`; on success that file, flushed to disk, becomes `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.unlink(missing_ok=True)
    try:
        yield aside
        with aside.open("rb") as written:
            os.fsync(written.fileno())
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, so that equal values are equal files. NaN and infinity are refused."""
    with atomic_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def hash_files(folder: Path, *, threads: int = 2) -> dict[str, str]:
    """SHA-256 (hex) of each file below `folder`, by its path from there (with /), in order. Links are followed; __pycache__ is left out.

    `threads` files at once: hashing leaves the interpreter free.
    """
    folder = Path(folder)
    found = [Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names]
    files = sorted(path for path in found if "__pycache__" not in path.relative_to(folder).parts)
    with ThreadPoolExecutor(threads) as pool:
        hashes = list(pool.map(hash_path, files))
    return {file.relative_to(folder).as_posix(): hashed for file, hashed in zip(files, hashes, strict=True)}


def hash_path(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, or of the names and bytes of all files below a folder, in name order."""
    path = Path(path)
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if file != path:
            digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
