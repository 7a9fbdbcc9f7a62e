"""What items that came after a model start from when it goes on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from longtrail.config import SplitSettings
from longtrail.examples import FeatureSet
from longtrail.examples.features import column
from longtrail.models.registry import build_model
from longtrail.models.vocabulary import Vocabulary
from longtrail.training.continuing import continue_from, neighbour_vectors
from longtrail.training.interactions import before_held_out, interaction_matrix, unlabelled_until
from tests.test_training_continuing import SETTINGS, older, told_before
from tests.toy import toy_features


@pytest.fixture(scope="module")
def features(toy_features_folder: Path) -> FeatureSet:
    return FeatureSet.open(toy_features_folder)


def test_new_items_start_the_same_whatever_the_ids(features: FeatureSet) -> None:
    """Known items in the same order, new ones scattered among them or behind: the same vector for the same item."""
    now = Vocabulary.read(features.folder / "catalogue.parquet")
    held = np.sort(np.random.default_rng(0).permutation(len(now.items))[:-20])
    previous = older(features, "din")
    table = previous.module.state_dict()["embedding.items.table"]
    scattered: Any = build_model(SETTINGS["din"], features.sizes)
    continue_from(
        scattered, features, replace(previous, vocabulary=Vocabulary(items=now.items.take(pa.array(held)), categories=now.categories[:-1])), seed=0
    )
    order = np.concatenate([[0], held + 1, np.setdiff1d(np.arange(len(now.items)), held) + 1])
    expected = neighbour_vectors(table, told_before(features, order[len(held) + 1 :])[:, order])
    assert torch.equal(scattered.embedding.items.table.detach()[order], torch.cat([table, expected]))


@pytest.mark.parametrize("name", ["din", "sasrec"])
def test_new_items_of_a_ranker_start_without_the_clicks_it_learns_from(name: str, toy_tables_folder: Path, tmp_path: Path) -> None:
    """Of the older half of the newest days, and of nothing from the requests held out on; next items are learnt from all."""
    features = FeatureSet.open(toy_features(toy_tables_folder, tmp_path / "features", SplitSettings(kind="leave_one_out")))
    since = int(np.quantile(column(features.examples("train"), "timestamp"), 0.5))
    previous = older(features, name)
    module: Any = build_model(SETTINGS[name], features.sizes)
    continue_from(module, features, previous, seed=0, since=since)
    table = previous.module.state_dict()["embedding.items.table" if name == "din" else "items.table"]
    told = before_held_out(features)
    until = unlabelled_until(told, since=since)
    matrices = {"all": interaction_matrix(features, binary=True), "told": interaction_matrix(told, binary=True, until=until)}
    found = (module.embedding.items if name == "din" else module.items).table.detach()[-20:]
    wanted = {key: neighbour_vectors(table, matrix_UN) for key, matrix_UN in matrices.items()}
    assert torch.equal(found, wanted["told" if name == "din" else "all"])
    assert not torch.equal(wanted["told"], wanted["all"])
