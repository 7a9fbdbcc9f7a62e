"""lineage.json of a model folder: what it was trained from and how, enough to do it again. No dates, no durations: equal trainings, equal bytes."""

import hashlib
import json
from importlib import metadata
from typing import TYPE_CHECKING, Any

from longtrail.commits import git_commit
from longtrail.config import Config
from longtrail.times import iso

if TYPE_CHECKING:
    from longtrail.training import Trained


def lineage_of(
    config: Config, name: str, trained: "Trained", *, meta: dict[str, Any], features: str, since: int | None, until: str | None, previous: str | None
) -> dict[str, Any]:
    """What docs/training.md says of lineage.json; the model's own settings are in its card.

    `meta` is features.json and `features` its hash; `since` (UTC µs) and `until` (ISO 8601) bound what was learnt from, and `previous` is the hash
    of the weights that training went on from.
    """
    import torch  # the caller has it already; --help and a bad params.yaml need not wait for it

    parameters = trained.parameters
    return {
        "features": features,
        "code": git_commit(),
        "params": hash_settings(config, name),
        "since": None if since is None else iso(since),
        "trained_until": until,
        "previous": previous,
        # The log's kind is that of params.yaml: features say only which tables they were made from.
        "data": {"dataset": config.dataset.kind, "tables": meta.get("hashes", {}).get("tables"), "split": meta["split"]},
        "training": config.training.model_dump(mode="json"),
        "parameters": {"trained": parameters.trained, "frozen": parameters.frozen},
        "validation": {"metric": trained.metric, "value": trained.value, "best_epoch": trained.best_epoch, "epochs": trained.epochs}
        | ({"exclude_seen": config.retrieval.exclude_seen} if config.models[name].stage == "retrieval" else {}),
        "versions": {"longtrail": _version("longtrail"), "torch": torch.__version__},
    }


def hash_settings(config: Config, name: str) -> str:
    """SHA-256 of everything in params.yaml that this training reads."""
    values: dict[str, Any] = {"model": config.models[name].model_dump(mode="json"), "training": config.training.model_dump(mode="json")}
    if config.models[name].stage == "ranking":
        values["metric"] = config.selection.ranking.metric  # early stopping's
    elif not config.retrieval.exclude_seen:
        values["exclude_seen"] = False
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    """None where the package is used from its folder without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
