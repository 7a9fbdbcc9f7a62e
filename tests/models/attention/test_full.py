"""Full attention, causal and bidirectional, against a slow twin; its mask and its memory."""

import math

import pytest
import torch
from torch import Tensor

from longtrail.config import FullAttentionSettings
from longtrail.models.attention.factory import knows_order, make_attention
from longtrail.models.attention.full import FullAttention
from tests.contracts.largest import Largest


def slow_attention(layer: FullAttention, x_LD: Tensor, length: int) -> Tensor:
    """Head by head and place by place, over the real places (of the past, where causal): [n, D] of the n real places."""
    D = x_LD.shape[1]
    d = D // layer.heads
    q, k, v = (x_LD @ layer.inputs.weight.T + layer.inputs.bias).split(D, dim=-1)
    mixed = torch.zeros_like(x_LD[:length])
    for h in range(layer.heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(length):
            seen = i + 1 if layer.causal else length
            weights = torch.softmax(k[:seen, part] @ q[i, part] / math.sqrt(d), dim=0)
            mixed[i, part] = weights @ v[:seen, part]
    return mixed @ layer.output.weight.T + layer.output.bias


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("places", "heads"), [(1, 1), (7, 2), (19, 4)])
def test_attention_equals_the_slow_twin(places: int, heads: int, causal: bool) -> None:
    torch.manual_seed(0)
    layer = FullAttention(8, heads, causal=causal).double()
    lengths = [places, 0, 1, places // 2]
    x_BLD = torch.randn(4, places, 8, dtype=torch.float64)
    with torch.no_grad():
        fast_BLD = layer(x_BLD, torch.tensor(lengths))
        for x_LD, fast_LD, length in zip(x_BLD, fast_BLD, lengths, strict=True):
            torch.testing.assert_close(fast_LD[:length], slow_attention(layer, x_LD, length), rtol=0, atol=1e-12)


def test_a_history_of_nothing_reads_zeros_and_gives_a_finite_gradient() -> None:
    torch.manual_seed(0)
    layer = FullAttention(8, 2, causal=False)
    x_BLD = torch.randn(2, 5, 8, requires_grad=True)
    y_BLD = layer(x_BLD, torch.tensor([0, 3]))
    assert torch.equal(y_BLD[0], layer.output.bias.expand(5, 8))
    y_BLD.square().sum().backward()
    assert x_BLD.grad is not None and torch.isfinite(x_BLD.grad).all() and not x_BLD.grad[0].any()


def test_padding_content_moves_no_real_place() -> None:
    torch.manual_seed(0)
    layer = FullAttention(8, 2, causal=False)
    x_BLD, lengths_B = torch.randn(2, 9, 8), torch.tensor([4, 9])
    noisy_BLD = x_BLD.clone()
    noisy_BLD[0, 4:] = 1e4
    with torch.no_grad():
        assert torch.equal(layer(x_BLD, lengths_B)[0, :4], layer(noisy_BLD, lengths_B)[0, :4])


@pytest.mark.parametrize("causal", [True, False])
def test_no_square_of_the_length_is_made(causal: bool) -> None:
    layer = FullAttention(8, 1, causal=causal)
    with Largest() as largest:
        layer(torch.randn(2, 1024, 8, requires_grad=True), torch.tensor([1024, 700])).sum().backward()
    assert largest.elements <= 2 * 1024 * 8 * 3


def test_made_from_settings() -> None:
    layer = make_attention(FullAttentionSettings(), 8, 2, causal=False)
    assert isinstance(layer, FullAttention) and not layer.causal and layer.heads == 2
    assert not knows_order(FullAttentionSettings())
