"""What `components.publish` or Kubeflow put into an object store, as a folder again: `python -m components.fetch --help`."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from components.command import run
from components.published import AT_ONCE, BLOBS, MANIFEST, held_blobs, read_manifest
from components.remote import answering, locate
from longtrail.errors import StorageError
from longtrail.files import atomic_directory, hash_files, read_json

log = logging.getLogger("fetch")
ARTIFACTS = "src/artifacts"  # where a Bento of ours keeps models and tables, and their hashes


def fetch(
    address: Annotated[str, typer.Option(help="what was published, or the Bento of a Kubeflow run: s3://bucket/folder, or a path")],
    folder: Annotated[Path, typer.Option(help="output: the folder, byte for byte")] = Path("build/bento"),
) -> None:
    """Download all files and check every hash. `folder` is whole or as it was before.

    A Bento may also lie there as Kubeflow leaves its artifacts, file by file: its models and tables are checked against its own hashes. Raises
    StorageError naming the address where nothing whole was published, and the file that is not what the manifest says.
    """
    address = address.rstrip("/")
    store, place = locate(address)
    with answering(address):
        manifest = read_manifest(store, place, address)
        if manifest is None and store.exists(f"{place}/bento.yaml"):
            _fetch_bento(store, place, address, folder)
            return
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
            _check(aside, {path: blob.sha256 for path, blob in manifest.files.items()}, address)
    log.info("%s: %d files, %.1f MB, from %s", folder, len(manifest.files), sum(blob.size for blob in manifest.files.values()) / 1e6, address)


def _fetch_bento(store: Any, place: str, address: str, folder: Path) -> None:
    with atomic_directory(folder) as aside:
        store.get(f"{place}/", f"{aside}/", recursive=True, batch_size=AT_ONCE)
        try:
            hashes = read_json(aside / ARTIFACTS / MANIFEST)["files"]
        except (FileNotFoundError, ValueError, KeyError):
            raise StorageError(f"{address}: {ARTIFACTS}/{MANIFEST}: no hashes; expected a Bento that components.package wrote") from None
        _check(aside / ARTIFACTS, hashes, f"{address}/{ARTIFACTS}")
    log.info("%s: the Bento of %s", folder, address)


def _check(folder: Path, hashes: dict[str, str], address: str) -> None:
    found = hash_files(folder)
    for path, expected in hashes.items():
        if found.get(path) != expected:
            raise StorageError(f"{address}: {path}: expected SHA-256 {expected}, found {found.get(path)}; publish it again")


if __name__ == "__main__":
    run(fetch)
