"""A model that goes on from newer data: the old part is the old model, bit for bit; the new part is where it should be."""

import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import nn

from components.train import load_previous, train_model, trained_until
from longtrail.config import (
    BERT4RecSettings,
    BlossomSettings,
    Config,
    DINSettings,
    ETASettings,
    FullAttentionSettings,
    GRU4RecSettings,
    IFASettings,
    RankerModel,
    RecJPQItemsSettings,
    RetrieverModel,
    SAMSettings,
    SASRecSettings,
    TrainingSettings,
    TWINSettings,
)
from longtrail.errors import ModelError
from longtrail.examples import FeatureSet
from longtrail.files import hash_path, read_json, write_json
from longtrail.models.contracts import Sizes
from longtrail.models.items.dense import DenseItems
from longtrail.models.items.recjpq import RecJPQItems
from longtrail.models.registry import build_model
from longtrail.models.store import LoadedModel, ModelCard, load_model
from longtrail.models.vocabulary import FILE, Vocabulary
from longtrail.training import train
from longtrail.training.continuing import LEARNING, continue_from, neighbour_vectors
from longtrail.training.interactions import interaction_matrix, unlabelled_until

RECJPQ = RecJPQItemsSettings(splits=2, codes=16)
RANKER: dict[str, Any] = {"width": 4, "hidden": (8,), "max_history": 12}
ENCODER: dict[str, Any] = {"width": 8, "max_history": 12}
SETTINGS: dict[str, Any] = {
    "din": DINSettings(width=4, hidden=(8,), max_history=12, max_epochs=1),
    "din recjpq": DINSettings(width=4, hidden=(8,), max_history=12, max_epochs=1, items=RECJPQ),
    "sasrec": SASRecSettings(width=8, blocks=1, heads=1, max_history=12, max_epochs=1),
    "sasrec learned": SASRecSettings(width=8, blocks=1, heads=1, max_history=12, max_epochs=1, attention=FullAttentionSettings(positions="learned")),
    "sasrec recjpq": SASRecSettings(width=8, blocks=1, heads=1, max_history=12, max_epochs=1, items=RECJPQ),
    "sam recjpq": SAMSettings(**RANKER, items=RECJPQ),
    "ifa": IFASettings(**RANKER, half_life_days=3.0),
    "ifa recjpq": IFASettings(**RANKER, items=RECJPQ),
    "twin": TWINSettings(**RANKER, top_k=3),
    "eta": ETASettings(**RANKER, top_k=3),
    "bert4rec recjpq": BERT4RecSettings(**ENCODER, items=RECJPQ),
    "sasrec blossom": SASRecSettings(**ENCODER, attention=BlossomSettings(selector="compressed")),
    "gru4rec": GRU4RecSettings(**ENCODER),
}


@pytest.fixture(scope="module")
def features(toy_features_folder: Path) -> FeatureSet:
    return FeatureSet.open(toy_features_folder)


def older(features: FeatureSet, name: str, *, fewer: int = 20, actions: tuple[str, ...] | None = None) -> LoadedModel:
    """A model of the same log, before its last items, its last category and perhaps some actions came."""
    actions = actions if actions is not None else features.actions
    sizes = Sizes(items=features.sizes.items - fewer, categories=features.sizes.categories - (fewer > 0), actions=len(actions))
    torch.manual_seed(3)
    module = build_model(SETTINGS[name], sizes)
    for part in module.modules():
        if isinstance(part, RecJPQItems):
            part.levels.copy_(torch.linspace(-1, 1, 16).expand(2, 16))
    card = ModelCard(name=name, settings=SETTINGS[name], sizes=sizes, actions=actions, prior_click_rate=0.3)
    return LoadedModel(module=module, card=card)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_known_rows_are_kept_and_new_ones_start_somewhere_sensible(name: str, features: FeatureSet) -> None:
    previous = older(features, name)
    torch.manual_seed(0)
    module: Any = build_model(SETTINGS[name], features.sizes)
    continue_from(module, features, previous, seed=0)
    grown = module.state_dict()
    for key, tensor in previous.module.state_dict().items():
        assert torch.equal(grown[key][: len(tensor)] if tensor.ndim else grown[key], tensor), key
    slot = module.items if hasattr(module, "items") else module.embedding.items
    vectors = slot.vectors().detach()
    assert vectors.shape == (features.sizes.items + 1, slot.width)
    assert not vectors[0].any() and bool(vectors[-20:].any(dim=1).all())
    old, new = vectors[1:-20].square().mean().sqrt(), vectors[-20:].square().mean().sqrt()
    assert 0.3 < float(new / old) < 3


