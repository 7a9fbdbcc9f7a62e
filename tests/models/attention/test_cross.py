"""Exact cross attention, what IFA is compared with, against the textbook's, pair by pair; and when a shared sum is less work than it."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longtrail.models.attention.cross import CrossAttention
from longtrail.models.attention.linear import LinearAttention
from longtrail.models.attention.selected import SelectedAttention
from longtrail.models.masks import padding_mask
from tests.contracts.batches import draws


def slow_cross(layer: CrossAttention, query_BCD: Tensor, keys_BLD: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(read [B, C, D], weights [B, C, L]: the mean over heads), candidate by candidate and head by head."""
    (B, C, D), E = query_BCD.shape, query_BCD.shape[2] // layer.heads
    reads, weights = torch.zeros_like(query_BCD), query_BCD.new_zeros(B, C, keys_BLD.shape[1])
    key_weight, value_weight = layer.keys_values.weight.split(D)
    for b, n in enumerate(lengths):
        for c in range(C if n else 0):
            q, keys, values = layer.queries.weight @ query_BCD[b, c], keys_BLD[b, :n] @ key_weight.T, keys_BLD[b, :n] @ value_weight.T
            for h in range(layer.heads):
                part = slice(h * E, (h + 1) * E)
                powers = [math.exp(float(q[part] @ k[part]) / math.sqrt(E)) for k in keys]
                shares = torch.tensor(powers, dtype=q.dtype) / sum(powers)
                reads[b, c, part] = shares @ values[:, part]
                weights[b, c, :n] += shares / layer.heads
    return reads, weights


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_reads_and_weights_equal_the_textbooks(heads: int) -> None:
    """An empty history reads zeros; what stands in padding means nothing."""
    torch.manual_seed(0)
    layer, lengths = CrossAttention(8, heads).double(), [0, 1, 5, 3]
    mask_BL = padding_mask(torch.tensor(lengths), 6)
    query_BCD, keys_BLD = (3 * torch.randn(4, n, 8, generator=draws(n), dtype=torch.float64) for n in (2, 6))
    with torch.no_grad():
        slow, slow_weights = slow_cross(layer, query_BCD, keys_BLD, lengths)
        read_BCD = layer(query_BCD, keys_BLD, mask_BL)
        torch.testing.assert_close(read_BCD, slow, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.weights(query_BCD, keys_BLD, mask_BL), slow_weights, rtol=0, atol=1e-12)
        assert torch.equal(layer(query_BCD, keys_BLD.masked_fill(~mask_BL.unsqueeze(-1), 1e3), mask_BL), read_BCD)


def test_linear_attention_is_fewer_multiply_adds_from_a_few_candidates_on() -> None:
    """A count of work, not of time, at L = 1,000, four heads of E = 16: softmax attention, its keys and values never projected, is less for E / 4
    candidates, the shared sum for 2 E; that sum does not grow with them."""
    torch.manual_seed(0)
    L, D, H = 1000, 64, 4
    linear, softmax = LinearAttention(D, heads=H, features=16), SelectedAttention(D, H)
    keys_BLD, mask_BL = torch.randn(1, L, D), torch.ones(1, L, dtype=torch.bool)

    def work(candidates: int) -> tuple[int, int]:
        query_BCD, tiled = torch.randn(1, candidates, D), keys_BLD.unsqueeze(1).expand(-1, candidates, -1, -1)
        counts = []
        for read in (
            lambda: linear.read(query_BCD, linear.state(keys_BLD, mask_BL), 0),
            lambda: softmax(query_BCD, tiled, tiled, mask_BL.unsqueeze(1).expand(-1, candidates, -1)),
        ):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                read()
            counts.append(counter.get_total_flops())
        return counts[0], counts[1]

    few, many = work(4), work(32)
    assert 0 < few[1] < few[0] and many[0] < many[1]
    assert many[0] < 1.2 * few[0] and many[1] > 7.5 * few[1]
