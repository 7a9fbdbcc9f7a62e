"""The whole folder against the slow oracle of tests/toy.py, and what the step refuses."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from components import labels
from components.build_features import build_features
from features.online import OnlineFeatures
from features.repository import FeatureStoreError
from longtrail.config import SplitSettings
from longtrail.errors import DatasetError, EvaluationError, ValidationError
from longtrail.examples import FeatureSet
from longtrail.files import read_json, write_json
from longtrail.schema import EXAMPLES, TARGETS
from tests.features.helpers import build, write_params
from tests.toy import toy_features, toy_tables

PARQUET = ("examples/train", "examples/valid", "examples/test", "targets/valid", "targets/test", "catalogue", "users")


def assert_same_features(found: Path, expected: Path) -> None:
    for name in PARQUET:
        ours, theirs = (pq.read_table(folder / f"{name}.parquet") for folder in (found, expected))
        assert ours.schema == theirs.schema, name
        assert ours.equals(theirs), name
    np.testing.assert_array_equal(np.load(found / "train_lengths.npy"), np.load(expected / "train_lengths.npy"))
    ours, theirs = (read_json(folder / "features.json") for folder in (found, expected))
    assert set(ours.pop("hashes")) == set(theirs.pop("hashes"))
    assert ours == theirs
    ours, theirs = (FeatureSet.open(folder).history for folder in (found, expected))
    users = np.arange(ours.users + 1)
    for a, b in zip(vars(ours.flat(users, ours.lengths(users))).values(), vars(theirs.flat(users, theirs.lengths(users))).values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("split", [SplitSettings(), SplitSettings(kind="leave_one_out"), SplitSettings(valid_share=0.3, test_share=0.05)])
def test_the_folder_equals_the_slow_oracle(split: SplitSettings, toy_tables_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "CHUNK", 700)  # several chunks, the last not full
    found = build(toy_tables_folder, tmp_path, split=split.model_dump())
    assert_same_features(found, toy_features(toy_tables_folder, tmp_path / "oracle", split))
    assert not [file for file in found.rglob("*") if file.name.startswith(".")], "nothing temporary is left"


def test_a_log_without_impressions(tmp_path: Path) -> None:
    tables = toy_tables(tmp_path / "tables", users=12, events_per_user=10, impressions=False)
    found = build(tables, tmp_path)
    assert_same_features(found, toy_features(tables, tmp_path / "oracle"))
    features = FeatureSet.open(found)
    assert features.prior_click_rate == 0.0 and features.examples("train").num_rows == 0
    assert OnlineFeatures(found / "feast").user_statistics([1])["user_impressions"].tolist() == [0]


def test_rows_are_sorted_and_point_into_the_store(toy_tables_folder: Path, tmp_path: Path) -> None:
    shuffled = tmp_path / "tables"
    shutil.copytree(toy_tables_folder, shuffled)
    rng = np.random.default_rng(3)
    for name in ("interactions", "impressions"):
        table = pq.read_table(shuffled / f"{name}.parquet")
        pq.write_table(table.take(rng.permutation(table.num_rows)), shuffled / f"{name}.parquet")
    features = FeatureSet.open(build(shuffled, tmp_path))
    for table, keys in ((features.examples("train"), EXAMPLES), (features.targets("test"), TARGETS)):
        order = ("timestamp", "request_id", "position") if keys is EXAMPLES else ("user_id", "timestamp")
        frame = table.to_pandas()
        assert frame[list(order)].equals(frame.sort_values(list(order), kind="stable")[list(order)].reset_index(drop=True))
        assert (frame.history_length <= features.history.lengths(frame.user_id)).all()
        times = features.history.gather(frame.user_id.to_numpy(), frame.history_length.to_numpy(), 1).times_BL[:, 0]
        assert (times < frame.timestamp.astype("int64") // (1 if frame.timestamp.dt.unit == "us" else 1_000)).all()


def test_building_again_gives_the_same_and_replaces_the_folder(toy_tables_folder: Path, tmp_path: Path) -> None:
    first = build(toy_tables_folder, tmp_path)
    (first / "stray").touch()
    before = {name: pq.read_table(first / f"{name}.parquet") for name in PARQUET}
    summary = read_json(first / "features.json")
    second = build(toy_tables_folder, tmp_path)
    assert not (second / "stray").exists()
    assert read_json(second / "features.json") == summary
    assert all(pq.read_table(second / f"{name}.parquet").equals(table) for name, table in before.items())


def test_tables_that_failed_validation_are_refused(toy_tables_folder: Path, tmp_path: Path) -> None:
    failed = {"name": "interactions.timestamp", "success": False, "severity": "critical"}
    write_json(tmp_path / "validation" / "result.json", {"success": False, "expectations": [failed]})
    with pytest.raises(ValidationError, match=r"result\.json: validation failed \(interactions\.timestamp\)"):
        build_features(toy_tables_folder, tmp_path / "validation", write_params(tmp_path / "params.yaml"), tmp_path / "features")
    with pytest.raises(ValidationError, match=r"no such file; expected the result of validate"):
        build_features(toy_tables_folder, tmp_path / "nothing", write_params(tmp_path / "params.yaml"), tmp_path / "features")
    assert not (tmp_path / "features").exists()


def test_broken_tables_are_named(toy_tables_folder: Path, tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    shutil.copytree(toy_tables_folder, tables)
    impressions = pq.read_table(tables / "impressions.parquet")
    pq.write_table(impressions.set_column(3, "timestamp", impressions["timestamp"].cast(pa.int64())), tables / "impressions.parquet")
    with pytest.raises(DatasetError, match=r"impressions\.parquet: column timestamp: int64; expected timestamp\[us, tz=UTC\]"):
        build(tables, tmp_path)
    pq.write_table(impressions.drop_columns(["click"]), tables / "impressions.parquet")
    with pytest.raises(DatasetError, match=r"impressions\.parquet: column click: no such column"):
        build(tables, tmp_path)
    (tables / "impressions.parquet").write_text("no")
    with pytest.raises(DatasetError, match=r"impressions\.parquet: not a Parquet file"):
        build(tables, tmp_path)
    (tables / "impressions.parquet").unlink()
    with pytest.raises(DatasetError, match=r"impressions\.parquet: no such file"):
        build(tables, tmp_path)


def test_empty_and_too_short_logs(toy_tables_folder: Path, tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    shutil.copytree(toy_tables_folder, tables)
    interactions = pq.read_table(tables / "interactions.parquet")
    pq.write_table(interactions.slice(0, 0), tables / "interactions.parquet")
    with pytest.raises(DatasetError, match=r"interactions\.parquet: no rows"):
        build(tables, tmp_path)
    pq.write_table(interactions, tables / "interactions.parquet")
    pq.write_table(pq.read_table(tables / "impressions.parquet").slice(0, 1), tables / "impressions.parquet")
    with pytest.raises(EvaluationError, match="split: nothing stands before"):
        build(tables, tmp_path)


def test_a_build_that_fails_leaves_the_folder_as_it_was(toy_tables_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "old").touch()
    with pytest.raises(FeatureStoreError, match=r"Redis at features\.redis_address 127\.0\.0\.1:1:"):
        build(toy_tables_folder, tmp_path, online_store="redis", redis_address="127.0.0.1:1")
    assert [file.name for file in (tmp_path / "features").iterdir()] == ["old"]


def test_feast_is_imported_only_when_needed() -> None:
    program = "import sys, components.build_features, features.online; print([m for m in ('feast', 'ibis') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_a_leave_one_out_target_keeps_the_events_of_its_own_instant(tmp_path: Path) -> None:
    tables = toy_tables(tmp_path / "tables", users=12, events_per_user=10)
    interactions = pq.read_table(tables / "interactions.parquet")
    weeks = pc.floor_temporal(interactions["timestamp"], unit="week")
    for name in ("timestamp", "available_at"):
        interactions = interactions.set_column(
            interactions.schema.get_field_index(name), interactions.schema.field(name), weeks.cast(interactions.schema.field(name).type)
        )
    pq.write_table(interactions, tables / "interactions.parquet")
    features = FeatureSet.open(build(tables, tmp_path, split={"kind": "leave_one_out"}))
    for split, left_out in (("valid", 2), ("test", 1)):
        targets = features.targets(split).to_pandas()
        assert (targets.history_length == features.history.lengths(targets.user_id.to_numpy()) - left_out).all()
        stored = features.history.gather(targets.user_id.to_numpy(), targets.history_length.to_numpy() + 1, 1)
        assert stored.items_BL[:, 0].tolist() == targets.item_id.tolist(), "the target is the event right after its history"
