"""Outputs of the same pipeline by different engines, compared: data and features byte by byte, weights and metrics within a tolerance."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from longtrail.files import hash_files, read_json

Outputs = dict[str, Path]
TOLERANCE = 1e-4  # relative: float32 sums in another order, some hundred steps later; our choice
# Feast's SQLite files carry the time of writing; their contents come from the tables and offline files, which are compared.
STAMPED = {"feast/registry.db", "feast/online_store.db"}


def of_build(build: Path) -> Outputs:
    """What `dvc repro` wrote below `build`."""
    found = {"tables": build / "tables", "features": build / "features", "champion": build / "champion", "report": build / "ab"}
    found |= {f"model {path.name}": path for path in (build / "models").iterdir()}
    found |= {f"evaluation {path.name}": path for path in (build / "evaluations").iterdir()}
    return found | ({"bento": build / "bento"} if (build / "bento").is_dir() else {})


def of_kubeflow(root: Path) -> Outputs:
    """The artifacts of the one run of the pipeline below `root`, found by their names and by a file that each has."""
    marks = {"tables": "counts.json", "features": "features.json", "champion": "selection.json", "report": "report.json", "bento": "bento.yaml"}
    found: Outputs = {}
    for name, mark in marks.items():
        for folder in _folders(root, name, mark):
            assert name not in found, f"{root}: {found[name]} and {folder}: expected one run"
            found[name] = folder
    for folder in _folders(root, "model", "model.json"):
        model = read_json(folder / "model.json")["name"]
        (evaluation,) = _folders(folder.parent.parent, "evaluation", "evaluation.json")  # of the same turn of the loop
        found |= {f"model {model}": folder, f"evaluation {model}": evaluation}
    return found


def differences(left: Outputs, right: Outputs) -> list[str]:
    """What is not equal, a sentence each. Times, costs and the code's commit are not looked at."""
    said = [f"{name}: written by one of them only" for name in sorted(left.keys() ^ right.keys())]
    for name in sorted(left.keys() & right.keys()):
        kind = name.partition(" ")[0]
        said += [f"{name}: {sentence}" for sentence in _COMPARED[kind](left[name], right[name])]
    return said


def _folders(root: Path, name: str, mark: str) -> list[Path]:
    return sorted(path.parent for path in root.rglob(mark) if path.parent.name == name)


def _files(left: Path, right: Path) -> Iterator[str]:
    yield from _hashes(hash_files(left), hash_files(right))


def _hashes(one: dict[str, str], other: dict[str, str]) -> Iterator[str]:
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            yield f"{name}: {'other bytes' if name in one and name in other else 'in one of them only'}"


def _features(left: Path, right: Path) -> Iterator[str]:
    """A history's segments have random names, which its manifest holds: places in that list stand for them."""
    found = []
    for folder in (left, right):
        hashes = {name: h for name, h in hash_files(folder).items() if name not in STAMPED}
        for manifest in sorted(folder.rglob("manifest.json")):
            text, place = manifest.read_text(encoding="utf-8"), manifest.parent.relative_to(folder).as_posix()
            for order, segment in enumerate(dict.fromkeys(re.findall(r"segment-\w+", text))):
                text = text.replace(segment, f"segment {order}")
                hashes = {name.replace(f"{place}/{segment}/", f"{place}/segment {order}/"): h for name, h in hashes.items()}
            hashes[f"{place}/manifest.json"] = text
        found.append(hashes)
    yield from _hashes(*found)


def _model(left: Path, right: Path) -> Iterator[str]:
    cards = [read_json(folder / "model.json") | {"weights": None} for folder in (left, right)]  # bytes and hash of the weights
    yield from _values(cards[0], cards[1])
    one, other = (load_file(folder / "model.safetensors") for folder in (left, right))
    if one.keys() != other.keys():
        yield f"tensors {sorted(one.keys() ^ other.keys())} in one of them only"
    for name in sorted(one.keys() & other.keys()):
        scale = max(1e-3, abs(one[name]).max(initial=0))
        if one[name].shape != other[name].shape or abs(one[name] - other[name]).max(initial=0) > TOLERANCE * scale:
            yield f"tensor {name} differs"


def _evaluation(left: Path, right: Path) -> Iterator[str]:
    one, other = (read_json(folder / "evaluation.json")["splits"] for folder in (left, right))
    yield from _values(one, other)


def _champion(left: Path, right: Path) -> Iterator[str]:
    chosen = [read_json(folder / "selection.json") for folder in (left, right)]
    one, other = ({"incumbent": c["incumbent"], **{stage: c[stage]["name"] for stage in ("retriever", "ranker")}} for c in chosen)
    yield from _values(one, other)


def _report(left: Path, right: Path) -> Iterator[str]:
    reports = [read_json(folder / "report.json") for folder in (left, right)]
    one, other = ({name: report[name] for name in ("verdict", "a", "b", "difference")} for report in reports)
    yield from _values(one, other)


def _bento(left: Path, right: Path) -> Iterator[str]:
    one, other = left / "src", right / "src"
    for package in ("longtrail", "features", "serving"):
        yield from _files(one / package, other / package)
    for table in ("catalogue.parquet", "users.parquet"):
        if (one / "artifacts" / table).read_bytes() != (other / "artifacts" / table).read_bytes():
            yield f"{table}: other bytes"
    for part in ("retriever", "ranker"):
        yield from (f"{part}: {sentence}" for sentence in _model(one / "artifacts" / part, other / "artifacts" / part))


def _values(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Plain values; numbers within the tolerance, of 1 where they are small."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(one.keys() | other.keys()):
            yield from _values(one.get(name), other.get(name), f"{where}.{name}".lstrip("."))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for place, pair in enumerate(zip(one, other, strict=True)):
            yield from _values(*pair, f"{where}[{place}]")
    elif isinstance(one, float) and isinstance(other, float):
        if not math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield f"{where}: {one} and {other}"
    elif one != other:
        yield f"{where}: {one!r} and {other!r}"


_COMPARED = {
    "tables": _files,
    "features": _features,
    "model": _model,
    "evaluation": _evaluation,
    "champion": _champion,
    "report": _report,
    "bento": _bento,
}
