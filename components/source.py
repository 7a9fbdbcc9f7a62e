"""A log that is no path here: in a DVC repository at a revision, or in an object store. Ingest reads a copy of it, which the cache keeps.

A file is whole or absent: it is copied aside, its size and, where DVC knows it, its MD5 are compared, then it is renamed. What was copied before and
has not changed there (same commit, or same ETag) is not copied again.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import has_magic
from hashlib import sha256
from pathlib import Path
from typing import Any

import pooch
from filelock import FileLock

from components.remote import answering, locate
from longtrail.config import Dataset
from longtrail.errors import DatasetError
from longtrail.files import atomic_file, read_json, write_json

log = logging.getLogger("source")

PATHS = ("source", "events", "candidates")  # the settings of a dataset that name files
INDEX = ".copied.json"
Files = dict[str, dict[str, Any]]  # fsspec's account of each file, by its path there


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """`dataset` with paths on this machine, and what counts.json says of where they came from (nothing, where they were here already)."""

    dataset: Dataset
    origin: dict[str, Any]


def resolve(dataset: Dataset, cache: Path) -> Resolved:
    """Copy what is not on this machine into `cache`. Raises DatasetError naming the setting, the address and what is wrong there.

    `origin` has the source as it was set, MD5 (hex) of each file by its path there (`files`) and, of a repository, its address, the revision that was
    asked for and the commit that this is.
    """
    named = {name: value for name in PATHS if isinstance(value := getattr(dataset, name, None), str)}  # a world has a number of candidates
    repo, revision = getattr(dataset, "repo", None), getattr(dataset, "revision", None)
    if repo is not None and revision is not None:
        with _opened(repo, revision) as (files, commit):
            at = f"at revision {revision} (commit {commit[:12]}) of {repo}"
            copies = {
                name: _copy(files, path, _folder(cache, f"{repo} {commit} {path}"), f"dataset.{name} {path}, {at}") for name, path in named.items()
            }
        origin = {"repo": repo, "revision": revision, "commit": commit}
    else:
        copies = {name: _download(name, address, cache) for name, address in named.items() if "://" in address}
        origin = {}
    if not copies:
        return Resolved(dataset=dataset, origin={})
    here = dataset.model_copy(update={name: path for name, (path, _) in copies.items()} | {"repo": None, "revision": None})
    hashes = {path: md5 for _, found in copies.values() for path, md5 in found.items()}
    return Resolved(dataset=here, origin={"source": named["source"], **origin, "files": hashes})


def pinned_commit(repo: str, revision: str) -> str:
    """The commit (40 hex digits) that `revision` means in `repo` now. Raises DatasetError naming both."""
    with _opened(repo, revision) as (_, commit):
        return commit


@contextmanager
def _opened(repo: str, revision: str) -> Iterator[tuple[Any, str]]:
    """The files of a Git repository at a revision, DVC's among them (fsspec's interface), and the commit."""
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.repo.open_repo import clean_repos
    from dvc.scm import RevError

    with tempfile.TemporaryDirectory(prefix="longtrail-dvc-") as scratch:
        files = DVCFileSystem(repo, rev=revision, config={"core": {"site_cache_dir": scratch}})
        try:
            yield files, files.repo.get_rev()
        except RevError as error:
            raise DatasetError(f"dataset.revision {revision!r}: no such commit, tag or branch in {repo}") from error
        except DvcException as error:
            raise DatasetError(f"dataset.repo {repo}: {error}; expected a Git repository with DVC, and its remote within reach") from error
        finally:
            files.close()
            clean_repos()


def _download(name: str, address: str, cache: Path) -> tuple[str, dict[str, str]]:
    store, place = locate(address, error=DatasetError)
    return _copy(store, place, _folder(cache, address), f"dataset.{name} {address}")


def _folder(cache: Path, what: str) -> Path:
    return cache / "copied" / sha256(what.encode()).hexdigest()[:16]


def _copy(files: Any, path: str, folder: Path, where: str) -> tuple[str, dict[str, str]]:
    """Copy the file, folder or glob `path` of `files` below `folder`: the path or glob there, and MD5 (hex) of each file by its path."""
    folder.mkdir(parents=True, exist_ok=True)
    with answering(where, error=DatasetError), FileLock(folder / ".lock"):
        found = _listed(files, path)
        if not found:
            raise DatasetError(f"{where}: nothing is there; expected a file, a folder or a glob of files")
        kept = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
        try:
            hashes = {name: _file(files, name, info, folder, kept, where) for name, info in sorted(found.items())}
        finally:
            write_json(folder / INDEX, kept)  # after an error, too: what was copied need not be copied again
        for gone in kept.keys() - found.keys():  # a glob would still find it
            (folder / gone).unlink(missing_ok=True)
    return str(folder / path.lstrip("/")), hashes


def _listed(files: Any, path: str) -> Files:
    if has_magic(path):
        found = files.glob(path, detail=True)
    else:
        info = files.info(path)
        found = {path: info} if info["type"] == "file" else files.find(path, detail=True)
    return {name.lstrip("/"): info for name, info in found.items() if info["type"] == "file"}


def _file(files: Any, name: str, info: dict[str, Any], folder: Path, kept: dict[str, Any], where: str) -> str:
    """MD5 of one file, copied unless it is here as it is there."""
    target, size = folder / name, info.get("size")
    if not target.resolve().is_relative_to(folder.resolve()):
        raise DatasetError(f"{where}: {name} points out of its folder")
    mark = [size, str(info.get("md5") or info.get("ETag") or info.get("LastModified") or "")]
    known = kept.get(name)
    if known is not None and known["mark"] == mark and target.is_file() and size in (None, target.stat().st_size):
        return known["md5"]
    with atomic_file(target) as aside:
        log.info("copying %s, %.1f MB", name, (size or 0) / 1e6)
        files.get_file(name, str(aside))
        md5 = pooch.file_hash(str(aside), alg="md5")
        if size not in (None, aside.stat().st_size) or info.get("md5", md5) != md5:
            expected = f"{size} bytes" + (f" with MD5 {info['md5']}" if "md5" in info else "")
            raise DatasetError(f"{where}: {name}: expected {expected}, got {aside.stat().st_size} with MD5 {md5}")
    kept[name] = {"mark": mark, "md5": md5}
    return md5
