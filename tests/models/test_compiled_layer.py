"""Attention as batches are trained with it, compiled, against its parts in float64."""

import random
import weakref
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from longtrail.config import DINSettings, SAMSettings
from longtrail.models.attention import compiled_layer, fused
from longtrail.models.attention.compiled import GROUP, PAIR, TILE
from longtrail.models.attention.fused import COMPILED_UNITS, COMPILED_WIDTH, PairLayer, SharedKeys, attend
from longtrail.models.attention.pointwise import normalised, pair_dense, pair_hidden, pooled
from longtrail.models.contracts import Sizes
from longtrail.models.masks import padding_mask
from longtrail.models.registry import build_model
from tests.contracts.batches import draws, make_request

KINDS = ("linear", "sigmoid", "softmax", "softmax_eps")
LENGTHS = (1, GROUP - 1, TILE - 1, TILE, TILE + 1, 2 * TILE + 5)
NAMES = ("keys", "weights", "bias", "last", "last_bias")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every batch is large enough; counts those that the compiled layer took."""
    taken: list[int] = []
    real = compiled_layer.attend

    def counted(*values: Any) -> Any:
        taken.append(1)
        return real(*values)

    monkeypatch.setattr(compiled_layer, "attend", counted)
    monkeypatch.setattr(fused, "COMPILED_PAIRS", 0)
    yield taken
    torch.set_num_threads(1)


def inputs(seed: int, shape: tuple[int, ...], lengths: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    """Numbers of a layer, and the mask; what stands in padded places is as large as the rest."""
    B, C, L, D, H = shape
    drawn = draws(seed)
    sizes = {"keys": (B, L, D), "weights": (B, C, H, D), "bias": (B, C, H), "last": (H,), "last_bias": ()}
    values = {name: torch.randn(size, generator=drawn) for name, size in sizes.items()}
    values["weights"] *= 2 * D**-0.5
    return values, padding_mask(torch.tensor(lengths), L)


def by_parts(values: dict[str, Tensor], mask_BL: Tensor, kind: Any, scale: float, *, biased: bool) -> tuple[Tensor, Tensor]:
    """The oracle: autograd's own backward of every step."""
    hidden_BCHL = pair_hidden(values["keys"], values["weights"], values["bias"])
    scores_BCL = pair_dense(hidden_BCHL, values["last"].unsqueeze(0)).squeeze(2)
    a_BCL = normalised(scores_BCL + values["last_bias"] if biased else scores_BCL, mask_BL, kind, scale)
    return a_BCL, pooled(a_BCL, values["keys"])


def layer_of(values: dict[str, Tensor], kind: Any, scale: float = 1.0, *, biased: bool = True) -> PairLayer:
    return PairLayer(values["weights"], values["bias"], values["last"], values["last_bias"] if biased else None, kind, scale)


