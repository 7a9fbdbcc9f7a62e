"""What the raw log looks like now, without reading it: what DVC and Kubeflow cannot see of a source that is only named by its path."""

import hashlib
from glob import has_magic
from pathlib import Path
from typing import Any

from longtrail.errors import DatasetError


def fingerprint(source: str) -> str:
    """Names, sizes and times of the files that `dataset.source` stands for, a line each; empty where it is the name of a public dataset.

    Of an address (s3://…, a glob too) the store is asked for a listing: names, sizes and ETags, or times where it has none. Raises DatasetError
    where an address holds nothing.
    """
    if "://" in source:
        return _remote(source)
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
    elif path.is_absolute():
        files = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    else:
        files = sorted(Path().glob(source))
    return "".join(f"{file}\t{file.stat().st_size}\t{file.stat().st_mtime_ns}\n" for file in files)


def _remote(source: str) -> str:
    from components.remote import answering, locate

    store, place = locate(source, error=DatasetError)
    with answering(f"dataset.source {source}", error=DatasetError):
        if has_magic(place):
            found: dict[str, dict[str, Any]] = store.glob(place, detail=True)
        else:
            found = {place: store.info(place)} if store.isfile(place) else store.find(place, detail=True)
    if not found:
        raise DatasetError(f"dataset.source {source}: nothing is there; expected a file, a folder or a glob of files")
    lines = ((name, info["size"], info.get("ETag") or info.get("LastModified") or info.get("mtime")) for name, info in sorted(found.items()))
    return "".join(f"{name}\t{size}\t{mark}\n" for name, size, mark in lines)


def listing(dataset: Any) -> str:
    """The fingerprints of all that `dataset` (the settings) reads: its source, and what else an event log names. Raises what `fingerprint` does."""
    named = (getattr(dataset, name, None) for name in ("source", "events", "candidates"))
    return "".join(fingerprint(value) for value in named if isinstance(value, str))


def state(dataset: Any) -> str:
    """SHA-256 of what `dataset` (the settings) names now; equal as long as nothing was added or changed. Empty for data that cannot change.

    Of a DVC repository it is the commit that `revision` means now, since a branch moves. Raises DatasetError where that, or an address, is not there.
    """
    repo, revision = getattr(dataset, "repo", None), getattr(dataset, "revision", None)
    if repo is not None and revision is not None:
        from components.source import pinned_commit  # DVC takes seconds

        listed = pinned_commit(repo, revision)
    else:
        listed = listing(dataset)
    return hashlib.sha256(listed.encode()).hexdigest() if listed else ""
