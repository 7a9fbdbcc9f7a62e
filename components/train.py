"""Step `train`: one model, from the features folder to a folder of weights, card, lineage and learning curve."""

import csv
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from components.command import run
from components.lineage import lineage_of
from longtrail.config import Config, load_config
from longtrail.errors import ConfigError, HistoryError, ModelError, NothingNewError
from longtrail.files import atomic_directory, atomic_file, hash_path, read_json
from longtrail.times import iso, micros

log = logging.getLogger("train")


def train(
    model: Annotated[str, typer.Option(help="name of a model in `models` of params.yaml")],
    features: Annotated[Path, typer.Option(help="folder written by build_features")] = Path("build/features"),
    params: Annotated[Path, typer.Option(help="settings")] = Path("params.yaml"),
    out: Annotated[Path | None, typer.Option(help="folder to write; default: build/models/MODEL")] = None,
    checkpoints: Annotated[Path, typer.Option(help="folder of resume files: a killed run goes on from there")] = Path("build/checkpoints"),
    previous: Annotated[
        Path | None, typer.Option(help="folder of this model as trained on an earlier state of the log: go on from its weights")
    ] = None,
    since: Annotated[
        datetime | None, typer.Option(help="with `previous`: learn only from what happened from then on (UTC); default: where `previous` stopped")
    ] = None,
) -> None:
    """Train one model and write its weights, card, lineage and learning curve.

    A killed run, started again with nothing changed, resumes after its last whole epoch. With --previous, a daily run learns from the newest
    days alone: a fraction of the cost of learning everything again (docs/training.md).
    """
    config = load_config(params)
    if model not in config.models:
        raise ConfigError(f"--model {model}: {params} has no such model; expected one of {', '.join(config.models)}")
    since_us = None if since is None else micros(since)
    train_model(config, model, features=features, out=out or Path("build/models") / model, checkpoints=checkpoints, previous=previous, since=since_us)


def train_model(
    config: Config, name: str, *, features: Path, out: Path, checkpoints: Path, previous: Path | None = None, since: int | None = None
) -> None:
    """What the command does, with settings already read. `since` in UTC µs.

    Raises what longtrail.training.train does, ConfigError where `since` comes without `previous`, ModelError where `previous` is no model folder.
    """
    if since is not None and previous is None:
        raise ConfigError(
            f"--since {iso(since)}: there is no --previous, so a model would learn from nothing, of the newest part of the log alone; "
            "expected --previous with the folder of the model to go on from, or no --since"
        )
    # Read by OpenMP when torch is first imported. Threads that spin while they wait make training 10 to 50 times slower as soon as anything else
    # wants a core; threads that sleep cost about a third of the speed of an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Read by torch when it is first imported. Batches of long histories are tens of megabytes a tensor, and their first touch in 4 KB pages took a
    # quarter of a training step; with huge pages, which most kernels give on request, it is free.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from longtrail.examples import FeatureSet  # torch takes seconds: --help and a bad params.yaml need not wait for it
    from longtrail.models.store import CARD, LINEAGE, save_model
    from longtrail.models.vocabulary import write_vocabulary
    from longtrail.training import is_main_process, train

    if previous is not None:
        _check_folder(previous)
    settings = config.models[name]
    data = hash_path(features / "features.json")
    feature_set = FeatureSet.open(features)
    stopped = trained_until(previous) if previous is not None and since is None else None
    since = stopped if since is None else since
    arguments: dict[str, Any] = {
        "data": data,
        "checkpoints": checkpoints,
        "ranking_metric": config.selection.ranking.metric,
        "since": since,
        "previous": None if previous is None else load_previous(previous),
        "exclude_seen": config.retrieval.exclude_seen,
    }
    if not is_main_process():  # on several devices Lightning starts this command again for each; the first one writes
        with _nothing_newer(previous, stopped):
            train(feature_set, settings, name, config.training, **arguments)
        return
    with atomic_directory(out) as folder:
        with learning_curves(folder / "dvclive") as report, _nothing_newer(previous, stopped):
            trained = train(feature_set, settings, name, config.training, report=report, **arguments)
        card = trained.loaded(feature_set, name).card
        until = feature_set.meta["split"]["valid_from"]
        if previous is not None and trained.epochs and not trained.best_epoch:
            until = read_json(previous / LINEAGE).get("trained_until")  # what came since is still to be learnt from
            log.warning("%s: no epoch was better on the validation split than %s, whose weights are kept", name, previous)
        before = None if previous is None else read_json(previous / CARD)["weights"]["sha256"]
        start = since if trained.epochs else None  # counts are of the whole training period
        lineage = lineage_of(config, name, trained, meta=feature_set.meta, features=data, since=start, until=until, previous=before)
        save_model(folder / "model", trained.module, card, lineage)  # it replaces the folder it is given, the curves with it
        write_vocabulary(features / "catalogue.parquet", folder / "model")
        for file in (folder / "model").iterdir():
            file.replace(folder / file.name)
        (folder / "model").rmdir()
        write_curve(folder / "learning_curve.csv", trained.curve)
    if trained.checkpoint is not None:
        trained.checkpoint.remove()
    log.info("%s: %s", out, trained.summary())


