"""What `components.publish` put into an object store, as a folder again: `python -m components.fetch --help`."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from components.command import run
from components.published import AT_ONCE, BLOBS, MANIFEST, Blob, held_blobs, read_manifest
from components.remote import answering, locate
from longtrail.errors import StorageError
from longtrail.files import atomic_directory, hash_files

log = logging.getLogger("fetch")


def fetch(
    address: Annotated[str, typer.Option(help="what was published: s3://bucket/folder, or a path")],
    folder: Annotated[Path, typer.Option(help="output: the folder, byte for byte")] = Path("build/bento"),
) -> None:
    """Download all files and check every hash. `folder` is whole or as it was before.

    Raises StorageError naming the address where nothing whole was published, and the file that is not what the manifest says.
    """
    address = address.rstrip("/")
    store, place = locate(address)
    with answering(address):
        manifest = read_manifest(store, place, address)
        if manifest is None:
            raise StorageError(f"{address}: no {MANIFEST} there; expected a folder that components.publish wrote to its end")
        held = held_blobs(store, place)
        for path, blob in manifest.files.items():
            if held.get(blob.sha256) != blob.size:
                raise StorageError(
                    f"{address}: {path} is not there whole: expected {blob.size} bytes, found {held.get(blob.sha256)}; publish it again"
                )
        with atomic_directory(folder) as aside:
            targets = [aside / path for path in manifest.files]
            for parent in {target.parent for target in targets}:
                parent.mkdir(parents=True, exist_ok=True)
            sources = [f"{place}/{BLOBS}/{blob.sha256}" for blob in manifest.files.values()]
            store.get(sources, [str(target) for target in targets], batch_size=AT_ONCE)
            _check(aside, manifest.files, address)
    log.info("%s: %d files, %.1f MB, from %s", folder, len(manifest.files), sum(blob.size for blob in manifest.files.values()) / 1e6, address)


def _check(folder: Path, files: dict[str, Blob], address: str) -> None:
    found = hash_files(folder)
    for path, blob in files.items():
        if found.get(path) != blob.sha256:
            raise StorageError(f"{address}: {path}: expected SHA-256 {blob.sha256}, found {found.get(path)}; publish it again")


if __name__ == "__main__":
    run(fetch)
