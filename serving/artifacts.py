"""What a Bento carries for the service, opened and checked against each other. Written by components.package, read here.

`artifacts/` of the Bento:
  manifest.json                         Manifest
  params.yaml                           the settings everything was made with
  retriever/ ranker/                    model folders (weights as safetensors, card)
  index/                                where the retriever's items are RecJPQ's: their index, memory-mapped, so that workers share its pages
  catalogue.parquet users.parquet       vocabularies; item statistics at the end of the log
  feast/                                feature definitions and the snapshot of the online store
  parity.parquet                        requests with their offline scores (serving.parity)
  arms/NAME/                            further rankers of a live experiment, each with a parity.parquet of its own
  reference.json                        histograms of training's features (longtrail.drift)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict
from pydantic import ValidationError as PydanticError

from longtrail.catalogue import Catalogue
from longtrail.config import ServingSettings, load_config
from longtrail.config.experiments import CHAMPION, INCUMBENT, PACKAGED
from longtrail.errors import ModelError
from longtrail.models.contracts import Sizes
from longtrail.models.store import LoadedModel, check_fits, load_model
from longtrail.retrieval.exact import load_index
from longtrail.retrieval.index import Index
from serving.integrity import check_files, check_labels

ARTIFACTS, ARMS, PARITY = "artifacts", "arms", "parity.parquet"


class Lineage(BaseModel):
    """SHA-256 (hex) of what the Bento was made from; the commit of the code, null outside a git checkout."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    raw_data: str
    validation: str
    feature_definitions: str
    features: str
    parameters: str
    code: str | None


class Manifest(BaseModel):
    """What stands in the Bento and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    arm: str
    retriever: str
    ranker: str
    champion: str
    incumbent: str
    verdict: str
    arms: tuple[str, ...] = ()  # rankers beside `ranker`
    prior_click_rate: float
    actions: tuple[str, ...]
    users: int
    sizes: Sizes
    lineage: Lineage
    files: dict[str, str]  # SHA-256 (hex) of every other file of `artifacts`, by its path from there

    def ranker_of(self, model: str) -> str:
        """The name of the ranker that an arm's `model` means: itself, or by its role."""
        return {PACKAGED: self.ranker, CHAMPION: self.champion, INCUMBENT: self.incumbent}.get(model, model)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Raises ModelError naming the file and every bad key."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(f"{path}: no such file; expected the manifest of a Bento") from None
        except PydanticError as error:
            keys = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
            raise ModelError(f"{path}: {keys}") from None


@dataclass(frozen=True, kw_only=True)
class Artifacts:
    """An open `artifacts` folder."""

    folder: Path
    manifest: Manifest
    settings: ServingSettings
    catalogue: Catalogue
    users: dict[str, int]  # raw key to dense id
    retriever: LoadedModel
    ranker: LoadedModel
    index: Index
    exclude_seen: bool  # that of RetrievalSettings
    more_rankers: Mapping[str, LoadedModel]  # by name, those of `manifest.arms`

    @classmethod
    def open(cls, folder: Path) -> "Artifacts":
        """Raises ModelError where a file is not the one that was packaged, or a model does not fit the catalogue, the actions or the manifest."""
        manifest = Manifest.read(folder / "manifest.json")
        check_labels(folder, manifest)
        check_files(folder, manifest.files)
        config = load_config(folder / "params.yaml")
        retriever = load_model(folder / "retriever")
        opened = cls(
            folder=folder,
            manifest=manifest,
            settings=config.serving,
            catalogue=Catalogue.open(folder / "catalogue.parquet"),
            users=_users(folder / "users.parquet", manifest.users),
            retriever=retriever,
            ranker=load_model(folder / "ranker"),
            index=load_index(folder / "index", retriever.module, config.retrieval, threads=config.serving.threads),
            exclude_seen=config.retrieval.exclude_seen,
            more_rankers={name: load_model(folder / ARMS / name) for name in manifest.arms},
        )
        _require(folder / "catalogue.parquet", "items", opened.catalogue.items, manifest.sizes.items)
        models = [("retriever", manifest.retriever, opened.retriever), ("ranker", manifest.ranker, opened.ranker)]
        models += [(f"{ARMS}/{name}", name, model) for name, model in opened.more_rankers.items()]
        for part, name, model in models:
            _require(folder / part, "name", model.card.name, name)
            check_fits(model.card, manifest.sizes, manifest.actions)
        for asked in config.serving.experiment.models:
            if manifest.ranker_of(asked) not in opened.rankers:
                raise ModelError(f"{folder / ARMS}: no ranker {asked!r}, which serving.experiment names; expected it packaged with the others")
        return opened

    @property
    def rankers(self) -> dict[str, LoadedModel]:
        """Every ranker by name."""
        return {self.manifest.ranker: self.ranker, **self.more_rankers}

    def parity_files(self) -> dict[str, Path]:
        """Ranker to its file of requests with offline scores."""
        return {self.manifest.ranker: self.folder / PARITY, **{name: self.folder / ARMS / name / PARITY for name in self.more_rankers}}

    @property
    def snapshot(self) -> Path:
        return self.folder / "feast"


def _users(path: Path, expected: int) -> dict[str, int]:
    table = pq.read_table(path, columns=["user_key", "user_id"])
    users = dict(zip(table["user_key"].to_pylist(), table["user_id"].to_pylist(), strict=True))
    _require(path, "users", len(users), expected)
    return users


def _require(path: Path, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ModelError(f"{path}: {what}: found {found!r}; the manifest says {expected!r}")
