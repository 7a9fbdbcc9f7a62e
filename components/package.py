"""Step `package`: the winner as a Bento, a folder that holds everything the endpoint needs, whose scores were checked against the offline ones."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from components.command import QUIET, run
from components.package_arms import sources, write_arms
from longtrail.commits import git_commit
from longtrail.config import Config, load_config
from longtrail.errors import ModelError
from longtrail.files import atomic_directory, hash_files, hash_path, read_json, write_json

log = logging.getLogger("package")

SOURCES = ("longtrail", "features", "serving")
SUFFIXES = {".py", ".html", ".css", ".js", ".svg"}  # code, and the files of the demo page
# What the endpoint imports at run time, and nothing that only the pipeline needs (kfp, great-expectations, dvc, lightning).
REQUIREMENTS = (
    "torch",
    "safetensors",
    "numpy",
    "pandas",
    "pyarrow",
    "duckdb",
    "ibis-framework",
    "pydantic",
    "PyYAML",
    "typer",
    "tqdm",
    "scipy",
    "numba",
)
FEAST_EXTRAS = "duckdb,redis"
PARITY_REQUESTS = 16
_BUILD = "import json, sys, bentoml; bentoml.bentos.build(**json.loads(sys.argv[1]))"


def package(
    champion: Annotated[Path, typer.Option(help="folder written by select")] = Path("build/champion"),
    features: Annotated[Path, typer.Option(help="folder written by build_features")] = Path("build/features"),
    tables: Annotated[Path, typer.Option(help="folder written by ingest")] = Path("build/tables"),
    validation: Annotated[Path, typer.Option(help="folder written by validate")] = Path("build/validation"),
    report: Annotated[Path, typer.Option(help="folder written by ab_test: its verdict decides which ranker is packaged")] = Path("build/ab"),
    params: Annotated[Path, typer.Option(help="settings")] = Path("params.yaml"),
    bento: Annotated[Path, typer.Option(help="the Bento to write")] = Path("build/bento"),
) -> None:
    """Package the retriever with the champion ranker if it won the A/B test, else with the incumbent.

    Raises ModelError where a part is missing, or where the packaged service scores a request otherwise than offline; then `bento` stays as it was.
    """
    from components.package_states import write_states  # torch, which --help need not wait for
    from components.reference import write_reference

    config = load_config(params)
    choice = choose(champion, report)
    arms = sources(config.serving.experiment, choice, champion)
    lineage = lineage_of(config, features=features, tables=tables, validation=validation)
    with tempfile.TemporaryDirectory(prefix=".bento-", dir=_parent(bento)) as workshop:
        stage = Path(workshop) / "stage"
        copy_sources(stage)
        artifacts = stage / "artifacts"
        write_artifacts(artifacts, config=config, champion=champion, features=features, params=params, choice=choice, lineage=lineage, arms=arms)
        offline = partial(write_parity, features=features, retriever=champion / "retriever", exclude_seen=config.retrieval.exclude_seen)
        offline(artifacts / "parity.parquet", ranker=champion / choice["folder"])
        write_arms(artifacts, arms, lambda path, ranker: offline(path, ranker=ranker))
        rankers = [champion / choice["folder"], *arms.values()]
        write_states(artifacts / "states", rankers, features, online_history_length=config.features.online_history_length)
        retrieve, exclude_seen = config.serving.retrieve, config.retrieval.exclude_seen
        write_reference(artifacts / "reference.json", features, retriever=champion / "retriever", retrieve=retrieve, exclude_seen=exclude_seen)
        lineage_labels = {name: value or "" for name, value in lineage.items()}
        labels = {**choice["labels"], **lineage_labels, "manifest": seal(artifacts)}
        built = build(stage, home=Path(workshop) / "home", version=_version(lineage, choice), labels=labels)
        difference = check_scores(built)
        with atomic_directory(bento) as aside:
            aside.rmdir()
            built.rename(aside)
    log.info("%s; scores within %.1e of the offline ones", choice["sentence"], difference)
    log.info('%s is ready: python -m serving.run --bento %s, or bentoml serve "$PWD/%s"', bento, bento, bento)


def choose(champion: Path, report: Path) -> dict[str, Any]:
    """Which ranker: its folder below `champion`, its name and why, as labels and as a sentence. Raises ModelError for a missing file or key."""
    selection, verdict_file = champion / "selection.json", report / "report.json"
    try:
        selected = read_json(selection)
        retriever, winner, incumbent = selected["retriever"]["name"], selected["ranker"]["name"], selected["incumbent"]
        verdict = read_json(verdict_file)["verdict"]
    except FileNotFoundError as error:
        raise ModelError(f"{error.filename}: no such file; expected the output of select and of ab_test") from None
    except (KeyError, ValueError) as error:
        raise ModelError(f"{selection}, {verdict_file}: no {error}; expected what select and ab_test write") from None
    if verdict == "win":
        folder, ranker = "ranker", winner
        sentence = f"packaged the champion {winner}: it won the A/B test against {incumbent}"
    else:
        folder, ranker = "incumbent", incumbent
        sentence = f"packaged the incumbent {incumbent}: the A/B verdict on the champion {winner} is {verdict!r}"
    labels = {"arm": ranker, "ranker": ranker, "retriever": retriever, "champion": winner, "incumbent": incumbent, "verdict": verdict}
    return {"folder": folder, "sentence": sentence, "labels": labels}


def lineage_of(config: Config, *, features: Path, tables: Path, validation: Path) -> dict[str, str | None]:
    """serving.artifacts.Lineage: SHA-256 of what the Bento is made from. Raises ModelError naming a missing file."""
    try:
        (validation / "result.json").stat()  # hash_path takes what is not there for an empty folder
        return {
            "raw_data": read_json(tables / "counts.json")["source_sha256"],
            "validation": hash_path(validation / "result.json"),
            "feature_definitions": read_json(features / "features.json")["hashes"]["feature_definitions"],
            "features": _digest([hash_path(features / name) for name in ("features.json", "feast/feature_store.yaml")]),
            "parameters": _digest(config.model_dump(mode="json")),
            "code": git_commit(),
        }
    except FileNotFoundError as error:
        raise ModelError(f"{error.filename}: no such file; expected the outputs of ingest, validate and build_features") from None


def copy_sources(stage: Path) -> None:
    """The files of SOURCES with SUFFIXES."""
    root = Path(__file__).resolve().parent.parent
    for name in SOURCES:
        for file in sorted(file for file in (root / name).rglob("*.*") if file.suffix in SUFFIXES):
            target = stage / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def write_artifacts(
    folder: Path,
    *,
    config: Config,
    champion: Path,
    features: Path,
    params: Path,
    choice: dict[str, Any],
    lineage: dict[str, str | None],
    arms: Iterable[str],
) -> None:
    """serving.artifacts, but for the parity files and the rankers of `arms`."""
    folder.mkdir(parents=True)
    meta = read_json(features / "features.json")
    for target, source in (("retriever", champion / "retriever"), ("ranker", champion / choice["folder"])):
        if not source.is_dir():
            raise ModelError(f"{source}: no such folder; expected a model, as select writes it")
        shutil.copytree(source, folder / target, ignore=shutil.ignore_patterns("dvclive"))
    write_index(folder / "index", folder / "retriever", config)
    for name in ("catalogue.parquet", "users.parquet"):
        shutil.copyfile(features / name, folder / name)
    if not (features / "feast" / "feature_store.yaml").exists():
        raise ModelError(f"{features / 'feast'}: no feature_store.yaml; expected the Feast repository that build_features writes")
    # The offline files are for training alone.
    shutil.copytree(features / "feast", folder / "feast", ignore=shutil.ignore_patterns("offline", "__pycache__"))
    shutil.copyfile(params, folder / "params.yaml")
    write_json(
        folder / "manifest.json",
        {
            "format": 1,
            **choice["labels"],
            "arms": sorted(arms),
            "prior_click_rate": meta["prior_click_rate"],
            "actions": meta["actions"],
            "users": meta["users"],
            "sizes": meta["sizes"],
            "lineage": lineage,
        },
    )


def write_index(folder: Path, retriever: Path, config: Config) -> None:
    """The index of a retriever with RecJPQ items, in the kind that `retrieval.kind` asks for; nothing for other retrievers and for dense."""
    from longtrail.models.store import load_model
    from longtrail.retrieval.exact import write_index as write

    write(folder, load_model(retriever).module, config.retrieval)


def write_parity(path: Path, features: Path, *, retriever: Path, ranker: Path, exclude_seen: bool = True) -> None:
    """Requests of the test split, from the shortest history to the longest, with the scores that evaluation gives them (serving.parity's schema)."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from longtrail.examples import FeatureSet, RankingBatches, history_tensors
    from longtrail.models.store import load_model
    from longtrail.retrieval.exact import exact_index
    from longtrail.retrieval.index import Exclusion
    from longtrail.schema import ITEM_STATISTICS, USER_STATISTICS

    feature_set = FeatureSet.open(features)
    ranking, retrieval = load_model(ranker), load_model(retriever)
    split = next((name for name in ("test", "valid") if feature_set.examples(name).num_rows), "train")
    examples = feature_set.examples(split)
    reads = [getattr(model.card.settings, "max_history", 1) for model in (ranking, retrieval)]
    requests = RankingBatches(feature_set, split, max_history=reads[0], batch_size=1)

    def row(request: int) -> dict[str, Any]:
        batch, first, last = requests.make(np.array([request])), requests.starts_R1[request], requests.starts_R1[request + 1]
        user, length, shown = requests.users_R[[request]], requests.history_length_R[[request]], examples.slice(first, last - first)
        stored = feature_set.history.gather(user, length, max(reads))
        past = {name: getattr(stored, f"{name}_BL")[0, : stored.lengths_B[0]] for name in ("items", "actions", "times")}
        logits = ranking.module(batch.history, batch.candidates, batch.context)[0]
        read = history_tensors(feature_set.history.gather(user, length, reads[1]), feature_set.catalogue)
        seen = Exclusion(np.array([0, len(past["items"])]), past["items"]) if exclude_seen else None
        retrieved = index.topk(retrieval.module.user_vectors(read), 20, exclude=seen)[1][0]  # type: ignore[operator]
        return {
            "request_id": shown["request_id"][0].as_py(),
            "time": int(requests.times_R[request]),
            **{f"history_{name}": values.tolist() for name, values in past.items()},
            "history_length": int(length[0]),
            **{name: shown[name][0].as_py() for name in USER_STATISTICS},
            "candidates": shown["item_id"].to_pylist(),
            **{name: shown[name].to_pylist() for name in ITEM_STATISTICS},
            "logits": logits.double().tolist(),
            "retrieved": retrieved[retrieved > -torch.inf].double().tolist(),
        }

    by_length = np.argsort(requests.history_length_R, kind="stable")
    chosen = np.unique(by_length[np.linspace(0, len(by_length) - 1, PARITY_REQUESTS).astype(int)])
    with torch.inference_mode():
        index = exact_index(retrieval.module)
        pq.write_table(pa.Table.from_pylist([row(int(request)) for request in chosen]), path)


def seal(artifacts: Path) -> str:
    """Write the hash of every file into the manifest (serving.integrity checks them); returns SHA-256 (hex) of the manifest itself."""
    manifest = artifacts / "manifest.json"
    files = {name: hashed for name, hashed in hash_files(artifacts).items() if name != manifest.name}
    write_json(manifest, {**read_json(manifest), "files": files})
    return hash_path(manifest)


def requirements() -> list[str]:
    """REQUIREMENTS and Feast as they are installed here; BentoML adds itself. Build tags (+cpu) are left out: the index knows what fits."""
    pinned = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]
    return [*pinned, f"feast[{FEAST_EXTRAS}]=={metadata.version('feast')}"]