def shuffled(features: FeatureSet, previous: LoadedModel, *, gone: int) -> LoadedModel:
    """The same model, of a log in which its items and categories had other ids, and `gone` items that the data no longer has."""
    now, sizes, rng = Vocabulary.read(features.folder / "catalogue.parquet"), previous.card.sizes, np.random.default_rng(1)
    items = rng.permutation(len(now.items))[: sizes.items]
    keys = now.items.take(pa.array(items)).to_pylist()
    keys[:gone] = [f"gone {i}" for i in range(gone)]
    categories = now.categories.take(pa.array(rng.permutation(len(now.categories))[: sizes.categories]))
    return replace(previous, vocabulary=Vocabulary(items=pa.array(keys), categories=categories))


@pytest.mark.parametrize("name", list(SETTINGS))
def test_rows_follow_their_keys_where_ids_have_moved(name: str, features: FeatureSet) -> None:
    """What a late event does to the ids of a log: every known item has its own old vector, bit for bit, wherever it stands now."""
    previous = shuffled(features, older(features, name), gone=2)
    assert previous.vocabulary is not None
    torch.manual_seed(0)
    module: Any = build_model(SETTINGS[name], features.sizes)
    continue_from(module, features, previous, seed=0)

    def vectors(model: Any) -> tuple[torch.Tensor, ...]:
        slots = (model.items,) if hasattr(model, "items") else (model.embedding.items, model.embedding.categories)
        return tuple(slot.vectors().detach() for slot in slots)

    now = Vocabulary.read(features.folder / "catalogue.parquet")
    for kind, before, after in zip(("items", "categories"), vectors(previous.module), vectors(module), strict=False):
        old, new = (getattr(vocabulary, kind).to_pylist() for vocabulary in (previous.vocabulary, now))
        place = {key: i for i, key in enumerate(new, start=1)}
        kept = [(i, place[key]) for i, key in enumerate(old, start=1) if key in place]
        assert len(kept) == len(old) - 2 * (kind == "items") and any(i != j for i, j in kept)
        assert torch.equal(after[[j for _, j in kept]], before[[i for i, _ in kept]])
        others = sorted(set(range(1, len(after))) - {j for _, j in kept})
        assert torch.isfinite(after).all() and bool(after[others].any(dim=1).all()) and not after[0].any()
    for key, tensor in previous.module.state_dict().items():
        if not key.endswith(("table", "codes")):
            assert torch.equal(module.state_dict()[key], tensor), key


def told_before(features: FeatureSet, new: np.ndarray) -> csr_matrix:
    """Who met what before the middle of what happened since the first of the `new` items came."""
    flat = features.history.flat(np.arange(1, features.users + 1), features.train_lengths[1:])
    first = int(flat.times[np.isin(flat.items, new)].min())
    until = unlabelled_until(features, since=first)
    assert until is not None and until > first
    return interaction_matrix(features, binary=True, until=until)


def test_a_model_of_another_log_is_told_by_its_keys(features: FeatureSet, tmp_path: Path) -> None:
    module, previous = build_model(SETTINGS["din"], features.sizes), older(features, "din")
    with pytest.raises(ModelError, match=r"9 of its \d+ items are in the data: expected a later state"):
        continue_from(module, features, shuffled(features, previous, gone=previous.card.sizes.items - 9), seed=0)
    short = replace(previous, vocabulary=Vocabulary(items=pa.array(["a"]), categories=pa.array(["b"])))
    with pytest.raises(ModelError, match="its vocabulary has 1 items and 1 categories; its card says"):
        continue_from(module, features, short, seed=0)
    (tmp_path / "vocabulary.parquet").write_bytes(b"no table")
    with pytest.raises(ModelError, match="not a table of items"):
        Vocabulary.read(tmp_path / "vocabulary.parquet")
    pq.write_table(pa.table({"item_key": ["a"]}), tmp_path / "vocabulary.parquet")
    with pytest.raises(ModelError, match=r"not a table of items|expected item_key"):
        Vocabulary.read(tmp_path / "vocabulary.parquet")


