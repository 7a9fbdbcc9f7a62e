"""The training step with a memory: it goes on from the last run's model, where there is one of the same settings."""

import logging
from pathlib import Path
from typing import Any

from components.train import train
from longtrail.config import parse_config
from longtrail.errors import ConfigError
from longtrail.files import atomic_directory
from longtrail.models.vocabulary import moved_ids
from pipelines.artifacts import settings_file
from pipelines.previous import copy_model, fetch, nothing_new

log = logging.getLogger(__name__)


def train_or_continue(*, settings: dict[str, Any], name: str, store: str, features: Path, out: Path, scratch: Path) -> None:
    """Train `name` to the folder `out`: from nothing where `store` is empty or has no such model, else on the days since that one.

    A model that has learnt the whole of the training period already is taken over as it is, unless ids have moved meanwhile: then it is trained from
    nothing. Raises what `train` and `fetch` do.
    """
    config = parse_config(settings)
    if name not in config.models:
        raise ConfigError(f"the pipeline's parameter models names {name!r}; expected some of {', '.join(config.models)}")
    previous = fetch(store, name, config, scratch / "previous") if store else None
    if previous is not None and nothing_new(previous, features):
        if not moved_ids(previous, features / "catalogue.parquet"):
            log.info("%s: nothing has come since it was trained: taken over as it is", name)
            with atomic_directory(out) as aside:
                copy_model(previous, aside)
            return
        previous = None
    train(model=name, features=features, params=settings_file(settings), out=out, checkpoints=scratch / "checkpoints", previous=previous)