def _check_folder(previous: Path) -> None:
    """Raises ModelError where `previous` is not what train writes."""
    from longtrail.models.store import CARD, LINEAGE, WEIGHTS

    if not previous.is_dir():
        raise ModelError(f"--previous {previous}: no such folder; expected the folder of a model, as train writes it")
    for name in (CARD, WEIGHTS, LINEAGE):
        if not (previous / name).is_file():
            raise ModelError(f"--previous {previous}: holds no {name}; expected the folder of a model, as train writes it")


@contextmanager
def _nothing_newer(previous: Path | None, stopped: int | None) -> Iterator[None]:
    """Where training was to begin when `previous` had `stopped` (UTC µs) and there is nothing, the error says so."""
    try:
        yield
    except NothingNewError as error:
        if stopped is None:
            raise
        raise HistoryError(f"--previous {previous}: trained until {iso(stopped)}, and the training period has nothing newer: {error}") from None


def load_previous(model: Path) -> Any:
    """The LoadedModel of a model folder, with what its ids mean. Raises ModelError where something is missing or damaged."""
    from longtrail.models.store import load_model
    from longtrail.models.vocabulary import FILE, Vocabulary

    if not (model / FILE).exists():  # of a model from before there was one
        log.warning("%s: no such file: ids are taken to mean what they meant; an event that came late may have moved them", model / FILE)
        return load_model(model)
    return replace(load_model(model), vocabulary=Vocabulary.read(model / FILE))


def trained_until(model: Path) -> int:
    """Until when a model folder has learnt from the log, UTC µs. Raises ModelError where its lineage does not say."""
    from longtrail.models.store import LINEAGE

    try:
        lineage = read_json(model / LINEAGE)
    except ValueError as error:
        raise ModelError(f"{model / LINEAGE}: not JSON: {error}") from None
    until = lineage.get("trained_until") if isinstance(lineage, dict) else None
    try:
        return micros(datetime.fromisoformat(until))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ModelError(f"{model / LINEAGE}: trained_until is {until!r}; expected a time (a temporal split has one), or --since") from None


def write_curve(path: Path, rows: list[dict[str, float]]) -> None:
    """One line an epoch. No times: the same training writes the same file."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_file(path) as aside, aside.open("w", newline="", encoding="utf-8") as text:
        writer = csv.DictWriter(text, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def learning_curves(folder: Path) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yields a function that shows a row to DVC while training goes on (`dvc plots show`, `dvc exp show`).

    Inside a git repository without DVC nothing is shown, because DVCLive would make a DVC repository of it, unasked.
    """
    above = [Path.cwd(), *Path.cwd().parents]
    if any((place / ".git").exists() for place in above) and not any((place / ".dvc").is_dir() for place in above):
        log.info("no DVC repository here: the learning curve goes to learning_curve.csv only")
        yield lambda row: None
        return
    from dvclive import Live

    with Live(str(folder), save_dvc_exp=False, dvcyaml=None, report=None) as live:

        def show(row: dict[str, float]) -> None:
            live.step = int(row["epoch"])
            for name, value in row.items():
                if name != "epoch":
                    live.log_metric(name.replace("@", "_at_"), value)
            live.make_summary()

        yield show


if __name__ == "__main__":
    run(train)