def test_neighbours_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    known, new, users = 6, 3, 9
    matrix = (rng.random((users, known + new + 1)) < 0.4).astype(float)
    matrix[:, 0] = 0
    matrix[:, -1] = 0  # nobody has touched the last one
    vectors = torch.from_numpy(rng.normal(size=(known + 1, 4)))
    vectors[0] = 0
    expected = np.zeros((new, 4))
    for n in range(new):
        means = [
            np.mean([vectors[i].numpy() for i in range(1, known + 1) if matrix[u, i]], axis=0)
            for u in range(users)
            if matrix[u, known + 1 + n] and matrix[u, 1 : known + 1].any()
        ]
        expected[n] = np.mean(means, axis=0) if means else np.nan
    reached = ~np.isnan(expected[:, 0])
    expected[reached] *= np.sqrt((vectors[1:].numpy() ** 2).mean()) / np.sqrt((expected[reached] ** 2).mean())
    expected[~reached] = vectors[1:].mean(0)
    found = neighbour_vectors(vectors, csr_matrix(matrix))
    assert 0 < reached.sum() < new
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("name", ["din", "sam recjpq", "ifa", "twin", "eta"])
def test_actions_are_matched_by_name(name: str, features: FeatureSet) -> None:
    kept = features.actions[1:]  # the first action is new: every id shifts
    previous = older(features, name, fewer=0, actions=kept)
    for parameter in previous.module.parameters():  # TWIN's scalars of actions start at zero
        nn.init.normal_(parameter)
    module = build_model(SETTINGS[name], features.sizes)
    continue_from(module, features, previous, seed=0)
    before, after = previous.module.state_dict(), module.state_dict()
    tables = [key for key in before if key.endswith("actions")]
    assert len(tables) == (2 if name == "twin" else 1)
    for key in tables:
        for place, action in enumerate(kept, start=1):
            assert torch.equal(after[key][1 + features.actions.index(action)], before[key][place])