def build(stage: Path, *, home: Path, version: str, labels: dict[str, str]) -> Path:
    """`bentoml build` into a store of its own, without network; returns the Bento's folder. Raises ModelError with BentoML's message.

    By its Python interface, for the command refuses to work below a hidden folder.
    """
    home.mkdir()
    options = {
        "service": "serving.service:Longtrail",
        "name": "longtrail",
        "version": version,
        "description": "Longtrail: recommends from each person's whole history. What it was made from stands in the labels.",
        "labels": labels,
        "include": [*(f"{name}/" for name in SOURCES), "artifacts/"],
        "python": {"packages": requirements(), "lock_packages": False},
        "build_ctx": str(stage),
    }
    _run(["-c", _BUILD, json.dumps(options)], stage, "bentoml build", BENTOML_HOME=str(home))
    return home / "bentos" / "longtrail" / version


def check_scores(built: Path) -> float:
    """Score the parity requests with the packaged code and weights alone; the largest difference. Raises ModelError where it is too large."""
    kernels = str(built.parents[2] / "numba")  # what is compiled stays out of the Bento
    output = _run(["-m", "serving.parity", "artifacts"], built / "src", "packaged scores differ from the offline ones", NUMBA_CACHE_DIR=kernels)
    return float(output.split()[-1])


def _run(arguments: list[str], folder: Path, what: str, **environment: str) -> str:
    """Run Python in `folder`, whose packages come first; nothing of it is imported here."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**inherited, **QUIET, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ModelError(f"{what}: {(done.stderr.strip() or done.stdout.strip())[-2000:]}")
    return done.stdout


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _version(lineage: dict[str, str | None], choice: dict[str, Any]) -> str:
    """The Bento's version says what it was made from: the same inputs, the same version."""
    return _digest([lineage, choice["labels"]])[:16]


def _parent(path: Path) -> Path:
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    return path.absolute().parent


if __name__ == "__main__":
    run(package)
