"""Whether a Bento is the one that was packaged: every file against its hash in the manifest, the manifest against the Bento's labels.

What is damaged, exchanged, missing or added is named, and the service does not become ready. This finds accidents (a torn copy, a bad disk, a file of
another build). Against somebody who may write to the Bento nothing helps but a signature that is kept elsewhere: they could rewrite the hashes, too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from longtrail.errors import ModelError
from longtrail.files import hash_files, hash_path

if TYPE_CHECKING:
    from serving.artifacts import Manifest

MANIFEST = "manifest.json"
_NAMED = 5  # faults that a message lists


def check_files(folder: Path, expected: Mapping[str, str]) -> None:
    """`expected` is SHA-256 (hex) by path from `folder`. Raises ModelError naming each file that differs, is missing or does not belong there."""
    found = hash_files(folder)
    found.pop(MANIFEST, None)
    faults = [
        *(f"{name}: SHA-256 is {found[name]}; the manifest says {wanted}" for name, wanted in expected.items() if found.get(name, wanted) != wanted),
        *(f"{name}: missing; the manifest names it" for name in expected if name not in found),
        *(f"{name}: not in the manifest; expected only what was packaged" for name in found if name not in expected),
    ]
    if faults:
        more = [f"and {len(faults) - _NAMED} more"] if len(faults) > _NAMED else []
        raise ModelError("; ".join([f"{folder}: {faults[0]}", *faults[1:_NAMED], *more]))


def check_labels(folder: Path, manifest: "Manifest") -> None:
    """The lineage, and the hash of the manifest itself, against the labels in the Bento's bento.yaml; nothing where `folder` is in no Bento.

    Raises ModelError naming the label that differs, for then the folder is of another Bento.
    """
    bento = folder.absolute().parent.parent / "bento.yaml"
    if not bento.is_file():
        return
    labels = _labels(bento)
    if "manifest" not in labels:  # while it is packaged: the label is made of the manifest
        raise ModelError(f"{bento}: label manifest: missing; expected the SHA-256 of {folder / MANIFEST}")
    wanted = {name: value or "" for name, value in manifest.lineage.model_dump().items()} | {"manifest": hash_path(folder / MANIFEST)}
    for name, value in wanted.items():
        if labels.get(name) != value:
            raise ModelError(f"{bento}: label {name}: {labels.get(name)!r}; {folder / MANIFEST} says {value!r}: they are not of the same Bento")


def _labels(bento: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(bento.read_text(encoding="utf-8"))["labels"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{bento}: no labels: {error}; expected those that components.package writes") from None