class Unforeseen(nn.Module):
    """A second table of items, categories under another name, and a weight that is called as the table of actions is."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.liked, self.kinds = DenseItems(sizes.items, 4), DenseItems(sizes.categories, 3, axis="categories")
        self.actions = nn.Parameter(torch.randn(5, 2))


def test_tables_grow_by_what_their_rows_are_of_whatever_they_are_called(features: FeatureSet) -> None:
    previous = older(features, "din")
    previous = replace(previous, module=Unforeseen(previous.card.sizes))
    module, before = Unforeseen(features.sizes), previous.module.state_dict()
    continue_from(module, features, previous, seed=0)
    after = module.state_dict()
    assert torch.equal(after["actions"], before["actions"])
    assert after["liked.table"].shape == (features.sizes.items + 1, 4)
    for name in ("liked.table", "kinds.table"):
        assert torch.equal(after[name][: len(before[name])], before[name])
    matrix_UN = told_before(features, np.arange(len(before["liked.table"]), features.sizes.items + 1))
    torch.testing.assert_close(after["liked.table"][len(before["liked.table"]) :], neighbour_vectors(before["liked.table"], matrix_UN))
    torch.testing.assert_close(after["kinds.table"][-1], before["kinds.table"][1:].mean(0))
    module.actions = nn.Parameter(torch.randn(6, 2))
    with pytest.raises(ModelError, match=r"weight actions has shape \[5, 2\]; now \[6, 2\]"):
        continue_from(module, features, previous, seed=0)


def test_what_does_not_fit_is_named(features: FeatureSet) -> None:
    module = build_model(SETTINGS["din"], features.sizes)
    for fewer, actions, message in ((-5, None, "items; the data has"), (0, (*features.actions, "vanished"), "'vanished'")):
        with pytest.raises(ModelError, match=message):
            continue_from(module, features, older(features, "din", fewer=fewer, actions=actions), seed=0)
    wider = build_model(DINSettings(width=6, hidden=(8,), max_history=12), features.sizes)
    with pytest.raises(ModelError, match="expected the settings it was trained with: width was 4, is 6"):
        continue_from(wider, features, older(features, "din", fewer=0), seed=0)


def test_settings_that_changed_are_named(features: FeatureSet) -> None:
    """As where a model of learned positions is to go on with today's default."""
    module = build_model(SETTINGS["sasrec"].model_copy(update={"dropout": 0.5}), features.sizes)
    with pytest.raises(ModelError, match=r"weight positions is not in both models; .*: positions was 'learned', is 'rotary'$"):
        continue_from(module, features, older(features, "sasrec learned"), seed=0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sasrec", {"heads": 2}, "heads was 1, is 2"),
        ("sasrec blossom", {"attention": BlossomSettings(selector="compressed", window=2)}, "window was 8, is 2"),
        ("din", {"attention_weights": "sigmoid"}, "attention_weights was 'linear', is 'sigmoid'"),
        ("ifa", {"feature_map": "relu", "prior_events": 2.0}, "feature_map was 'elu1', is 'relu'"),
        ("sam recjpq", {"feedback": False, "read_scale": "sqrt", "listwise": 0.1}, "feedback was True, is False, read_scale was 'norm', is 'sqrt'"),
        ("gru4rec", {"learning_rate": 0.5, "loss": "bce", "max_history": 3, "dropout": 0.7}, None),
        ("sam recjpq", {"attention_init": "zero", "listwise": 0.1, "patience": 9}, None),
    ],
)
def test_settings_that_give_weights_another_meaning_are_refused(
    name: str, changes: dict[str, Any], message: str | None, features: FeatureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of these have weights of the same names and shapes."""
    if name == "ifa":
        monkeypatch.setitem(SETTINGS, name, SETTINGS[name].model_copy(update={"feature_map": "elu1", "half_life_days": None}))
    previous, module = older(features, name), build_model(SETTINGS[name].model_copy(update=changes), features.sizes)
    if message is None:
        continue_from(module, features, previous, seed=0)
        return
    with pytest.raises(ModelError, match=f"expected the settings it was trained with: {message}$"):
        continue_from(module, features, previous, seed=0)


def test_every_setting_is_of_learning_or_of_what_weights_mean() -> None:
    """A new setting has to be put on one of the two sides; one that was renamed is missed on its own."""
    kinds = get_args(get_args(RankerModel)[0]) + get_args(get_args(RetrieverModel)[0])
    fields = set().union(*(kind.model_fields for kind in kinds))
    counted = {"stage", "kind", "by", "smoothing"}
    sizes = {
        "width",
        "hidden",
        "items",
        "attention",
        "blocks",
        "heads",
        "layers",
        "passes",
        "compression",
        "enhancement",
        "features",
        "hashes",
        "bits",
    }
    forms = {"attention_hidden", "attention_weights", "feedback", "read_scale", "feature_map", "exact_heads", "recent_events", "relation"}
    searches = {"top_k", "search"}
    assert fields == LEARNING | counted | sizes | forms | searches


@pytest.mark.parametrize("name", ["din", "sasrec recjpq"])
def test_training_goes_on_from_the_previous_weights(name: str, features: FeatureSet, tmp_path: Path) -> None:
    """With a learning rate of next to nothing, what comes out is what went in."""
    still = SETTINGS[name].model_copy(update={"learning_rate": 1e-12, "weight_decay": 0.0})
    previous = older(features, name, fewer=0)
    since = int(np.median(features.history.flat(np.arange(1, features.users + 1), features.train_lengths[1:]).times))
    trained = train(features, still, name, TrainingSettings(threads=1), data="x", since=since, previous=previous)
    for key, tensor in trained.module.named_parameters():
        torch.testing.assert_close(tensor.detach(), dict(previous.module.named_parameters())[key].detach(), atol=1e-6, rtol=0)
    first, *others = (row[f"valid_{trained.metric}"] for row in trained.curve)
    assert trained.curve[0]["epoch"] == 0 and "train_loss" not in trained.curve[0]
    assert others == pytest.approx([first] * trained.epochs, abs=1e-6)


@pytest.mark.parametrize("name", ["din", "sasrec recjpq"])
def test_an_epoch_has_to_be_better_than_what_training_goes_on_from(name: str, features: FeatureSet, tmp_path: Path) -> None:
    """A good model and steps that are far too long: it stays as it was, and what it was not taught is still to be learnt."""
    good = SETTINGS[name].model_copy(update={"max_epochs": 40, "patience": 40, "learning_rate": 1e-2})
    wild = good.model_copy(update={"max_epochs": 2, "learning_rate": 3.0, "weight_average": 0.0})
    config = Config(training=TrainingSettings(threads=1))
    arguments: dict[str, Any] = {"features": features.folder, "checkpoints": tmp_path / "checkpoints"}
    train_model(config.model_copy(update={"models": {name: good}}), name, out=tmp_path / "good", **arguments)
    lineage = read_json(tmp_path / "good" / "lineage.json") | {"trained_until": "2020-01-01T00:00:00+00:00"}
    write_json(tmp_path / "good" / "lineage.json", lineage)
    rows: list[dict[str, float]] = []
    previous = load_previous(tmp_path / "good")
    trained = train(features, wild, name, config.training, data="x", previous=previous, report=rows.append, checkpoints=tmp_path / "checkpoints")
    values = [row[f"valid_{trained.metric}"] for row in trained.curve]
    assert (trained.best_epoch, trained.epochs, trained.value) == (0, 2, values[0]) and max(values[1:]) < values[0]
    assert rows == trained.curve and "at epoch 0 of 2" in trained.summary()
    again = train(features, wild, name, config.training, data="x", previous=previous, checkpoints=tmp_path / "checkpoints")
    assert (again.best_epoch, again.resumed_from, again.curve) == (0, 2, rows)
    for one in (trained, again):
        assert all(torch.equal(tensor, previous.module.state_dict()[key]) for key, tensor in one.module.state_dict().items())
    train_model(config.model_copy(update={"models": {name: wild}}), name, out=tmp_path / "kept", previous=tmp_path / "good", **arguments)
    assert trained_until(tmp_path / "kept") == trained_until(tmp_path / "good")
    assert hash_path(tmp_path / "kept" / "model.safetensors") == hash_path(tmp_path / "good" / "model.safetensors")


def test_the_step_goes_on_where_the_previous_training_stopped(toy_features_folder: Path, tmp_path: Path) -> None:
    config = Config(models={**Config().models, "din": SETTINGS["din"]}, training=TrainingSettings(threads=1))
    arguments: dict[str, Any] = {"features": toy_features_folder, "checkpoints": tmp_path / "checkpoints"}
    train_model(config, "din", out=tmp_path / "first", **arguments)
    ends = datetime.fromisoformat(read_json(toy_features_folder / "features.json")["split"]["valid_from"])
    assert trained_until(tmp_path / "first") == round(ends.timestamp() * 1e6)
    assert load_previous(tmp_path / "first").vocabulary == Vocabulary.read(toy_features_folder / "catalogue.parquet")
    # The same log a week later: the training period ends where the validation period did.
    later = tmp_path / "later"
    shutil.copytree(toy_features_folder, later)
    valid = pq.read_table(later / "examples" / "valid.parquet")
    pq.write_table(valid, later / "examples" / "train.parquet")
    write_json(later / "features.json", {**read_json(later / "features.json"), "later": True})
    train_model(config, "din", features=later, out=tmp_path / "second", checkpoints=tmp_path / "checkpoints", previous=tmp_path / "first")
    lineage = read_json(tmp_path / "second" / "lineage.json")
    assert lineage["previous"] == read_json(tmp_path / "first" / "model.json")["weights"]["sha256"]
    assert hash_path(tmp_path / "first" / "model.safetensors") != hash_path(tmp_path / "second" / "model.safetensors")
    assert load_model(tmp_path / "second").card.name == "din"
    (tmp_path / "first" / FILE).unlink()  # a model from before there was one
    assert load_previous(tmp_path / "first").vocabulary is None


def test_an_earlier_model_of_nans_is_refused_before_a_step_is_taken(features: FeatureSet) -> None:
    previous = older(features, "din")
    with torch.no_grad():
        previous.module.head.wide.fill_(torch.nan)  # type: ignore[union-attr,operator]
    with pytest.raises(ModelError, match=r"^before training: (\d+) of \1 scores of the validation split are not finite"):
        train(features, SETTINGS["din"], "din", TrainingSettings(accelerator="cpu", threads=1), data="d", previous=previous)
