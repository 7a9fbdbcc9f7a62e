"""The models of the last run, kept where the next one finds them and goes on from them: a folder, or an s3:// address.

`STORE/NAME/SETTINGS/WEIGHTS/` is a model folder; `STORE/NAME/SETTINGS/latest` names the newest WEIGHTS. Both are hashes. Model files are
written first and the name last, in one piece, so that a reader never meets half a model; models of other settings lie beside each other, so that a
changed setting learns from nothing once and then goes on by itself. Old models stay: deleting them is the store's business.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import fsspec

from longtrail.config import Config
from longtrail.errors import ModelError
from longtrail.files import read_json

log = logging.getLogger(__name__)

FILES = ("model.safetensors", "model.json", "lineage.json")
LATEST = "latest"


def fetch(store: str, name: str, config: Config, to: Path) -> Path | None:
    """The newest model `name` with the settings of `config`, copied to the folder `to`; None where there is none yet. Raises ModelError."""
    place = f"{store.rstrip('/')}/{name}/{_settings(config.models[name])}"
    files, folder = fsspec.core.url_to_fs(place, use_listings_cache=False)
    try:
        newest = files.cat_file(f"{folder}/{LATEST}").decode().strip()
    except FileNotFoundError:
        log.info("%s: no earlier model with these settings: it learns from nothing", place)
        return None
    to.mkdir(parents=True, exist_ok=True)
    try:
        for file in FILES:
            files.get_file(f"{folder}/{newest}/{file}", str(to / file))
    except FileNotFoundError as error:
        raise ModelError(f"{place}/{newest}: {error}; expected {', '.join(FILES)}, as {place}/{LATEST} names it") from None
    log.info("%s: going on from %s", place, newest)
    return to


def publish(models: list[Path], store: str) -> list[str]:
    """Leave model folders for the next run; returns where each lies. Raises ModelError for a folder without a model."""
    return [_publish(model, store) for model in models]


def _publish(model: Path, store: str) -> str:
    try:
        card = read_json(model / "model.json")
        identity = f"{card['name']}/{_digest(card['settings'])}", card["weights"]["sha256"]
    except (OSError, KeyError, ValueError) as error:
        raise ModelError(f"{model}: not a model folder: {error}; expected what train writes") from None
    place, weights = f"{store.rstrip('/')}/{identity[0]}", identity[1]
    files, folder = fsspec.core.url_to_fs(place, use_listings_cache=False)
    files.makedirs(f"{folder}/{weights}", exist_ok=True)
    for file in FILES:
        files.put_file(str(model / file), f"{folder}/{weights}/{file}")
    if "://" in store:
        files.pipe_file(f"{folder}/{LATEST}", weights.encode())  # an object appears whole
    else:
        from longtrail.files import atomic_file

        with atomic_file(Path(folder) / LATEST) as aside:
            aside.write_text(weights, encoding="utf-8")
    return f"{place}/{weights}"


def nothing_new(previous: Path, features: Path) -> bool:
    """Whether `previous` has already learnt from the whole training period of `features`."""
    until = read_json(previous / "lineage.json").get("trained_until")
    return until is not None and until == read_json(features / "features.json")["split"]["valid_from"]


def _settings(model: Any) -> str:
    return _digest(model.model_dump(mode="json"))


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
