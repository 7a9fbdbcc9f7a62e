"""Blossom's compiled form against its general one in float64, and what must hold for it in float32."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.models import peak_bytes
from longtrail.config import BERT4RecSettings, BlossomSettings, SASRecSettings
from longtrail.models.attention import blossom_layer, selection
from longtrail.models.attention.blossom import BlossomAttention
from longtrail.models.attention.full import FullAttention
from longtrail.models.masks import padding_mask
from longtrail.models.registry import build_model
from tests.contracts import retrievers
from tests.contracts.batches import SIZES
from tests.models.attention.test_blossom import make_layer

LENGTHS = (150, 0, 1, 15, 16, 17, 97, 128)
LAYERS: dict[str, dict[str, Any]] = {
    "defaults": {"width": 64, "heads": 2},
    "released": {"width": 64, "heads": 4, "kv_heads": 2},
    "odd sizes": {"width": 48, "heads": 3, "kv_heads": 3, "block": 5, "stride": 5, "compression": 7, "selected": 2, "window": 3},
    "three heads a group, block of two strides": {"width": 48, "heads": 3, "block": 8, "stride": 4, "compression": 6, "window": 9},
}


def compiled(*, heads: int = 2, **sizes: Any) -> BlossomAttention:
    return make_layer(heads=heads, **sizes).float()


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each use of what is compiled."""
    found, real = [], blossom_layer.mixed

    def counted(*args: Any) -> Tensor:
        found.append(1)
        return real(*args)

    monkeypatch.setattr(blossom_layer, "mixed", counted)
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", LAYERS.values(), ids=LAYERS.keys())
def test_values_and_gradients_equal_the_general_form(sizes: dict[str, Any], causal: bool, calls: list[int]) -> None:
    layer = compiled(causal=causal, **sizes)
    twin = copy.deepcopy(layer).double()
    lengths_B, width = torch.tensor(LENGTHS), sizes["width"]
    x_BLD, weights_BLD = torch.randn(2, len(LENGTHS), max(LENGTHS), width)
    weights_BLD *= padding_mask(lengths_B, max(LENGTHS)).unsqueeze(-1)
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    for model, results in ((layer, found), (twin, wanted)):
        x = x_BLD.to(model.gate.weight.dtype, copy=True).requires_grad_()
        weighed = model(x, lengths_B) * weights_BLD
        parameters = [p for p in model.parameters() if p.requires_grad]
        results += [weighed, *torch.autograd.grad(weighed.sum(), [x, *parameters])]
    assert len(calls) == 1
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right.float(), rtol=1e-4, atol=3e-6 * right.detach().abs().amax().item())


