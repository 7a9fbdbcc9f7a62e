"""A model folder: what is refused, and that the message names what differs."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from longtrail.config import DINSettings, FullAttentionSettings, PopularityRankerSettings, RankerSettings, SASRecSettings
from longtrail.errors import ModelError
from longtrail.files import hash_path
from longtrail.models.contracts import Sizes
from longtrail.models.rankers.mean_pooling import MeanPooling
from longtrail.models.registry import MODELS, build_model
from longtrail.models.store import CARD, LINEAGE, WEIGHTS, check_fits, load_card, load_model, save_model
from tests.contracts.batches import SIZES
from tests.contracts.saving import ACTIONS, card_of

SETTINGS = DINSettings(width=3, hidden=(4,), attention_hidden=(2,))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "din", build_model(SETTINGS, SIZES), card_of(SETTINGS, "din"), {"features": "abc", "code": None})
    return tmp_path / "din"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Weights and a card that agrees with them."""
    save_file(tensors, folder / WEIGHTS)
    edit(folder / CARD, weights={"file": WEIGHTS, "sha256": hash_path(folder / WEIGHTS), "bytes": (folder / WEIGHTS).stat().st_size})


def test_the_folder_holds_three_plain_files(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [LINEAGE, CARD, WEIGHTS]
    assert json.loads((folder / LINEAGE).read_text()) == {"features": "abc", "code": None}
    assert load_card(folder) == card_of(SETTINGS, "din")
    assert load_card(folder).stage == "ranking"


def test_a_failed_save_leaves_the_old_model(folder: Path) -> None:
    before = hash_path(folder)
    with pytest.raises(TypeError):
        save_model(folder, build_model(SETTINGS, SIZES), card_of(SETTINGS), {"not JSON": object()})
    assert hash_path(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["din"]


def test_flipped_bit(folder: Path) -> None:
    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[-3] ^= 1
    (folder / WEIGHTS).write_bytes(weights)
    with pytest.raises(ModelError, match=r"model\.safetensors: SHA-256 [0-9a-f]{64}; model\.json says [0-9a-f]{64}"):
        load_model(folder)


def test_truncated_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"model\.safetensors: \d+ bytes; model\.json says \d+"):
        load_model(folder)


@pytest.mark.parametrize("name", [WEIGHTS, CARD])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=rf"{name}: no such file"):
        load_model(folder)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.json: no such file"):
        load_model(tmp_path / "nothing")


def test_weights_that_are_not_safetensors(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"hello")
    edit(folder / CARD, weights={"file": WEIGHTS, "sha256": hash_path(folder / WEIGHTS), "bytes": 5})
    with pytest.raises(ModelError, match=r"model\.safetensors: not safetensors"):
        load_model(folder)


def test_card_that_is_not_json(folder: Path) -> None:
    (folder / CARD).write_text("{")
    with pytest.raises(ModelError, match=r"model\.json: not JSON"):
        load_model(folder)
    (folder / CARD).write_text("[]")
    with pytest.raises(ModelError, match=r"model\.json: format None; expected 1"):
        load_model(folder)


def test_card_of_another_format(folder: Path) -> None:
    edit(folder / CARD, format=2)
    with pytest.raises(ModelError, match=r"model\.json: format 2; expected 1"):
        load_model(folder)


@pytest.mark.parametrize("field", ["name", "settings", "sizes", "actions", "prior_click_rate", "weights"])
def test_card_without_a_field(folder: Path, field: str) -> None:
    document = json.loads((folder / CARD).read_text())
    del document[field]
    (folder / CARD).write_text(json.dumps(document))
    with pytest.raises(ModelError, match=rf"model\.json: no field '{field}'"):
        load_model(folder)


def test_card_with_a_setting_of_the_future(folder: Path) -> None:
    edit(folder / CARD, settings=SETTINGS.model_dump(mode="json") | {"telepathy": True})
    with pytest.raises(ModelError, match=r"model\.json: settings\.telepathy: unknown key"):
        load_model(folder)


def test_a_card_of_before_positions_could_be_chosen_has_learned_ones(tmp_path: Path) -> None:
    settings = SASRecSettings(width=8, attention=FullAttentionSettings(positions="learned"))
    module = build_model(settings, SIZES)
    save_model(tmp_path, module, card_of(settings, "sasrec"), {})
    older = settings.model_dump(mode="json")
    del older["attention"]["positions"]
    edit(tmp_path / CARD, settings=older)
    loaded = load_model(tmp_path)
    assert loaded.card.settings == settings
    assert torch.equal(loaded.module.positions, module.positions)