def gradients(outputs: tuple[Tensor, ...], values: dict[str, Tensor], seed: int, names: tuple[str, ...] = NAMES) -> tuple[Tensor, ...]:
    """Of a random function of the outputs, the same whatever their precision."""
    drawn = draws(seed)
    weights = [torch.randn(x.shape, generator=drawn).to(x.dtype) for x in outputs]
    loss = torch.stack([(x * w).sum() for x, w in zip(outputs, weights, strict=True)]).sum()
    return torch.autograd.grad(loss, [values[name] for name in names], retain_graph=True)


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    torch.testing.assert_close(
        ours.double(), theirs, rtol=2e-5, atol=2e-5 * (1 + theirs.detach().abs().max().item()), msg=lambda text: f"{what}: {text}"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_layer(kind: Any, calls: list[int]) -> None:
    """Values and all gradients over random cases: lengths 0, 1, about a tile, all; one candidate and many; no bias; a scale; two threads."""
    chance = random.Random(kind)
    for case in range(24):
        torch.set_num_threads(1 + case % 2)
        L, B, biased, scale = LENGTHS[case % len(LENGTHS)], chance.choice((1, 3)), case % 3 > 0, chance.choice((1.0, 0.3))
        shape = B, chance.choice((1, 2, 5)), L, COMPILED_WIDTH * chance.choice((1, 2, 3)), COMPILED_UNITS * chance.choice((1, 2, 3))
        lengths = [(0, 1, L)[case % 3], *(chance.randint(0, L) for _ in range(B - 1))]
        values, mask_BL = inputs(case, shape, lengths)
        wide = {name: x.double().requires_grad_() for name, x in values.items()}
        for x in values.values():
            x.requires_grad_()
        names = NAMES if biased else NAMES[:-1]
        found = attend(values["keys"], mask_BL, layer_of(values, kind, scale, biased=biased))
        slow = by_parts(wide, mask_BL, kind, scale, biased=biased)
        assert not found[0].masked_select(~mask_BL.unsqueeze(1)).any()
        pairs = zip((*found, *gradients(found, values, case, names)), (*slow, *gradients(slow, wide, case, names)), strict=True)
        for what, (ours, theirs) in zip(("a", "u", *names), pairs, strict=True):
            close(ours, theirs, f"case {case}, {shape}, {lengths}, {what}")
    assert len(calls) == 24


@pytest.mark.parametrize("kind", KINDS)
def test_a_million_on_padding_changes_no_bit(kind: Any, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither weights and reads nor a gradient, compiled or by parts; histories of no, a few and all places."""
    values, mask_BL = inputs(5, (3, 2, TILE + 7, COMPILED_WIDTH, COMPILED_UNITS), [0, 5, TILE + 7])
    for least in (0, 1 << 60):
        monkeypatch.setattr(fused, "COMPILED_PAIRS", least)
        found = []
        for noise in (0.0, 1e6, -1e6):
            given = values | {"keys": values["keys"].masked_fill(~mask_BL.unsqueeze(-1), noise)}
            given = {name: x.clone().requires_grad_() for name, x in given.items()}
            outputs = attend(given["keys"], mask_BL, layer_of(given, kind))
            found.append((*outputs, *gradients(outputs, given, 0)))
        assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))
        assert not found[0][0].masked_select(~mask_BL.unsqueeze(1)).any()
    assert len(calls) == 3


def test_widths_fit() -> None:
    """What fused.py asks of D and H, without loading numba, is what the kernels need."""
    assert COMPILED_WIDTH % PAIR == 0
    assert COMPILED_UNITS % GROUP == 0


def test_gradients_of_the_oracle_are_right() -> None:
    """Against finite differences, in float64: the layer that autograd is given where nothing is compiled.

    Not softmax_eps, whose gradient takes the largest score for a constant.
    """
    values, mask_BL = inputs(3, (2, 2, 3, 2, 2), [3, 1])
    wide = [values[name].double().requires_grad_() for name in NAMES]
    for kind in KINDS[:3]:

        def function(*given: Tensor, kind: Any = kind) -> tuple[Tensor, Tensor]:
            return attend(given[0], mask_BL, layer_of(dict(zip(NAMES, given, strict=True)), kind, 0.7))

        assert torch.autograd.gradcheck(function, wide)


def test_layers_that_share_keys(calls: list[int]) -> None:
    """Two layers and another user of the keys; then one layer alone, and everything again: nothing of one backward pass is left in the next."""
    values, mask_BL = inputs(1, (2, 1, TILE + 3, COMPILED_WIDTH, COMPILED_UNITS), [TILE + 3, 5])
    for x in values.values():
        x.requires_grad_()
    wide = {name: x.detach().double().requires_grad_() for name, x in values.items()}
    shared = SharedKeys(values["keys"])
    first = attend(shared, mask_BL, layer_of(values, "sigmoid"))
    second = attend(shared, mask_BL, layer_of(values, "softmax"))
    found: tuple[Tensor, ...] = (first[1], second[1], values["keys"].square())
    slow: tuple[Tensor, ...] = (*(by_parts(wide, mask_BL, kind, 1.0, biased=True)[1] for kind in ("sigmoid", "softmax")), wide["keys"].square())
    for part, names in ((slice(0, 3), NAMES), (slice(0, 1), NAMES[1:]), (slice(1, 2), ("keys",)), (slice(0, 3), NAMES)):
        for ours, theirs, name in zip(gradients(found[part], values, 0, names), gradients(slow[part], wide, 0, names), names, strict=True):
            close(ours, theirs, f"{part}, {name}")
    assert len(calls) == 2


def test_threads_change_no_bit_and_nothing_stays(calls: list[int]) -> None:
    values, mask_BL = inputs(2, (5, 2, TILE + 9, COMPILED_WIDTH, COMPILED_UNITS), [0, 1, TILE, TILE + 9, 7])
    for x in values.values():
        x.requires_grad_()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = attend(values["keys"], mask_BL, layer_of(values, "sigmoid"))
        results.append((*found, *gradients(found, values, 0)))
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))
    shared = SharedKeys(values["keys"])
    attend(shared, mask_BL, layer_of(values, "sigmoid"))[1].sum().backward()
    gone = weakref.ref(shared.compiled())
    del shared
    assert gone() is None  # no cycle: a batch's keys are 64 MB
    assert len(calls) == 4


def test_who_takes_another_way(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, other widths and numbers of units, autocast, small batches, no gradient."""
    fits = (2, 1, 4, COMPILED_WIDTH, COMPILED_UNITS)

    def run(shape: tuple[int, ...] = fits, dtype: torch.dtype = torch.float32) -> None:
        values, mask_BL = inputs(0, shape, [4, 2])
        attend(values["keys"].to(dtype), mask_BL, layer_of({name: x.to(dtype) for name, x in values.items()}, "sigmoid"))

    run(dtype=torch.float64)
    run((2, 1, 4, COMPILED_WIDTH + 8, COMPILED_UNITS))
    run((2, 1, 4, COMPILED_WIDTH, COMPILED_UNITS + 1))
    with torch.no_grad():
        run()
    with torch.autocast("cpu", torch.bfloat16):
        run()
    assert not calls
    run()
    assert len(calls) == 1
    monkeypatch.setattr(fused, "COMPILED_PAIRS", 9)
    run()
    assert len(calls) == 1


@pytest.mark.parametrize(
    "settings", [SAMSettings(), SAMSettings(attention_weights="softmax", enhancement=2), DINSettings()], ids=["sam", "soft", "din"]
)
def test_models_learn_the_same(settings: Any, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of every parameter, beside the layer that is not compiled."""
    torch.manual_seed(4)
    request = make_request()
    model = build_model(settings, Sizes(items=60, categories=6, actions=4)).train()
    found = []
    for least in (0, 1 << 60):
        monkeypatch.setattr(fused, "COMPILED_PAIRS", least)
        alone = deepcopy(model)  # a pass in training mode moves what the head's normalisation remembers
        alone(*request).square().sum().backward()
        found.append({name: p.grad for name, p in alone.named_parameters()})
    assert calls
    for name, grad in found[0].items():
        other = found[1][name]
        assert grad is not None and other is not None
        close(grad, other.double(), name)
