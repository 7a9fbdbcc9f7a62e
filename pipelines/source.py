"""What the raw log looks like now, without reading it: what DVC and Kubeflow cannot see of a source that is only named by its path."""

import hashlib
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
    import fsspec  # only where it is needed

    store, place = fsspec.core.url_to_fs(source, use_listings_cache=False)
    found: dict[str, dict[str, Any]]
    if "*" in place or "?" in place:
        found = store.glob(place, detail=True)
    elif store.isfile(place):
        found = {place: store.info(place)}
    else:
        found = store.find(place, detail=True)
    if not found:
        raise DatasetError(f"dataset.source {source}: nothing is there; expected a file, a folder or a glob of files")
    lines = ((name, info["size"], info.get("ETag") or info.get("LastModified") or info.get("mtime")) for name, info in sorted(found.items()))
    return "".join(f"{name}\t{size}\t{mark}\n" for name, size, mark in lines)


def state(dataset: Any) -> str:
    """SHA-256 of what `dataset` (the settings) names now; equal as long as nothing was added or changed. Empty for data that cannot change."""
    listed = fingerprint(getattr(dataset, "source", ""))
    return hashlib.sha256(listed.encode()).hexdigest() if listed else ""
