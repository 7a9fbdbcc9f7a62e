"""A folder in an object store: its files by their SHA-256, and a manifest that is written last.

`ADDRESS/blobs/<sha256>` is a file's bytes, `ADDRESS/manifest.json` says which path has which. Our choice of layout, for three reasons: without its
manifest nothing is there, so that an interrupted upload is never taken for a whole one; a blob that is there is whole (an object appears
in one piece), so that the next try uploads what is missing; and publishing anew never changes what somebody just reads. Old blobs stay: an
address a version, deleted as a whole, is what keeps a store tidy.
"""

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic import ValidationError as PydanticError

from longtrail.errors import StorageError

MANIFEST, BLOBS = "manifest.json", "blobs"
AT_ONCE = 8  # files that are on their way at the same time


def _inside(path: str) -> str:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or not path:
        raise ValueError(f"{path!r} does not lie in the folder")
    return path


class Blob(BaseModel):
    """One file: SHA-256 (hex) of its bytes, and how many they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(BaseModel):
    """What a published folder holds, by path from there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    files: dict[Annotated[str, AfterValidator(_inside)], Blob]


def read_manifest(store: Any, place: str, address: str) -> Manifest | None:
    """The manifest at `place` of `store` (fsspec's); None where there is none. Raises StorageError naming `address` where it is damaged."""
    try:
        text = store.cat_file(f"{place}/{MANIFEST}")
    except FileNotFoundError:
        return None
    try:
        return Manifest.model_validate_json(text)
    except PydanticError as error:
        raise StorageError(f"{address}/{MANIFEST}: not a manifest: {error.errors()[0]['msg']}; expected what components.publish writes") from None


def held_blobs(store: Any, place: str) -> dict[str, int]:
    """Bytes of each blob in the store, by SHA-256. A file system may keep half a file; its size tells."""
    try:
        return {name.rpartition("/")[2]: info["size"] for name, info in store.find(f"{place}/{BLOBS}", detail=True).items()}
    except FileNotFoundError:
        return {}
