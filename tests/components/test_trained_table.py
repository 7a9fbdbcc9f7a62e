"""What an evaluation's page says of the training."""

from pathlib import Path
from typing import Any

import pytest

from components.trained_table import trained_rows
from longtrail.files import write_json

CARD: dict[str, Any] = {
    "settings": {"stage": "ranking", "kind": "din", "hidden": [64, 32], "items": {"kind": "dense"}, "half_life_days": None},
    "sizes": {"items": 5, "categories": 2, "actions": 1},
    "weights": {"sha256": "abcdef" * 11},
}
LINEAGE: dict[str, Any] = {
    "features": "f" * 64,
    "code": "1" * 40 + "-dirty",
    "params": "p" * 64,
    "since": "1998-03-01T00:00:00+00:00",
    "trained_until": "1998-03-07T00:00:00+00:00",
    "previous": "0" * 64,
    "data": {"dataset": "movielens", "tables": "t" * 64, "split": {"kind": "temporal", "train": {"requests": 939}}},
    "training": {"seed": 7, "precision": "auto"},
    "parameters": {"trained": 270_000, "frozen": 2_100_000},
    "validation": {"metric": "auc", "value": 0.73456, "best_epoch": 2, "epochs": 4},
    "versions": {"longtrail": "0.1.0", "torch": "2.13.0"},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_json(tmp_path / "model.json", CARD)
    write_json(tmp_path / "lineage.json", LINEAGE)
    return tmp_path


def test_every_part_of_the_training_is_told(model: Path) -> None:
    assert trained_rows(model) == [
        ["settings", "hidden 64–32, items.kind dense, kind din, stage ranking"],
        ["training", "precision auto, seed 7"],
        ["epochs", "2 is the best of 4; auc 0.7346 on the validation split as training judges it"],
        ["parameters", "270,000 trained, 2,100,000 frozen"],
        ["sizes", "actions 1, categories 2, items 5"],
        [
            "data",
            "movielens, temporal split, from 1998-03-01T00:00:00+00:00, until 1998-03-07T00:00:00+00:00, training period: requests 939",
        ],
        ["went on from", "000000000000"],
        ["code", "111111111111-dirty"],
        ["versions", "longtrail 0.1.0, torch 2.13.0"],
        ["hash of the features", "ffffffffffff"],
        ["hash of the settings", "pppppppppppp"],
        ["hash of the weights", "abcdefabcdef"],
    ]


def test_counts_have_no_epoch_and_what_cannot_be_judged_no_value(model: Path) -> None:
    write_json(model / "lineage.json", LINEAGE | {"validation": {"metric": "auc", "value": None, "best_epoch": 0, "epochs": 0}})
    assert dict(trained_rows(model))["epochs"] == "none: fitted by counting; auc unknown on the validation split as training judges it"


def test_a_lineage_of_before_leaves_out_what_it_does_not_know(model: Path) -> None:
    write_json(model / "lineage.json", {"features": "f" * 64, "code": None, "params": "p" * 64})
    assert [what for what, _ in trained_rows(model)] == ["settings", "sizes", "hash of the features", "hash of the settings", "hash of the weights"]
    (model / "lineage.json").unlink()
    assert [what for what, _ in trained_rows(model)] == ["settings", "sizes", "hash of the weights"]
