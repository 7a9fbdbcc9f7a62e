"""A model that goes on from the newest days, beside the same model as it was and one trained again from nothing. Quality and cost, on real data.

    python -m benchmarks.incremental                                    # MovieLens-1M, about half an hour on 2 cores
    python -m benchmarks.incremental --users 1500 --models din          # a quarter of its users, minutes on one core
    python -m benchmarks.incremental --source ml-100k --models sasrec
    python -m benchmarks.incremental --source amazon-beauty-5core.parquet --models sasrec --models sasrec_recjpq    # a catalogue that keeps growing
    python -m benchmarks.incremental --models din --updates 5                                                       # update after update

A log is cut at an instant: the model before it was trained on what had happened by then (`as it was`). Then more of the log comes. `goes on` learns
from the newer part alone, from those weights, in one update or in several, each from the one before; `from nothing` learns from all of it. All three
are judged on the same requests, which none of them has learnt from: those of the tenth of the log that comes next, which chose the epochs of the
two newer ones (and its first third those of the first model), and those of the tenth after it, `later`, when an update is due again. Retrievers also
on those targets alone that the first model had never met ("new items"). The first model recommends what it knows, as it would if it were still in
service: an item that came later is a miss.
"""

import logging
import platform
import tempfile
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import typer
import yaml
from pydantic import TypeAdapter

from components.build_features import build_features
from components.command import run
from components.ingest import ingest
from components.validate import validate
from longtrail.commits import git_commit
from longtrail.config import EvaluationSettings, Model, TrainingSettings
from longtrail.evaluation import evaluate, predict_retrieval
from longtrail.files import hash_path, write_json
from longtrail.metrics import row_ndcg
from longtrail.times import micros

log = logging.getLogger("incremental")

METRICS = {"ranking": ("auc", "gauc"), "retrieval": ("ndcg@10", "recall@10")}

COLUMNS = ("user", "item", "timestamp", "action", "value", "category")
MODELS = """
sasrec: &sasrec {stage: retrieval, kind: sasrec, width: 64, dropout: 0.2, max_history: 100, batch_size: 64, max_epochs: 15, patience: 3, attention: {kind: full, positions: learned}}
sasrec_recjpq: {<<: *sasrec, items: {kind: recjpq, splits: 8}}
din: {stage: ranking, kind: din, hidden: [64, 32], attention_hidden: [8], max_history: 100, dropout: 0.2, weight_decay: 0.1, learning_rate: 0.001, max_epochs: 2, patience: 1}
sam: {stage: ranking, kind: sam, hidden: [64, 32], max_history: 100, dropout: 0.2, weight_decay: 0.1, learning_rate: 0.001, read_scale: sqrt, max_epochs: 2, patience: 1}
"""  # noqa: E501