def test_card_with_other_sizes(folder: Path) -> None:
    edit(folder / CARD, sizes={"items": 41, "categories": 6, "actions": 5})
    with pytest.raises(ModelError, match=r"embedding\.items\.table is torch\.float32 \[41, 3\]; the card's model needs torch\.float32 \[42, 3\]"):
        load_model(folder)
    edit(folder / CARD, sizes={"things": 41})
    with pytest.raises(ModelError, match=r"model\.json: .*things"):
        load_model(folder)


def test_weights_of_another_model(folder: Path) -> None:
    rewrite_weights(folder, build_model(PopularityRankerSettings(), SIZES).state_dict())
    with pytest.raises(ModelError, match=r"tensors missing: .*attention\.first.*; not in the model: logits"):
        load_model(folder)


def test_weights_of_another_dtype(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    rewrite_weights(folder, tensors | {"head.norm.mean": tensors["head.norm.mean"].double()})
    with pytest.raises(ModelError, match=r"head\.norm\.mean is torch\.float64 \[42\]; the card's model needs torch\.float32"):
        load_model(folder)


def test_a_model_must_fit_the_data() -> None:
    card = card_of(SETTINGS, "din")
    check_fits(card, SIZES, ACTIONS)
    check_fits(card, Sizes(items=100, categories=7, actions=5), list(ACTIONS))
    with pytest.raises(ModelError, match=r"model din: actions \['rated_1', .*; the data has \['click'\]"):
        check_fits(card, SIZES, ("click",))
    with pytest.raises(ModelError, match=r"model din: 40 items; the data has 30"):
        check_fits(card, Sizes(items=30, categories=6, actions=5), ACTIONS)


def test_weights_come_from_the_cpu_and_any_layout(tmp_path: Path) -> None:
    """A tensor that is a transposed view is written as its values."""
    model = build_model(SETTINGS, SIZES)
    layer = model.head.layers[0]  # type: ignore[union-attr, index]
    layer.weight = nn.Parameter(torch.randn(layer.weight.shape[::-1]).T)
    save_model(tmp_path / "m", model, card_of(SETTINGS), {})
    assert torch.equal(load_model(tmp_path / "m").module.state_dict()["head.layers.0.weight"], layer.weight)


def test_an_unknown_kind_is_refused() -> None:
    class Strange:
        stage, kind = "ranking", "oracle"

    with pytest.raises(ModelError, match=r"no ranking model of kind 'oracle'; expected one of: retrieval popularity, .*ranking sam"):
        build_model(Strange(), SIZES)


class OwnSettings(RankerSettings):
    """Of a model in somebody's notebook."""

    kind: Literal["own"] = "own"
    half_life: float = 3.0


def test_a_kind_of_ones_own_is_saved_and_loaded_by_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, ("ranking", "own"), MeanPooling)
    settings = OwnSettings(width=3, hidden=(4,), half_life=5.0)
    model = build_model(settings, SIZES)
    save_model(tmp_path / "own", model, card_of(settings), {})
    with pytest.raises(ModelError, match=r"model\.json: settings\.kind: 'own' is no ranker; expected one of popularity, mean_pooling"):
        load_model(tmp_path / "own")
    loaded = load_model(tmp_path / "own", settings=OwnSettings)
    assert loaded.card == card_of(settings)
    assert all(torch.equal(tensor, loaded.module.state_dict()[name]) for name, tensor in model.state_dict().items())
    edit(tmp_path / "own" / CARD, settings=settings.model_dump(mode="json") | {"half_lives": 3})
    with pytest.raises(ModelError, match=r"model\.json: settings\.half_lives: unknown key; did you mean half_life\?"):
        load_model(tmp_path / "own", settings=OwnSettings)


def test_a_model_that_keeps_no_settings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation asks them for max_history, and without an answer shows a model one event."""

    class Forgetful(MeanPooling):
        def __init__(self, settings: Any, sizes: Sizes) -> None:
            super().__init__(settings, sizes)
            del self.settings

    monkeypatch.setitem(MODELS, ("ranking", "own"), Forgetful)
    with pytest.raises(ModelError, match=r"Forgetful does not keep the settings it is made of; expected self\.settings = settings in its __init__"):
        build_model(OwnSettings(), SIZES)
