"""A folder (a Bento, a champion, any output) to an object store: `python -m components.publish --help`. `components.fetch` brings it back."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from components.command import run
from components.published import AT_ONCE, BLOBS, MANIFEST, Blob, Manifest, held_blobs, read_manifest
from components.remote import answering, locate
from longtrail.errors import StorageError
from longtrail.files import hash_files, write_json

log = logging.getLogger("publish")


def publish(
    to: Annotated[str, typer.Option(help="where: s3://bucket/folder, or a path; one address a version")],
    folder: Annotated[Path, typer.Option(help="the folder to publish")] = Path("build/bento"),
) -> None:
    """Upload what is not there yet, then say so in the manifest. An interrupted upload is run again, and goes on where it stopped.

    Raises StorageError naming the address where the store cannot be written, or the folder where there is nothing to publish.
    """
    address = to.rstrip("/")
    files = {path: Blob(sha256=hashed, size=(folder / path).stat().st_size) for path, hashed in hash_files(folder).items()}
    if not files:
        raise StorageError(f"{folder}: no files there; expected a folder to publish")
    manifest = Manifest(files=files)
    store, place = locate(address)
    with answering(address):
        if read_manifest(store, place, address) == manifest:
            log.info("%s: is there already", address)
            return
        blobs = {blob.sha256: path for path, blob in files.items()}
        held = held_blobs(store, place)
        missing = {sha256: path for sha256, path in blobs.items() if held.get(sha256) != files[path].size}
        _upload(store, place, {sha256: folder / path for sha256, path in missing.items()})
        _seal(store, place, manifest)
    there = len(blobs) - len(missing)
    log.info("%s: uploaded %d files, %.1f MB; %d were there", address, len(missing), sum(files[path].size for path in missing.values()) / 1e6, there)


def _upload(store: Any, place: str, blobs: dict[str, Path]) -> None:
    """Nobody reads them before the manifest names them."""
    if _is_local(store):
        store.makedirs(f"{place}/{BLOBS}", exist_ok=True)
    if blobs:
        store.put([str(path) for path in blobs.values()], [f"{place}/{BLOBS}/{sha256}" for sha256 in blobs], batch_size=AT_ONCE)


def _seal(store: Any, place: str, manifest: Manifest) -> None:
    if _is_local(store):
        write_json(Path(place) / MANIFEST, manifest.model_dump(mode="json"))
    else:
        store.pipe_file(f"{place}/{MANIFEST}", manifest.model_dump_json(indent=2).encode())  # an object appears whole


def _is_local(store: Any) -> bool:
    return "file" in ((store.protocol,) if isinstance(store.protocol, str) else store.protocol)


if __name__ == "__main__":
    run(publish)