def incremental(
    source: Annotated[
        str, typer.Option(help="MovieLens: a variant or its zip; for retrievers a Parquet file of user, item, ts (seconds) too")
    ] = "../shared/data/ml-1m.zip",
    models: Annotated[list[str] | None, typer.Option(help="of those above; default: all")] = None,
    cut: Annotated[float, typer.Option(help="share of the log that the first model knows; what comes then, until 0.8, is learned by updates")] = 0.75,
    updates: Annotated[int, typer.Option(min=1, help="equal parts that it is learned in, each model going on from the one before")] = 1,
    users: Annotated[int | None, typer.Option(help="keep so many of the log's users, drawn at random; default: all")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    out: Annotated[Path, typer.Option()] = Path("build/benchmarks/incremental.json"),
) -> None:
    """Train, go on, train again; print what each costs and is worth."""
    with tempfile.TemporaryDirectory() as scratch:
        params = Path(scratch) / "params.yaml"
        dataset: dict[str, Any] = {"kind": "movielens", "source": source}
        if source.endswith(".parquet"):
            dataset = {"kind": "event_log", "source": str(Path(source).resolve()), "columns": {"user": "user", "item": "item", "timestamp": "ts"}}
        params.write_text(yaml.safe_dump({"dataset": dataset}), encoding="utf-8")
        ingest(params, Path(scratch) / "tables")
        events = _events(Path(scratch) / "tables")
        if users is not None:
            drawn = np.random.default_rng(0).permutation(events["user"].unique())[:users]
            events = events[events["user"].isin(drawn)]
        states = [_early(Path(scratch) / f"state{i}", events, known) for i, known in enumerate(np.linspace(cut, 0.8, updates + 1)[:-1])]
        states.append(_features(Path(scratch) / "whole", events, {"valid_share": 0.1, "test_share": 0.1}))
        rows = [row for name in models or yaml.safe_load(MODELS) for row in _compare(name, states, TrainingSettings(threads=threads))]
    machine = f"{platform.machine()}, {platform.processor() or 'CPU'}"
    made = datetime.now(UTC).isoformat(timespec="minutes")
    write_json(out, {"made": made, "commit": git_commit(), "machine": machine, "source": source, "users": users, "updates": updates, "rows": rows})
    typer.echo(pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.4f}"))


def _early(folder: Path, events: pd.DataFrame, known: float) -> Path:
    """The features folder of the log when a share `known` of it could be learned from; a tenth more is for choosing epochs, as in the whole log."""
    early = events[events["timestamp"] < events["timestamp"].quantile(known / 0.9, interpolation="nearest")]
    return _features(folder, early, {"valid_share": 0.1, "test_share": 0.001})


def _features(folder: Path, events: pd.DataFrame, split: dict[str, float]) -> Path:
    """The features folder of one state of the log."""
    folder.mkdir(parents=True)
    events.to_parquet(folder / "log.parquet")
    columns = {name: name for name in COLUMNS if not events[name].isna().all()}
    dataset: dict[str, Any] = {"kind": "event_log", "source": str(folder / "log.parquet"), "columns": columns, "timestamp_unit": "us"}
    if "value" in columns:
        dataset["like_from"] = 4.0
    loose = {"max_new_item_share": 1.0, "max_duplicate_share": 1.0}
    params = folder / "params.yaml"
    params.write_text(yaml.safe_dump({"dataset": dataset, "split": split, "validation": loose}), encoding="utf-8")
    ingest(params, folder / "tables")
    validate(folder / "tables", params, folder / "validation")
    build_features(folder / "tables", folder / "validation", params, folder / "features")
    return folder / "features"


def _events(tables: Path) -> pd.DataFrame:
    """The log again, with its raw keys: dense ids are given in order of appearance, so an earlier state of the log gives the same ones."""
    rows = pq.read_table(tables / "interactions.parquet").to_pandas()
    users, items = (pq.read_table(tables / f"{name}s.parquet").to_pandas().set_index(f"{name}_id") for name in ("user", "item"))
    columns = {
        "user": users.loc[rows["user_id"], "user_key"].to_numpy(),
        "item": items.loc[rows["item_id"], "item_key"].to_numpy(),
        "timestamp": rows["timestamp"].to_numpy().astype("datetime64[us]").astype("int64"),
        "action": rows["action"],
        "value": rows["value"],
        "category": items.loc[rows["item_id"], "category"].to_numpy(),
    }
    return pd.DataFrame(columns)


def _compare(name: str, states: list[Path], training: TrainingSettings) -> list[dict[str, Any]]:
    """A row for each of the three ways to have a model of today; `states` are features folders of the log, oldest first."""
    from longtrail.examples import FeatureSet
    from longtrail.models.store import LoadedModel, ModelCard
    from longtrail.models.vocabulary import Vocabulary
    from longtrail.training import train

    model = TypeAdapter(Model).validate_python(yaml.safe_load(MODELS)[name])
    log_states = [FeatureSet.open(folder) for folder in states]
    early, late = log_states[0], log_states[-1]
    rows: list[dict[str, Any]] = []

    def loaded(module: Any, features: FeatureSet) -> LoadedModel:
        card = ModelCard(name=name, settings=model, sizes=features.sizes, actions=features.actions, prior_click_rate=features.prior_click_rate)
        return LoadedModel(module=module, card=card, vocabulary=Vocabulary.read(features.folder / "catalogue.parquet"))

    def trained(features: FeatureSet, **more: Any) -> tuple[LoadedModel, float, int, bool]:
        began = time.process_time()
        found = train(features, model, name, training, data=hash_path(features.folder / "features.json"), **more)
        return loaded(found.module, features), (time.process_time() - began) / 60, found.epochs, found.best_epoch > 0

    def add(way: str, result: LoadedModel, minutes: float, epochs: int) -> None:
        metrics: dict[str, Any] = {}
        for when, split in (("next", "valid"), ("later", "test")):
            judged = evaluate(result, late, split, EvaluationSettings(k=(10,), replicates=1))
            metrics |= {f"{when} {metric}": judged.metrics[metric].value for metric in METRICS[model.stage]}
            if model.stage == "retrieval":
                metrics |= {f"{when} {metric}": value for metric, value in _of_new_items(result.module, late, early, split).items()}
        rows.append({"model": name, "way": way, **metrics, "CPU minutes": minutes, "epochs": epochs})
        log.info("%s", rows[-1])

    newest, minutes, epochs, _ = trained(early)
    add("as it was", newest, minutes, epochs)
    minutes, epochs, learned = 0.0, 0, True
    for before, after in pairwise(log_states):
        if learned:  # else what came before is still to be learnt from, as components.train has it
            since = micros(datetime.fromisoformat(before.meta["split"]["valid_from"]))
        newest, more_minutes, more_epochs, learned = trained(after, since=since, previous=newest)
        minutes, epochs = minutes + more_minutes, epochs + more_epochs
    updates = len(log_states) - 1
    add("goes on" if updates == 1 else f"goes on {updates} times", newest, minutes, epochs)
    add("from nothing", *trained(late)[:3])
    return rows


def _of_new_items(module: Any, late: Any, early: Any, split: str) -> dict[str, float]:
    """NDCG@10 of the targets that the first model had met nowhere, and their share of all targets."""
    from longtrail.retrieval.exact import exact_index

    rows = predict_retrieval(module, late, split, k=10, max_per_user=None, index=exact_index(module))
    met = np.zeros(late.sizes.items + 1, bool)
    keys = [key for key, events in zip(early.catalogue.keys, early.catalogue.train_events.tolist(), strict=True) if events]
    met[[late.catalogue.id_of(key) for key in keys]] = True
    new = ~met[rows.items_n]
    return {"new items: ndcg@10": float(row_ndcg(rows.ranks_n[new], 10).mean()) if new.any() else float("nan"), "their share": float(new.mean())}


if __name__ == "__main__":
    run(incremental)
