"""The models of the last run, kept where the next one finds them and goes on from them: a folder, or an s3:// address.

`STORE/NAME/SETTINGS` holds the newest model of that name and those settings (their hash), as components.publish keeps folders: a reader never meets
half a model, and a changed setting learns from nothing once and then goes on by itself.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from components.fetch import fetch as fetch_folder
from components.publish import publish as publish_folder
from components.published import read_manifest
from components.remote import answering, locate
from longtrail.config import Config
from longtrail.errors import ModelError
from longtrail.files import read_json
from longtrail.models.vocabulary import FILE as VOCABULARY

log = logging.getLogger(__name__)

FILES = ("model.safetensors", "model.json", "lineage.json")  # learning curves stay behind


def fetch(store: str, name: str, config: Config, to: Path) -> Path | None:
    """The newest model `name` with the settings of `config`, as the folder `to`; None where there is none yet. Raises StorageError."""
    address = _address(store, name, config.models[name].model_dump(mode="json"))
    files, place = locate(address)
    with answering(address):
        there = read_manifest(files, place, address) is not None
    if not there:
        log.info("%s: no earlier model with these settings: it learns from nothing", address)
        return None
    fetch_folder(address, to)
    return to


def publish(models: list[Path], store: str) -> list[str]:
    """Leave model folders for the next run; returns where each lies. Raises ModelError for a folder without a model, StorageError."""
    return [_publish(model, store) for model in models]


def _publish(model: Path, store: str) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            card = read_json(model / "model.json")
            address = _address(store, card["name"], card["settings"])
            copy_model(model, Path(scratch))
        except (OSError, KeyError, ValueError) as error:
            raise ModelError(f"{model}: not a model folder: {error}; expected what train writes") from None
        publish_folder(address, Path(scratch))
    return address


def copy_model(model: Path, to: Path) -> None:
    """What a model needs to be gone on from. Raises OSError where it is not there; models from before they had a vocabulary are copied without."""
    for file in (*FILES, *([VOCABULARY] if (model / VOCABULARY).exists() else [])):
        shutil.copyfile(model / file, to / file)


def nothing_new(previous: Path, features: Path) -> bool:
    """Whether `previous` has already learnt from the whole training period of `features`."""
    until = read_json(previous / "lineage.json").get("trained_until")
    return until is not None and until == read_json(features / "features.json")["split"]["valid_from"]


def _address(store: str, name: str, settings: Any) -> str:
    return f"{store.rstrip('/')}/{name}/{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]}"
