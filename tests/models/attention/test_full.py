"""Full attention, causal and bidirectional, against a slow twin; its mask and its memory."""

import math

import pytest
import torch
from torch import Tensor

from longtrail.config import BlossomSettings, FullAttentionSettings
from longtrail.models.attention.factory import knows_order, make_attention, reach_of
from longtrail.models.attention.full import FullAttention
from tests.contracts.largest import Largest


def slow_attention(layer: FullAttention, x_LD: Tensor, length: int) -> Tensor:
    """Head by head and place by place, over the real places (of the past, where causal): [n, D] of the n real places."""
    D = x_LD.shape[1]
    d = D // layer.heads
    q, k, v = (x_LD @ layer.inputs.weight.T + layer.inputs.bias).split(D, dim=-1)
    if layer.rotary:
        q, k = (torch.cat([slow_rotation(part, d) for part in rows.split(d, dim=-1)], dim=-1) for rows in (q, k))
    mixed = torch.zeros_like(x_LD[:length])
    for h in range(layer.heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(length):
            seen = i + 1 if layer.causal else length
            weights = torch.softmax(k[:seen, part] @ q[i, part] / math.sqrt(d), dim=0)
            mixed[i, part] = weights @ v[:seen, part]
    return mixed @ layer.output.weight.T + layer.output.bias


def slow_rotation(x_Ld: Tensor, d: int) -> Tensor:
    """Pair j of place t turned by t · 10000^(-2j / d), sines and cosines one by one."""
    turned = torch.empty_like(x_Ld)
    for t in range(len(x_Ld)):
        for j in range(d // 2):
            angle, (a, b) = t * 10_000 ** (-2 * j / d), x_Ld[t, 2 * j : 2 * j + 2].tolist()
            turned[t, 2 * j], turned[t, 2 * j + 1] = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
    return turned


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("places", "heads"), [(1, 1), (7, 2), (19, 4)])
def test_attention_equals_the_slow_twin(places: int, heads: int, causal: bool, rotary: bool) -> None:
    torch.manual_seed(0)
    layer = FullAttention(8, heads, causal=causal, rotary=rotary).double()
    lengths = [places, 0, 1, places // 2]
    x_BLD = torch.randn(4, places, 8, dtype=torch.float64)
    with torch.no_grad():
        fast_BLD = layer(x_BLD, torch.tensor(lengths))
        for x_LD, fast_LD, length in zip(x_BLD, fast_BLD, lengths, strict=True):
            torch.testing.assert_close(fast_LD[:length], slow_attention(layer, x_LD, length), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rotary", [True, False])
def test_a_history_of_nothing_reads_zeros_and_gives_a_finite_gradient(rotary: bool) -> None:
    torch.manual_seed(0)
    layer = FullAttention(8, 2, causal=False, rotary=rotary)
    x_BLD = torch.randn(2, 5, 8, requires_grad=True)
    y_BLD = layer(x_BLD, torch.tensor([0, 3]))
    assert torch.equal(y_BLD[0], layer.output.bias.expand(5, 8))
    y_BLD.square().sum().backward()
    assert x_BLD.grad is not None and torch.isfinite(x_BLD.grad).all() and not x_BLD.grad[0].any()


@pytest.mark.parametrize("rotary", [True, False])
def test_padding_content_moves_no_real_place(rotary: bool) -> None:
    torch.manual_seed(0)
    layer = FullAttention(8, 2, causal=False, rotary=rotary)
    x_BLD, lengths_B = torch.randn(2, 9, 8), torch.tensor([4, 9])
    noisy_BLD = x_BLD.clone()
    noisy_BLD[0, 4:] = 1e4
    with torch.no_grad():
        assert torch.equal(layer(x_BLD, lengths_B)[0, :4], layer(noisy_BLD, lengths_B)[0, :4])


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_no_square_of_the_length_is_made(causal: bool, rotary: bool) -> None:
    layer = FullAttention(8, 1, causal=causal, rotary=rotary)
    with Largest() as largest:
        layer(torch.randn(2, 1024, 8, requires_grad=True), torch.tensor([1024, 700])).sum().backward()
    assert largest.elements <= 2 * 1024 * 8 * 3


@pytest.mark.parametrize("causal", [True, False])
def test_halves_are_turned_too(causal: bool) -> None:
    torch.manual_seed(0)
    layer = FullAttention(8, 2, causal=causal, rotary=True)
    x_BLD, lengths_B = torch.randn(2, 9, 8), torch.tensor([4, 9])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed_BLD = layer(x_BLD, lengths_B)
    assert mixed_BLD.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(mixed_BLD.float(), layer(x_BLD, lengths_B), rtol=0.05, atol=0.05)


def test_width_must_be_divisible_by_heads() -> None:
    with pytest.raises(ValueError, match="width 8 is not divisible by heads 3"):
        FullAttention(8, 3)


def test_heads_of_odd_width_cannot_be_turned() -> None:
    with pytest.raises(ValueError, match="width 6 divided by heads 2 is not an even number"):
        FullAttention(6, 2, rotary=True)
    FullAttention(6, 2)


def test_made_from_settings() -> None:
    layer = make_attention(FullAttentionSettings(), 8, 2, causal=False)
    assert isinstance(layer, FullAttention) and not layer.causal and layer.heads == 2
    assert layer.rotary and knows_order(FullAttentionSettings())
    learned = FullAttentionSettings(positions="learned")
    plain = make_attention(learned, 8, 2, causal=True)
    assert isinstance(plain, FullAttention) and plain.causal and not plain.rotary and not knows_order(learned)
    assert reach_of(learned, 7) == reach_of(FullAttentionSettings(), 7) == 7 and reach_of(BlossomSettings(), 7) is None
