"""An index of codes on disk: index.safetensors and index.json in one folder, read where it lies (memory-mapped), so that processes share its pages.

Opening reads the file once, for its hash, and copies nothing but the centroids.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from longtrail.errors import ModelError
from longtrail.files import atomic_directory, read_json, write_json
from longtrail.retrieval.blocks import BLOCK, Lists, Segment, Snapshot
from longtrail.retrieval.pq import PQIndex
from longtrail.retrieval.prune import Pruning

FORMAT = 1
TENSORS, CARD = "index.safetensors", "index.json"
_TYPES = {"U8": np.uint8, "U32": np.uint32, "I64": np.int64, "U64": np.uint64, "F32": np.float32}
_LISTS = ("list_codes", "list_places", "list_starts", "list_valid")


def save_index(folder: Path, index: PQIndex, *, made_of: str | None = None) -> None:
    """Write the folder whole or not at all. What was added since the index was built is put into its base first (`index.compact()`).

    `made_of`: the hash of the items that the index was built of, for `open_index` to compare.
    """
    if len(index.snapshot.segments) > 1:
        index.compact()
    snapshot = index.snapshot
    (base,) = snapshot.segments
    tensors: dict[str, NDArray[Any]] = {"codes": base.codes, "valid": base.valid, "centroids": index.centroids_MbE}
    if base.ids is not None:
        tensors["ids"] = base.ids
    if snapshot.lists is not None:
        lists = snapshot.lists
        tensors |= dict(zip(_LISTS, (lists.codes, lists.places, lists.starts, lists.valid), strict=True))
    with atomic_directory(folder) as aside:
        save_file(tensors, aside / TENSORS)
        (aside / TENSORS).chmod(0o644)  # safetensors makes it readable for its maker alone; a service runs as somebody else
        with (aside / TENSORS).open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        document = {
            "format": FORMAT,
            "kind": index.kind,
            "first": base.first,
            "count": base.count,
            "next_id": snapshot.next_id,
            "shared": index.shared,
            "made_of": made_of,
            "tensors": {name: {"type": str(values.dtype), "shape": list(values.shape)} for name, values in tensors.items()},
            "file": {"name": TENSORS, "bytes": (aside / TENSORS).stat().st_size, "sha256": digest},
        }
        write_json(aside / CARD, document)


def open_index(folder: Path, *, threads: int = 1, made_of: str | None = None) -> PQIndex:
    """The index as it was saved. Raises ModelError naming the file and what differs where one is missing, truncated or altered.

    With `made_of`, an index of other items is refused, and so is one whose card does not say of which: what older releases wrote.
    """
    folder = Path(folder)
    card = _card(folder / CARD)
    if made_of is not None and card.get("made_of") != made_of:
        raise ModelError(f"{folder / CARD}: made_of is {card.get('made_of')}; expected {made_of}, the model's items: build the index again")
    tensors = _tensors(folder / TENSORS, card)
    path = folder / TENSORS
    try:
        codes, centroids = tensors["codes"], tensors["centroids"]
        segment = Segment(codes=codes, first=int(card["first"]), count=int(card["count"]), valid=tensors["valid"], ids=tensors.get("ids"))
        lists = (
            Lists(**dict(zip(("codes", "places", "starts", "valid"), (tensors[name] for name in _LISTS), strict=True)))
            if _LISTS[0] in tensors
            else None
        )
        next_id, kind, shared = int(card["next_id"]), card["kind"], bool(card.get("shared", False))  # older cards have no such field
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / CARD}: no or a bad field {error}; expected what save_index writes") from None
    fits = (
        codes.ndim == centroids.ndim == 3
        and codes.shape[2] == BLOCK
        and codes.shape[1] == len(centroids)
        and len(segment.valid) * 64 == segment.places >= segment.count
        and (segment.ids is None or len(segment.ids) == segment.count)
        and (lists is None or (lists.codes.shape[1:] == codes.shape[1:] and len(lists.places) == len(lists.codes) * BLOCK))
        and (lists is None or (len(lists.starts) == centroids.shape[0] * centroids.shape[1] + 1 and lists.starts[-1] == len(lists.codes)))
        and (kind == "recjpq_prune") == (lists is not None)
    )
    if not fits:
        raise ModelError(f"{path}: shapes do not fit each other: { ({name: list(values.shape) for name, values in tensors.items()}) }")
    snapshot = Snapshot(segments=(segment,), next_id=next_id, lists=lists)
    return PQIndex.of(snapshot, torch.from_numpy(centroids.copy()), shared=shared, threads=threads, pruning=None if lists is None else Pruning())


def _card(path: Path) -> dict[str, Any]:
    try:
        card = read_json(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; expected an index's card") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ModelError(f"{path}: format {card.get('format') if isinstance(card, dict) else None!r}; expected {FORMAT}")
    file = card.get("file")
    if not isinstance(file, dict) or not isinstance(card.get("tensors"), dict) or not {"bytes", "sha256"} <= file.keys():
        raise ModelError(f"{path}: no field tensors, file.bytes or file.sha256; expected what save_index writes")
    return card


def _tensors(path: Path, card: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Views into the mapped file, by name. Pages become a process's own only where it writes, and nothing writes."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected the tensors of {CARD}")
    size = path.stat().st_size
    if size != card["file"]["bytes"]:
        raise ModelError(f"{path}: {size} bytes; {CARD} says {card['file']['bytes']}")
    mapped = np.asarray(np.memmap(path, np.uint8, mode="c"))  # "c", not "r": kernels are compiled once, for arrays that could be written
    digest = hashlib.sha256(mapped.data).hexdigest()
    if digest != card["file"]["sha256"]:
        raise ModelError(f"{path}: SHA-256 {digest}; {CARD} says {card['file']['sha256']}")
    try:
        length = struct.unpack("<Q", mapped[:8].tobytes())[0]
        header = json.loads(mapped[8 : 8 + length].tobytes())
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            values = (
                mapped[start:stop].view(_TYPES[entry["dtype"]])
                if start % 8 == 0
                else np.frombuffer(mapped[start:stop].tobytes(), _TYPES[entry["dtype"]]).copy()
            )
            tensors[name] = values.reshape(entry["shape"])
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not safetensors: {error}") from None
    found = {name: {"type": str(values.dtype), "shape": list(values.shape)} for name, values in tensors.items()}
    if found != card["tensors"]:
        raise ModelError(f"{path}: tensors {found}; {CARD} says {card['tensors']}")
    return tensors
