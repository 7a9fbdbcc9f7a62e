"""What target attention starts from: Glorot's uniform numbers and biases of zero, as in SAM's released code."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longtrail.config import DIENSettings, DINSettings, SAMSettings, SIMSettings
from longtrail.models.attention.pointwise import glorot
from longtrail.models.registry import build_model
from tests.contracts.batches import SIZES

MANY = 1000  # units, where a vector's bound is to be seen
D = 32  # item ‖ category, 16 each


def assert_uniform(numbers: Tensor, bound: float) -> None:
    """In ±bound and near it on both sides; mean 0 and variance bound² / 3, within six standard errors."""
    n, found = numbers.numel(), numbers.detach().double().flatten()
    assert n >= 500
    assert 0.96 * bound < float(found.max()) <= bound * (1 + 1e-6)
    assert 0.96 * bound < -float(found.min()) <= bound * (1 + 1e-6)
    assert abs(float(found.mean())) < 6 * bound / math.sqrt(3 * n)
    assert float(found.square().mean()) == pytest.approx(bound**2 / 3, abs=6 * bound**2 * math.sqrt(4 / 45 / n))


@pytest.mark.parametrize(("shape", "inputs", "outputs"), [((300, 200), 300, 200), ((4, 50, 120), 200, 120), ((9000,), 9000, 1)])
def test_glorot(shape: tuple[int, ...], inputs: int, outputs: int) -> None:
    """Whatever the shape, the bound is that of the numbers of inputs and outputs."""
    torch.manual_seed(0)
    weights = glorot(*shape, inputs=inputs, outputs=outputs)
    assert weights.shape == shape and weights.requires_grad
    assert_uniform(weights, math.sqrt(6 / (inputs + outputs)))


# of each weight: what its layer takes and gives
CELL: dict[str, tuple[int, int]] = {"gates": (2 * D, 2 * D), "candidate": (2 * D, D)}
PASS = {"first": (4 * D, MANY), "second": (MANY, 1)}
FANS: dict[str, tuple[Any, dict[str, tuple[int, int]]]] = {
    "sam": (
        SAMSettings(attention_hidden=MANY, max_history=60, compression=16, passes=2),
        {f"passes.{i}.{name}": fans for i in range(2) for name, fans in (PASS | {"compress": (60, 16)}).items()}
        | {f"cell.{name}": fans for name, fans in CELL.items()},
    ),
    "sam 3p+": (
        SAMSettings(attention_hidden=MANY, enhancement=2, compression=0),
        {f"passes.{i}.{name}": fans for i in range(3) for name, fans in PASS.items()}
        | {f"cell.{name}": fans for name, fans in CELL.items()}
        | {f"enhance.steps.{t}": (D, D) for t in range(2)}
        | {"enhance.cell.gates": (3 * D, 2 * D), "enhance.cell.candidate": (3 * D, D)},
    ),
    "din": (DINSettings(attention_hidden=(MANY,)), {"attention.first": (4 * D, MANY), "attention.last": (MANY, 1)}),
    "din, two layers": (
        DINSettings(attention_hidden=(40, MANY), attention_weights="sigmoid"),
        {"attention.first": (4 * D, 40), "attention.middle.0": (40, MANY), "attention.last": (MANY, 1)},
    ),
    "dien": (
        DIENSettings(attention_hidden=(MANY,)),
        {"attention.first": (4 * D, MANY), "attention.last": (MANY, 1)} | {f"evolution.{name}": fans for name, fans in CELL.items()},
    ),
    "sim soft": (
        SIMSettings(search="soft", heads=2),
        {f"attention.{name}": (D, D) for name in ("query", "key", "value")} | {f"soft.{name}": (D, D) for name in ("query", "key")},
    ),
}


@pytest.mark.parametrize(("settings", "fans"), FANS.values(), ids=FANS.keys())
def test_attention_starts_at_glorots_bounds(settings: Any, fans: dict[str, tuple[int, int]]) -> None:
    """By what goes in and comes out of the layer as it is written, in however many blocks its weights are kept."""
    torch.manual_seed(0)
    weights = dict(build_model(settings, SIZES).named_parameters())
    for name, (inputs, outputs) in fans.items():
        assert_uniform(weights[name], math.sqrt(6 / (inputs + outputs)))


@pytest.mark.parametrize("name", [name for name in FANS if name != "sim soft"])
def test_biases_of_attention_start_at_zero(name: str) -> None:
    """All but those of the memory's gates, which are 1: at first it keeps most of what it has."""
    biases = {part: value for part, value in build_model(FANS[name][0], SIZES).named_parameters() if "_bias" in part}
    assert biases
    for part, value in biases.items():
        assert bool((value == (1.0 if part.endswith("gates_bias") else 0.0)).all()), part


@pytest.mark.parametrize("weights", ["sigmoid", "scaled_sigmoid"])
@pytest.mark.parametrize("max_history", [1, 8, 1000])
def test_attention_init_log_length_is_the_logarithm_of_an_eighth_of_the_length(weights: Any, max_history: int) -> None:
    """A score is -log(L / 8) where nothing else is said, whatever it is divided by afterwards, and 0 for histories of 8 and fewer."""
    torch.manual_seed(0)
    model: Any = build_model(SAMSettings(attention_init="log_length", attention_weights=weights, max_history=max_history), SIZES)
    for layer in model.passes:
        score = layer.second_bias.item() * (1 / math.sqrt(D) if weights == "scaled_sigmoid" else 1.0)
        assert score == pytest.approx(-math.log(max(1.0, max_history / 8)), abs=1e-5)
        assert not layer.first_bias.any() and not layer.compress_bias.any()
