"""The table of an evaluation's page that says which training the figures are of, from the model's card and lineage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longtrail.commits import short_commit
from longtrail.files import read_json
from longtrail.models.store import CARD, LINEAGE

_SHORT = 12  # digits of a hash: enough to tell two apart


def trained_rows(model: Path) -> list[list[str]]:
    """[what, value] of a model folder that can be loaded. A lineage of before some field was written, or none, leaves its rows out."""
    card = read_json(model / CARD)
    lineage = read_json(model / LINEAGE) if (model / LINEAGE).is_file() else {}
    rows = [
        ("settings", _flat(card["settings"])),
        ("training", _flat(lineage.get("training") or {})),
        ("epochs", _epochs(lineage.get("validation") or {})),
        ("parameters", _parameters(lineage.get("parameters") or {})),
        ("sizes", _flat(card["sizes"])),
        ("data", _data(lineage)),
        ("went on from", (lineage.get("previous") or "")[:_SHORT]),
        ("code", short_commit(lineage.get("code") or "")),
        ("versions", _flat(lineage.get("versions") or {})),
        ("hash of the features", lineage.get("features", "")[:_SHORT]),
        ("hash of the settings", lineage.get("params", "")[:_SHORT]),
        ("hash of the weights", card["weights"]["sha256"][:_SHORT]),
    ]
    return [[what, value] for what, value in rows if value]


def _flat(values: Mapping[str, Any], under: str = "") -> str:
    """`width 64, items.kind dense`: what is None is left out."""
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.append(_flat(value, f"{under}{name}."))
        elif value is not None:
            found.append(f"{under}{name} {'–'.join(map(str, value)) if isinstance(value, list) else value}")
    return ", ".join(filter(None, found))


def _epochs(validation: Mapping[str, Any]) -> str:
    if not validation:
        return ""
    value = "unknown" if validation["value"] is None else f"{validation['value']:.4f}"
    best = f"{validation['best_epoch']} is the best of {validation['epochs']}" if validation["epochs"] else "none: fitted by counting"
    return f"{best}; {validation['metric']} {value} on the validation split as training judges it"


def _parameters(parameters: Mapping[str, int]) -> str:
    return f"{parameters['trained']:,} trained, {parameters['frozen']:,} frozen" if parameters else ""


def _data(lineage: Mapping[str, Any]) -> str:
    """The log's kind, the split, and from when to when was learnt."""
    data = lineage.get("data") or {}
    split = data.get("split") or {}
    counts = _flat({name.replace("_", " "): value for name, value in (split.get("train") or {}).items()})
    parts = [
        data.get("dataset"),
        f"{split['kind']} split" if split else None,
        f"from {lineage['since']}" if lineage.get("since") else None,
        f"until {lineage['trained_until']}" if lineage.get("trained_until") else None,
        f"training period: {counts}" if counts else None,
    ]
    return ", ".join(filter(None, parts))