@pytest.mark.parametrize("scale", [40.0, 1e5])
def test_blocks_with_no_share_are_not_read(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of block scores far apart, and some below "nothing": as the general form says, which reads others where every share counts."""
    layer, x_BLD, lengths_B = compiled(width=32), torch.randn(2, 130, 32), torch.tensor([130, 130])
    last = layer.block_keys.network[2]
    assert isinstance(last, torch.nn.Linear)
    last.weight.data *= scale
    twin = copy.deepcopy(layer).double()
    with torch.no_grad():
        found, wanted = layer(x_BLD, lengths_B), twin(x_BLD.double(), lengths_B)
        torch.testing.assert_close(found, wanted.float(), rtol=0, atol=1e-5)
        monkeypatch.setattr(selection, "LEAST_SHARE", -1.0)
        assert (twin(x_BLD.double(), lengths_B) - wanted).abs().amax() > 1e-2


@pytest.mark.parametrize("selector", ["frozen", "straight_through"])
def test_the_future_changes_nothing(selector: str, calls: list[int]) -> None:
    """Bit-equal before t, and the same bits whether a gradient is wanted or not; straight_through is compiled in serving alone."""
    layer = compiled(selector=selector, width=64, heads=4, kv_heads=2)
    x_BLD, lengths_B = torch.randn(2, 150, 64), torch.tensor([150, 150])
    with torch.inference_mode():
        y_BLD = layer(x_BLD, lengths_B)
        for t in (1, 15, 16, 17, 31, 32, 33, 95, 96, 97, 127, 128, 129, 144, 149):
            other_BLD = x_BLD.clone()
            other_BLD[:, t:] = 3 * torch.randn_like(other_BLD[:, t:])
            assert torch.equal(layer(other_BLD, lengths_B)[:, :t], y_BLD[:, :t]), t
    assert len(calls) == 16
    trained = layer(x_BLD, lengths_B)
    assert len(calls) == 16 + (selector == "frozen")
    torch.testing.assert_close(trained, y_BLD, rtol=0, atol=0 if selector == "frozen" else 1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_and_other_users_change_nothing(causal: bool, calls: list[int]) -> None:
    layer = compiled(causal=causal, width=32)
    lengths = [90, 40, 17, 1, 0]
    x_BLD = torch.randn(5, 97, 32)
    noisy_BLD = x_BLD.clone()
    for b, n in enumerate(lengths):
        noisy_BLD[b, n:] = torch.nan
    with torch.no_grad():
        y_BLD, noisy_BLD = layer(x_BLD, torch.tensor(lengths)), layer(noisy_BLD, torch.tensor(lengths))
        for b, n in enumerate(lengths):
            assert torch.equal(y_BLD[b, :n], noisy_BLD[b, :n])
            assert torch.equal(y_BLD[b, n:], layer.output.bias.expand(97 - n, -1))  # zeros from the paths
            torch.testing.assert_close(layer(x_BLD[b : b + 1, :n], torch.tensor([n]))[0], y_BLD[b, :n], rtol=0, atol=1e-5)
    assert len(calls) == 2 + len(lengths)


def gradients(layer: BlossomAttention, x_BLD: Tensor, lengths_B: Tensor) -> list[Tensor]:
    x = x_BLD.clone().requires_grad_()
    y = layer(x, lengths_B)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])]


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x_BLD, lengths_B = compiled(width=64, kv_heads=2), torch.randn(3, 70, 64), torch.tensor([70, 33, 51])
    monkeypatch.setattr(blossom_layer, "LEAST_PLACES", 0)
    before = gradients(layer, x_BLD, lengths_B)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # read for the compiled passes alone
    for left, right in zip(before, gradients(layer, x_BLD, lengths_B), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("shape", [(0, 5, 32), (2, 0, 32), (2, 3, 32)])
@pytest.mark.parametrize("causal", [True, False])
def test_nothing_to_read(causal: bool, shape: tuple[int, ...], calls: list[int]) -> None:
    found = gradients(compiled(causal=causal, width=32), torch.randn(shape), torch.zeros(shape[0], dtype=torch.int64))
    assert found[0].shape == found[1].shape == shape and all(torch.isfinite(x).all() for x in found)
    assert not found[1].any() and len(calls) == 1


def test_block_keys_do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x_BLD, lengths_B = compiled(width=64, kv_heads=2), torch.randn(2, 130, 64), torch.tensor([130, 100])
    before = gradients(layer, x_BLD, lengths_B)
    monkeypatch.setattr(blossom_layer, "WINDOWS", 3)
    for left, right in zip(before, gradients(layer, x_BLD, lengths_B), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5 * right.detach().abs().amax().item())


@pytest.mark.parametrize("change", ["double", "narrow heads", "autocast", "trained selector", "compressed"])
def test_what_does_not_fit_takes_the_general_form(change: str, calls: list[int]) -> None:
    selector = {"trained selector": "straight_through", "compressed": "compressed"}.get(change, "frozen")
    layer = compiled(selector=selector, width=32, heads=4 if change == "narrow heads" else 2)
    layer, x_BLD = (layer.double(), torch.randn(1, 20, 32).double()) if change == "double" else (layer, torch.randn(1, 20, 32))
    with torch.autocast("cpu", enabled=change == "autocast"):
        y_BLD = layer(x_BLD, torch.tensor([20]))
    y_BLD.float().sum().backward()
    assert not calls


@pytest.mark.parametrize("length", [512, 2048])
def test_training_holds_less_than_torchs_kernel(length: int) -> None:
    """And memory is linear in the length."""
    x, lengths = torch.randn(1, 2 * length, 64, requires_grad=True), torch.tensor([2 * length])
    blossom, full = BlossomAttention(BlossomSettings(), 64, 2), FullAttention(64, 2)

    def peak(layer: Any, L: int) -> int:
        return peak_bytes(lambda: layer(x[:, :L], lengths.clamp(max=L)).square().sum().backward())

    held = peak(blossom, length)
    assert held < 0.8 * peak(full, length)
    assert peak(blossom, 2 * length) < 2.1 * held


ENCODERS = {
    "sasrec": SASRecSettings(width=32, blocks=2, heads=2, attention=BlossomSettings()),
    "bert4rec": BERT4RecSettings(width=32, blocks=1, heads=2, attention=BlossomSettings(block=4, stride=4, compression=6, selected=1)),
}
SOME = (
    retrievers.assert_padding_content_changes_nothing,
    retrievers.assert_empty_histories_are_alike,
    retrievers.assert_padding_content_changes_no_training,
)


@pytest.mark.parametrize("check", SOME, ids=lambda check: check.__name__)
@pytest.mark.parametrize("settings", ENCODERS.values(), ids=ENCODERS.keys())
def test_encoders_hold_their_contracts(settings: Any, check: Callable[..., None]) -> None:
    torch.manual_seed(0)
    check(build_model(settings, SIZES))


def test_a_causal_encoder_holds_its_contracts() -> None:
    torch.manual_seed(0)
    for check in retrievers.CAUSAL:
        check(build_model(ENCODERS["sasrec"], SIZES))
