"""Blossom attention as a whole: against its equations written densely, values and gradients, and the properties it must have."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models import peak_bytes
from longtrail.config import BlossomSettings
from longtrail.models.attention import block_sparse, selection
from longtrail.models.attention import blossom as blossom_module
from longtrail.models.attention.block_sparse import _forward, _laid_end_to_end
from longtrail.models.attention.blossom import BlossomAttention
from longtrail.models.attention.factory import knows_order, make_attention
from longtrail.models.attention.rope import rotate
from longtrail.models.attention.selection import best_blocks
from longtrail.models.attention.short_term import _weights, distances
from tests.contracts.largest import Largest
from tests.models.attention.blossom_oracle import blossom, turned

SELECTORS = ("frozen", "straight_through", "compressed")
SMALL: dict[str, Any] = {"window": 2, "block": 4, "compression": 6, "stride": 4, "selected": 2}
SIZES: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "block of two strides": SMALL | {"compression": 3, "stride": 2, "selected": 1, "kv_heads": 2},
    "window over the block": SMALL | {"window": 9, "kv_heads": 4, "compression": 4},
}


def make_layer(
    selector: str = "frozen", *, causal: bool = True, width: int = 16, heads: int = 4, scale: float = 1.0, **sizes: Any
) -> BlossomAttention:
    """Weights large enough for uneven attention and blocks that differ; gates and intra-block places that are not zero."""
    torch.manual_seed(0)
    layer = BlossomAttention(BlossomSettings(selector=selector, **sizes), width, heads, causal=causal)  # type: ignore[arg-type]
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))
    return layer.double()


def paths(layer: BlossomAttention, x_BLD: Tensor, lengths_B: Tensor) -> list[Tensor]:
    """Each path's [B, H, L, d]; L a multiple of the block."""
    B, L, _ = x_BLD.shape
    heads = layer._heads(layer.inputs(x_BLD))
    results = layer._paths(*heads, None if layer.causal else lengths_B)
    return [path.view(B, -1, L, layer.heads // layer.settings.kv_heads, layer.d).transpose(2, 3).flatten(1, 2) for path in results]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_values_and_gradients_equal_the_dense_twin(sizes: dict[str, Any], selector: str, causal: bool) -> None:
    layer = make_layer(selector, causal=causal, **sizes)
    lengths = (27, 0, 1, 3, 4, 5, 9, 16, 20)
    x_BLD = torch.randn(len(lengths), max(lengths), 16, dtype=torch.float64)
    fast_x, slow_x = x_BLD.clone().requires_grad_(), x_BLD.clone().requires_grad_()
    fast_BLD = layer(fast_x, torch.tensor(lengths))
    twins = [blossom(layer, slow_x[b, :n]) if n else None for b, n in enumerate(lengths)]
    assert min(twin.margin for twin in twins if twin) > 1e-6  # no tie that rounding could break: another seed if this fails
    fast_loss, slow_loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for fast_LD, twin, n in zip(fast_BLD, twins, lengths, strict=True):
        if twin:
            torch.testing.assert_close(fast_LD[:n], twin.output_LD, rtol=0, atol=1e-12)
            fast_loss, slow_loss = fast_loss + fast_LD[:n].square().sum(), slow_loss + twin.output_LD.square().sum()
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    fast = torch.autograd.grad(fast_loss, [fast_x, *parameters.values()])
    slow = torch.autograd.grad(slow_loss, [slow_x, *parameters.values()])
    for name, left, right in zip(["x", *parameters], fast, slow, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("causal", [True, False])
def test_at_the_released_sizes(causal: bool) -> None:
    """8 query and 2 key/value heads, blocks of 16: the paths against dense attention under the union mask, and under the power mask."""
    layer = make_layer("compressed", causal=causal, width=64, heads=8, kv_heads=2)
    x_BLD = torch.randn(1, 112, 64, dtype=torch.float64)
    with torch.no_grad():
        twin, (long, short, compressed) = blossom(layer, x_BLD[0]), paths(layer, x_BLD, torch.tensor([112]))
    assert twin.margin > 1e-9
    assert twin.allowed_GLL[0, -1].sum() == 80 and not torch.equal(twin.allowed_GLL[0], twin.allowed_GLL[1])  # sparse, and a choice for each group
    torch.testing.assert_close(long[0], twin.long_HLd, rtol=0, atol=1e-12)
    torch.testing.assert_close(short[0], twin.short_HLd, rtol=0, atol=1e-12)
    torch.testing.assert_close(compressed[0], twin.compressed_HLd, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("selector", SELECTORS)
def test_the_future_changes_nothing(selector: str, dtype: torch.dtype) -> None:
    """Bit-equal before t, for t around whole blocks, where other future queries choose other blocks."""
    layer = make_layer(selector, width=32, heads=4, kv_heads=2).to(dtype)
    x_BLD, lengths_B = torch.randn(2, 150, 32, dtype=dtype), torch.tensor([150, 150])
    with torch.no_grad():
        y_BLD = layer(x_BLD, lengths_B)
        for t in (1, 15, 16, 17, 31, 32, 33, 95, 96, 97, 127, 128, 129, 144, 149):
            other_BLD = x_BLD.clone()
            other_BLD[:, t:] = 3 * torch.randn_like(other_BLD[:, t:])
            assert torch.equal(layer(other_BLD, lengths_B)[:, :t], y_BLD[:, :t]), t


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("selector", SELECTORS)
def test_padding_changes_nothing(selector: str, causal: bool) -> None:
    """Neither what stands there (bit-equal) nor how much of it there is."""
    layer = make_layer(selector, causal=causal, kv_heads=2, **SMALL)
    lengths = [30, 17, 4, 1, 0]
    x_BLD = torch.randn(5, 37, 16, dtype=torch.float64)
    noisy_BLD = x_BLD.clone()
    for b, n in enumerate(lengths):
        noisy_BLD[b, n:] = 100 * torch.randn_like(noisy_BLD[b, n:])
    with torch.no_grad():
        y_BLD, noisy = layer(x_BLD, torch.tensor(lengths)), layer(noisy_BLD, torch.tensor(lengths))
        assert torch.isfinite(noisy).all()
        for b, n in enumerate(lengths):
            assert torch.equal(y_BLD[b, :n], noisy[b, :n])
            if n:
                alone = layer(x_BLD[b : b + 1, :n], torch.tensor([n]))[0]
                torch.testing.assert_close(alone, y_BLD[b, :n], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("selector", SELECTORS)
def test_histories_of_nothing(selector: str, causal: bool) -> None:
    layer = make_layer(selector, causal=causal, **SMALL)
    x_BLD = torch.randn(3, 6, 16, dtype=torch.float64, requires_grad=True)
    y_BLD = layer(x_BLD, torch.zeros(3, dtype=torch.int64))
    assert torch.isfinite(y_BLD).all()
    if not causal:
        assert torch.equal(y_BLD, layer.output.bias.expand_as(y_BLD))
    y_BLD.square().sum().backward()
    assert x_BLD.grad is not None and torch.isfinite(x_BLD.grad).all()


def full_causal(layer: BlossomAttention, x_BLD: Tensor) -> Tensor:
    q, k, v = layer._heads(layer.inputs(x_BLD))
    k, v = (x.repeat_interleave(layer.heads // layer.settings.kv_heads, dim=1) for x in (k, v))
    return functional.scaled_dot_product_attention(q.transpose(2, 3).flatten(1, 2), k, v, is_causal=True)


def test_short_histories_are_read_whole() -> None:
    """Up to (selected + 1) · block places the long path is dense attention; from the next block on it is not."""
    layer = make_layer(width=32, heads=4, kv_heads=2)
    x_BLD = torch.randn(2, 96, 32, dtype=torch.float64)
    with torch.no_grad():
        whole, long = full_causal(layer, x_BLD), paths(layer, x_BLD, torch.tensor([96, 96]))[0]
    torch.testing.assert_close(long[:, :, :80], whole[:, :, :80], rtol=0, atol=1e-12)
    assert (long - whole)[:, :, 80:].abs().amax() > 1e-3


def test_a_wide_window_reads_everything() -> None:
    layer = make_layer(width=32, heads=4, kv_heads=2, window=48)
    x_BLD = torch.randn(2, 48, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(paths(layer, x_BLD, torch.tensor([48, 48]))[1], full_causal(layer, x_BLD), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("gates", "path"), [((1.0, 0.0), 0), ((0.0, 1.0), 1)])
def test_an_open_gate_lets_one_path_through(gates: tuple[float, float], path: int) -> None:
    layer = make_layer(kv_heads=2, **SMALL)
    nn.init.zeros_(layer.gate.weight)
    x_BLD, lengths_B = torch.randn(2, 32, 16, dtype=torch.float64), torch.tensor([32, 32])
    with torch.no_grad():
        layer.gate.bias.copy_(torch.tensor(gates).sub(0.5).mul(2000).repeat(4))  # by head: long, short
        alone = layer.output(paths(layer, x_BLD, lengths_B)[path].transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x_BLD, lengths_B), alone, rtol=0, atol=1e-12)


def test_gates_start_half_open() -> None:
    layer = BlossomAttention(BlossomSettings(), 16, 2)
    assert not layer.gate.weight.any() and not layer.gate.bias.any()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_places_within_a_window_start_at_zero(kv_heads: int, selector: Any) -> None:
    """P. With a frozen selector they stay so: its choice is by the keys alone."""
    layer = BlossomAttention(BlossomSettings(selector=selector, kv_heads=kv_heads), 16, 2)
    assert layer.block_keys.places.shape == (kv_heads, 32, 8)
    assert not layer.block_keys.places.any()
    assert layer.block_keys.places.requires_grad == (selector != "frozen")


@pytest.mark.parametrize("selector", SELECTORS)
def test_only_a_frozen_selector_is_without_a_gradient(selector: str) -> None:
    layer = make_layer(selector, **SMALL)
    layer(torch.randn(2, 30, 16, dtype=torch.float64), torch.tensor([30, 30])).square().sum().backward()
    without = {name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()}
    expected = {f"block_keys.{name}" for name, _ in layer.block_keys.named_parameters()}
    assert without == (expected if selector == "frozen" else set()) and len(expected) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_know_differences_of_positions_alone(dtype: torch.dtype) -> None:
    """Of what the layer itself rotates with: a constant added to all places changes no product; each place is turned as the oracle turns it."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 20, 8, dtype=dtype)
    logits, atol = [], 1e-11 if dtype == torch.float64 else 1e-5
    for offset in (0, 1, 1000):
        late_q, late_k = (rotate(functional.pad(x, (0, 0, offset, 0)).view(1, -1, 1, 8))[0, offset:, 0] for x in (q, k))
        torch.testing.assert_close(late_q, turned(q.double(), offset).to(dtype), rtol=0, atol=atol)
        logits.append(late_q @ late_k.T)
    for later in logits[1:]:
        torch.testing.assert_close(later, logits[0], rtol=0, atol=atol)
    assert (rotate(q.view(1, 20, 1, 8))[0, 1:, 0] - q[1:]).abs().amax(1).min() > 1e-3
    quarter = rotate(torch.tensor([1.0, 0.0], dtype=dtype).expand(1, 3, 1, 2))[0, 2, 0]  # at place 2 by two radians, counter-clockwise
    torch.testing.assert_close(quarter, torch.tensor([math.cos(2), math.sin(2)], dtype=dtype), rtol=0, atol=atol)


def test_key_value_heads_as_many_as_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeating key/value heads leaves the short path as it is, and the long one where blocks are chosen as the group did: at all places."""
    grouped, separate = make_layer(kv_heads=2, **SMALL), make_layer(kv_heads=4, **SMALL)
    d, x_BLD, lengths_B = 4, torch.randn(1, 32, 16, dtype=torch.float64), torch.tensor([32])
    with torch.no_grad():
        q, k, v = grouped.inputs.weight.split([16, 2 * d, 2 * d])
        k, v = (x.view(2, d, 16).repeat_interleave(2, dim=0).flatten(0, 1) for x in (k, v))
        separate.inputs.weight.copy_(torch.cat([q, k, v]))
        separate.block_keys.load_state_dict(grouped.block_keys.state_dict() | {"places": grouped.block_keys.places.repeat_interleave(2, dim=0)})
        (long, short), (other_long, other_short) = paths(grouped, x_BLD, lengths_B), paths(separate, x_BLD, lengths_B)
    torch.testing.assert_close(short, other_short, rtol=0, atol=1e-12)
    torch.testing.assert_close(long[:, :, :12], other_long[:, :, :12], rtol=0, atol=1e-12)  # no choice yet: at most two blocks before
    assert (long - other_long)[:, :, 12:].abs().amax() > 1e-3
    choose, kept = blossom_module.best_blocks, []

    def remembered(*given: Any) -> tuple[Tensor, Tensor]:
        kept.append(choose(*given))
        return kept[-1]

    with torch.no_grad():
        monkeypatch.setattr(blossom_module, "best_blocks", remembered)
        paths(grouped, x_BLD, lengths_B)
        monkeypatch.setattr(blossom_module, "best_blocks", lambda *_: tuple(x.repeat_interleave(2, dim=0) for x in kept[0]))
        torch.testing.assert_close(paths(separate, x_BLD, lengths_B)[0], long, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("length", "long", "short"), [(50, 1_275, 466), (200, 11_908, 2_324), (1_000, 69_908, 13_956), (2_000, 142_440, 29_932)])
def test_how_many_pairs_are_read(length: int, long: int, short: int) -> None:
    """Row by row. With q = 0 all keys that are read weigh the same, so exp(log-sum) counts them, and so do weights that are not zero."""
    torch.manual_seed(0)
    filled = length + -length % 16
    q, k = torch.randn(1, filled, 8, dtype=torch.float64), torch.randn(1, filled // 16, 8, dtype=torch.float64)
    chosen_NLK, _ = best_blocks(q, k, 4, 16)
    zeros = torch.zeros(1, filled, 1, 8, dtype=torch.float64)
    x = _laid_end_to_end(zeros, zeros[:, :, 0], zeros[:, :, 0], chosen_NLK, 16, None)
    _, log_sums = _forward(x, slice(0, filled), slice(0, filled // 16))
    rows = [(16 * min(4, t // 16) + t % 16 + 1, min(t + 1, 8) + sum(2**n <= t for n in range(3, 20))) for t in range(length)]
    assert tuple(sum(counts) for counts in zip(*rows, strict=True)) == (long, short)
    assert log_sums.view(-1)[:length].exp().round(decimals=6).tolist() == [counts for counts, _ in rows]
    shifts = tuple(distances(length, 8))
    weights_SNLM = _weights(zeros[:, :length], zeros[:, :length, 0], shifts, None)
    assert (weights_SNLM > 0).sum(0).view(-1).tolist() == [counts for _, counts in rows]
    assert [s for s in shifts if s <= 39] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 32]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("selector", SELECTORS)
def test_no_square_of_the_length_is_made(selector: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: the largest tensor at L = 2,048 is linear in it (queries gathered for four blocks each), and so is all that is held."""
    for module, name in ((block_sparse, "LEAST_ELEMENTS"), (block_sparse, "MOST_ELEMENTS"), (selection, "CHUNK_ELEMENTS")):
        monkeypatch.setattr(module, name, 1 << 14)  # so that the chunks, whose size is fixed, are small beside the rest
    layer = BlossomAttention(BlossomSettings(selector=selector), 16, 2, causal=causal)  # type: ignore[arg-type]

    def call(length: int) -> None:
        layer(torch.randn(1, length, 16, requires_grad=True), torch.tensor([length])).sum().backward()

    with Largest() as largest:
        call(2048)
    assert largest.elements <= 2048 * 16 * 6 < 2048 * 2048 // 16
    short, long = peak_bytes(lambda: call(2048)), peak_bytes(lambda: call(4096))
    assert long < 2.1 * short and long < 4 * 4096 * 4096 / 2


@pytest.mark.parametrize("causal", [True, False])
def test_how_much_is_done_at_once_changes_nothing(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of queries at a time, as a small cache has it, and all at once, as a GPU does: values and gradients."""
    layer, lengths_B = make_layer("straight_through", causal=causal, kv_heads=2, **SMALL), torch.tensor([64, 41, 5])
    x_BLD = torch.randn(3, 64, 16, dtype=torch.float64, requires_grad=True)
    found = []
    for elements in (1, 1 << 30):
        for module, name in ((block_sparse, "LEAST_ELEMENTS"), (block_sparse, "MOST_ELEMENTS"), (selection, "CHUNK_ELEMENTS")):
            monkeypatch.setattr(module, name, elements)
        monkeypatch.setattr(block_sparse, "CHUNKS", 1)
        y_BLD = layer(x_BLD, lengths_B)
        found.append([y_BLD, *torch.autograd.grad(y_BLD.square().sum(), [x_BLD, *layer.parameters()])])
    for small, large in zip(*found, strict=True):
        torch.testing.assert_close(small, large, rtol=1e-10, atol=1e-11)


def test_a_gpu_is_given_few_chunks() -> None:
    """Their number is what a GPU waits for; a tensor of no memory stands in for one. A chunk's size is bounded all the same."""
    for length, most in ((4096, 8), (65_536, 1024)):
        q_NLd = torch.empty(128, length, 1, 64, device="meta")
        selector = list(selection._chunks(q_NLd[:, :, 0], length // 16, 16, True))
        chosen_NLK = torch.empty(128, length, 4, dtype=torch.int64, device="meta")
        sparse = list(_laid_end_to_end(q_NLd, q_NLd[:, :, 0], q_NLd[:, :, 0], chosen_NLK, 16, None).chunks())
        assert len(selector) <= most and len(sparse) <= most // 2
        assert 128 * (selector[0][0].stop * length // 16) <= 1 << 25 and sparse[0][0].stop * 64 <= 1 << 23


def test_distances_of_place_39() -> None:
    assert distances(40, 8) == [*range(9), 16, 32]
    assert distances(40, 1) == [0, 1, 2, 4, 8, 16, 32] and distances(5, 8) == [0, 1, 2, 3, 4] and distances(1, 8) == [0]


def test_blocks_with_no_share_are_not_read() -> None:
    """Block scores 0, -20, -24 and -30: e^-20 is above 1e-10, the others are not. Far below "nothing", even the best is not read."""
    keys = torch.tensor([0.0, -20.0, -24.0, -30.0, 7.0], dtype=torch.float64).view(1, 5, 1)
    chosen, shares = best_blocks(torch.ones(1, 10, 1, dtype=torch.float64), keys, 4, 2)
    assert chosen[0, 8].tolist() == [0, 1, -1, -1] and chosen[0, 1].tolist() == [-1] * 4 and chosen[0, 4].tolist() == [0, 1, -1, -1]
    torch.testing.assert_close(shares[0, 8], torch.tensor([1.0, math.exp(-20), math.exp(-24), math.exp(-30)], dtype=torch.float64))
    chosen, _ = best_blocks(torch.ones(1, 10, 1, dtype=torch.float64), keys - 2000, 4, 2)
    assert (chosen == -1).all()


@pytest.mark.parametrize(("score", "read"), [(-970.0, True), (-1020.0, True), (-1024.0, False)])
def test_a_block_is_weighed_against_nothing(score: float, read: bool) -> None:
    """ "Nothing" has the score -1000: beside it a lone block at -1020 has a share of e^-20, one at -1024 less than 1e-10."""
    ones = torch.ones(1, 4, 1, dtype=torch.float64)
    chosen, shares = best_blocks(ones, score * ones[:, :2], 1, 2)
    assert chosen[0, 2:, 0].tolist() == ([0, 0] if read else [-1, -1])
    torch.testing.assert_close(shares[0, 2, 0], torch.tensor(score + 1000, dtype=torch.float64).sigmoid())


@pytest.mark.parametrize(("gap", "chosen"), [(23.0, [0, 1]), (23.05, [0, -1])])
def test_where_the_least_share_lies(gap: float, chosen: list[int]) -> None:
    """e^-23 is 1.03e-10, e^-23.05 is 0.98e-10."""
    keys = torch.tensor([0.0, -gap, 0.0], dtype=torch.float64).view(1, 3, 1)
    assert best_blocks(torch.ones(1, 6, 1, dtype=torch.float64), keys, 2, 2)[0][0, 4].tolist() == chosen


def test_made_from_settings() -> None:
    layer = make_attention(BlossomSettings(kv_heads=2), 32, 4, causal=False)
    assert isinstance(layer, BlossomAttention) and not layer.causal
    assert knows_order(BlossomSettings())


@pytest.mark.parametrize(
    ("width", "heads", "kv_heads", "message"),
    [
        (16, 3, 1, "width 16 divided by heads 3 is not an even number"),
        (6, 2, 1, "width 6 divided by heads 2 is not an even number"),
        (16, 4, 3, "heads 4 is not divisible by kv_heads 3"),
    ],
)
def test_heads_must_fit(width: int, heads: int, kv_heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlossomAttention(BlossomSettings(kv_heads=kv_heads), width, heads)


@pytest.mark.parametrize("sizes", [{"block": 24}, {"compression": 8}])
def test_sizes_must_fit(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be a multiple of stride|must be at least stride"):
        BlossomSettings(**sizes)  # type: ignore[arg-type]
