"""Dropout's rate, scale, seeds and gradient."""

import pytest
import torch

from longtrail.models.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_elements_are_dropped_at_the_rate_and_kept_ones_are_scaled(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    y = Dropout(p)(torch.ones(301, 1001, dtype=dtype))
    assert y.dtype == dtype
    dropped = (y == 0).float()
    assert dropped.mean().item() == pytest.approx(p, abs=0.004)
    torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / (1 - p)], dtype=dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=0)
    # No column, row or neighbour knows of another: all four numbers cut from one are used alike.
    for means in (dropped.mean(0), dropped.mean(1), dropped.flatten()[: 301 * 1000].view(-1, 4).mean(0)):
        assert (means - p).abs().max() < 0.13
    flat = dropped.flatten() - p
    for lag in (1, 2, 3, 4):
        assert (flat[:-lag] * flat[lag:]).mean().abs() < 0.003


def test_it_follows_the_seed_and_rests_when_serving() -> None:
    x, layer = torch.randn(5, 7), Dropout(0.5)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(layer(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert layer.eval()(x) is x
    assert torch.equal(layer.added(x, 2 * x), x + 2 * x)
    assert torch.equal(Dropout(0.0).added(x, 2 * x), x + 2 * x)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5])
def test_a_residual_sum_is_x_plus_dropout_and_so_is_its_gradient(size: int) -> None:
    layer = Dropout(0.3)
    x, y = torch.randn(size, dtype=torch.float64, requires_grad=True), torch.randn(size, dtype=torch.float64, requires_grad=True)
    gradients = []
    for both in (lambda: layer.added(x, y), lambda: x + layer(y)):
        torch.manual_seed(3)
        value = both()
        gradients.append((value, *torch.autograd.grad(value.square().sum(), (x, y))))
    torch.testing.assert_close(gradients[0], gradients[1])
