"""Linear attention against the explicit one, pair by pair, and its start at clusters."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longtrail.models.attention import linear_sums
from longtrail.models.attention.alike import cluster_centres
from longtrail.models.attention.feature_maps import FEATURE_MAPS
from longtrail.models.attention.linear import LinearAttention
from longtrail.models.attention.user_state import DAY
from longtrail.models.masks import padding_mask
from tests.contracts.batches import draws

EXACT = {"rtol": 0.0, "atol": 1e-12}
LENGTHS = (0, 1, 5, 12, 7)


def make_attention(feature_map: str, half_life_days: float | None = None, **changes: Any) -> LinearAttention:
    torch.manual_seed(2)
    sizes = {"heads": 2, "features": 3, "layers": 2} | changes
    attention = LinearAttention(8, feature_map=feature_map, half_life_days=half_life_days, **sizes)
    with torch.no_grad():
        for parameter in (attention.key_bias, attention.query_bias, attention.log_priors):
            if parameter is not None:
                parameter.normal_()
    return attention.double()


def random_inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys (zeros on padding), mask, times over some days, queries."""
    random, lengths_B = draws(seed), torch.tensor(LENGTHS)
    mask_BL = padding_mask(lengths_B, max(LENGTHS))
    keys_BLD = torch.randn(*mask_BL.shape, 8, generator=random, dtype=torch.float64) * mask_BL.unsqueeze(-1)
    times_BL = torch.randint(1, 9 * DAY, mask_BL.shape, generator=random) * mask_BL
    return keys_BLD, mask_BL, times_BL, torch.randn(len(LENGTHS), 4, 8, generator=random, dtype=torch.float64)


def slow_read(attention: LinearAttention, inputs: tuple[Tensor, Tensor, Tensor, Tensor], layer: int) -> Tensor:
    """Pair by pair, head by head: Σ_l w(c, l) v_l with the weights written out."""
    H, F, outputs = attention.heads, attention.shape["features"], []
    for keys, mask, times, queries in zip(*inputs, strict=True):
        k, t = keys[mask], times[mask]
        rows = []
        for q in queries:
            parts = []
            for h in range(H):
                g = layer * H + h
                own, part = slice(h * F, (h + 1) * F), slice(g * F, (g + 1) * F)
                inner_q, inner_k = q @ attention.queries[layer][:, own], k @ attention.keys[:, part]
                if attention.map.clusters:
                    inner_q = inner_q / (q @ q + 1e-6).sqrt() + attention.query_bias.view(len(attention.queries), -1)[layer, own]  # type: ignore[union-attr]
                    inner_k = inner_k / (k.square().sum(1, keepdim=True) + 1e-6).sqrt() + attention.key_bias[part]  # type: ignore[index]
                phi_q = attention.map.queries(inner_q * attention.temperature[g])
                phi_k = attention.map.keys(inner_k * attention.temperature[g])
                if attention.log_rates is not None and len(t):
                    phi_k = phi_k * torch.exp(-attention.log_rates[g].exp() * (t.max() - t).double() / DAY).unsqueeze(-1)
                if attention.map.divide == "feature":
                    phi_k = phi_k / phi_k.sum(0)
                w = phi_k @ phi_q
                if attention.map.divide == "sum":
                    w = w / w.sum()
                elif attention.map.divide == "prior":
                    w = w / (w.sum() + attention.log_priors[g].exp())  # type: ignore[index]
                elif attention.map.divide == "none":
                    w = w / F**0.5
                parts.append(w @ (k @ attention.values[g]))
            rows.append(torch.cat(parts))
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


@pytest.mark.parametrize("half_life_days", [None, 2.0])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_linear_equals_explicit(feature_map: str, half_life_days: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All users at once, and in blocks of two; with the read of an empty history exactly zero."""
    attention, inputs = make_attention(feature_map, half_life_days), random_inputs()
    for block in (1 << 14, 2 * max(LENGTHS)):
        monkeypatch.setattr(linear_sums, "BLOCK", block)
        for layer in (0, 1):
            with torch.no_grad():
                read = attention.read(inputs[3], attention.state(*inputs[:3]), layer)
                torch.testing.assert_close(read, slow_read(attention, inputs, layer), rtol=0, atol=1e-10)
            assert not read[0].any()


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_what_rounding_left_of_nobody_is_not_read(feature_map: str) -> None:
    """Whoever has no events reads zeros because they have none, whatever their sums say."""
    attention, inputs = make_attention(feature_map), random_inputs()
    with torch.no_grad():
        state = attention.state(*inputs[:3])
        emptied = replace(state, events_B=state.events_B * (torch.arange(len(LENGTHS)) != 3))
        assert attention.read(inputs[3], state, 1)[3].all()
        assert not attention.read(inputs[3], emptied, 1)[3].any()


@pytest.mark.parametrize("half_life_days", [None, 2.0])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_linear_equals_explicit_in_float32(feature_map: str, half_life_days: float | None) -> None:
    attention, inputs = make_attention(feature_map, half_life_days), random_inputs()
    with torch.no_grad():
        exact = slow_read(attention, inputs, 0)
        attention, inputs = attention.float(), tuple(x.float() if x.is_floating_point() else x for x in inputs)  # type: ignore[assignment]
        torch.testing.assert_close(attention.read(inputs[3], attention.state(*inputs[:3]), 0).double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("feature_map", "half_life_days"),
    [("elu1", None), ("squared_relu", 2.0), ("shares", 2.0), ("shares", None), ("linrec", None), ("clusters", None), ("clusters", 2.0)],
)
def test_gradients_are_those_of_the_explicit_read(feature_map: str, half_life_days: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the keys, the queries and every parameter; blocks of two users."""
    monkeypatch.setattr(linear_sums, "BLOCK", 2 * max(LENGTHS))
    attention, inputs = make_attention(feature_map, half_life_days), random_inputs()
    asked = [inputs[0].requires_grad_(), inputs[3].requires_grad_(), *attention.parameters()]
    inputs = (inputs[0] * inputs[1].unsqueeze(-1), *inputs[1:])  # padded keys are constants
    weights = torch.randn(len(LENGTHS), 4, 8, generator=draws(5), dtype=torch.float64)
    state = attention.state(*inputs[:3])
    fast = torch.autograd.grad(sum((attention.read(inputs[3], state, i) * weights).sum() for i in (0, 1)), asked, retain_graph=True)
    slow = torch.autograd.grad(sum((slow_read(attention, inputs, i) * weights).sum() for i in (0, 1)), asked)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("feature_map", ["elu1", "shares", "clusters"])
def test_gradients_do_not_depend_on_how_the_keys_lie_in_memory(feature_map: str) -> None:
    attention, (keys_BLD, mask_BL, times_BL, queries_BCD) = make_attention(feature_map), random_inputs()
    found = []
    for laid in (keys_BLD, keys_BLD.transpose(1, 2).contiguous().transpose(1, 2), keys_BLD.repeat_interleave(2, dim=2)[..., ::2]):
        torch.testing.assert_close(laid, keys_BLD)
        laid = laid.detach().requires_grad_()
        read = attention.read(queries_BCD, attention.state(laid, mask_BL, times_BL), 0)
        found.append(torch.autograd.grad(read.square().sum(), [laid, attention.keys]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("feature_map", ["elu1", "shares", "clusters"])
def test_a_backward_within_autocast_is_that_outside_it_but_for_rounding(feature_map: str) -> None:
    attention, (keys_BLD, mask_BL, times_BL, queries_BCD) = make_attention(feature_map).float(), random_inputs()
    found = []
    for enabled in (False, True):
        keys = keys_BLD.float().requires_grad_()
        state = attention.state(keys, mask_BL, times_BL)
        loss = attention.read(queries_BCD.float(), state, 0).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(loss, [keys, attention.keys]))
    for rounded, exact in zip(found[1], found[0], strict=True):  # of the read's own products, which torch takes in half precision then
        assert (rounded - exact).norm() < 0.1 * exact.norm()


def test_equal_keys_read_the_mean() -> None:
    attention, (keys_BLD, mask_BL, times_BL, query_BCD) = make_attention("elu1"), random_inputs()
    with torch.no_grad():
        attention.keys.zero_()
        means_BGE = torch.einsum("bld,gde->bge", keys_BLD, attention.values) / mask_BL.sum(1).clamp(min=1).view(-1, 1, 1)
        read_BCD = attention.read(query_BCD, attention.state(keys_BLD, mask_BL, times_BL), 0)
    torch.testing.assert_close(read_BCD, means_BGE[:, :2].flatten(1).unsqueeze(1).expand_as(read_BCD), **EXACT)


@pytest.mark.parametrize("feature_map", [name for name, map_ in FEATURE_MAPS.items() if map_.divide == "sum"])
def test_whoever_has_forgotten_nearly_all_still_reads_a_whole_mean(feature_map: str) -> None:
    """The newest of ten thousand events, and it is hardly like the candidate: the read is what the weights say, and they add up to 1."""
    n, attention = 10_000, make_attention(feature_map, 0.05, heads=1, features=8, layers=1)
    query_11D, noise_1nD = (torch.randn(1, places, 8, generator=draws(places), dtype=torch.float64) for places in (1, n))
    along_D1 = torch.nn.functional.normalize(query_11D[0, 0], dim=0).unsqueeze(1)
    keys_1nD, query_11D = 0.1 * noise_1nD + 3 * along_D1.T, 3 * along_D1.T.unsqueeze(0)
    with torch.no_grad():
        attention.keys.copy_(-3 * along_D1 * (torch.arange(8) != 0))  # features of events: nearly none but the first
        attention.queries[0] = -3 * along_D1 * (torch.arange(8) != 1)  # of the candidate: but the second
        mask_1n, times_1n = torch.ones(1, n, dtype=torch.bool), (torch.arange(n) * DAY).unsqueeze(0)
        state, weights_11n = attention.state(keys_1nD, mask_1n, times_1n), attention.weights(query_11D, keys_1nD, mask_1n, times_1n)
        assert weights_11n[0, 0, -1] > 0.999
        torch.testing.assert_close(weights_11n.sum(), torch.ones((), dtype=torch.float64))
        torch.testing.assert_close(attention.read(query_11D, state, 0), weights_11n @ keys_1nD @ attention.values[0], rtol=0, atol=1e-9)


def groups(members: int = 30, noise: float = 0.05, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors [n, 8] about six directions that are of any length, and which of them each is about."""
    random = draws(seed)
    directions_68 = torch.linalg.qr(torch.randn(8, 8, generator=draws(99), dtype=torch.float64))[0][:6]
    of_n = torch.arange(6).repeat(members)
    lengths_n1 = torch.rand(len(of_n), 1, generator=random, dtype=torch.float64) * 3 + 0.2
    return (directions_68[of_n] + noise * torch.randn(len(of_n), 8, generator=random, dtype=torch.float64)) * lengths_n1, of_n


def started(feature_map: str = "clusters", **changes: Any) -> LinearAttention:
    torch.manual_seed(3)
    attention = LinearAttention(8, feature_map=feature_map, **({"heads": 2, "features": 8, "layers": 2, "temperature": 6.0} | changes)).double()
    if attention.map.clusters:
        attention.start_clusters(groups()[0])
    attention.start_values()
    return attention


def weights_of(attention: LinearAttention, layer: int) -> tuple[Tensor, Tensor]:
    """Weights [6, n] of new vectors for one candidate of each direction, and which vectors are about the candidate's."""
    (keys_nD, of_n), (candidates_nD, _) = groups(seed=1), groups(members=1, seed=2)
    mask_1n = torch.ones(1, len(of_n), dtype=torch.bool)
    with torch.no_grad():
        weights_16n = attention.weights(candidates_nD.unsqueeze(0), keys_nD.unsqueeze(0), mask_1n, mask_1n.long(), layer)
    return weights_16n[0], of_n == torch.arange(6).unsqueeze(1)


@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_like_the_candidate_weighs_more_at_the_start(layer: int) -> None:
    """Whatever the lengths of the vectors. With random features, most of the weight is with what is unlike it."""
    weights_6n, alike_6n = weights_of(started(), layer)
    assert weights_6n[alike_6n].min() > 5 * weights_6n[~alike_6n].max()
    weights_6n, alike_6n = weights_of(started("elu1"), layer)
    assert weights_6n[alike_6n].sum() < 0.5 * weights_6n.sum()


def test_clusters_start_at_half_the_squared_distance_over_the_variance() -> None:
    """φ(x) = softmax_f(t (x · c_f / |x| - |c_f|² / 2) / v): with centres that differ in length."""
    sizes: dict[str, Any] = {"heads": 2, "features": 5, "layers": 2, "temperature": 3.0}
    x_nD, asked_mD = groups(noise=0.4)[0], groups(members=1, noise=0.4, seed=2)[0]
    attention = LinearAttention(8, feature_map="clusters", **sizes).double()
    attention.start_clusters(x_nD)
    unit_nD, unit_mD = (x / (x.square().sum(1, keepdim=True) + 1e-6).sqrt() for x in (x_nD, asked_mD))
    variance = (unit_nD - unit_nD.mean(0)).square().sum(1).mean()
    mask_1n = torch.ones(1, len(x_nD), dtype=torch.bool)
    for layer in (0, 1):
        expected = []
        for head in (0, 1):
            centres_FD = cluster_centres(unit_nD, 5, seed=2 * layer + head)  # each head of each layer has its own
            assert centres_FD.square().sum(1).std() > 0.02
            of_n, of_m = (
                torch.softmax(3.0 * (unit @ centres_FD.T - centres_FD.square().sum(1) / 2) / variance, dim=1) for unit in (unit_nD, unit_mD)
            )
            weights_mn = of_m @ of_n.T
            expected.append(weights_mn / (weights_mn.sum(1, keepdim=True) + 1))
        with torch.no_grad():
            found_1mn = attention.weights(asked_mD.unsqueeze(0), x_nD.unsqueeze(0), mask_1n, mask_1n.long(), layer)
        torch.testing.assert_close(found_1mn[0], sum(expected) / 2, rtol=0, atol=1e-9)  # type: ignore[arg-type]


def test_few_alike_events_say_little() -> None:
    """m events of the candidate's cluster read m / (m + p) of their mean; none at all read nearly nothing, and each map's `sum` a whole mean."""
    attention, (x_nD, of_n) = started(heads=1, features=8, layers=1, temperature=40.0, prior_events=2.0), groups(noise=0.0)
    candidate_11D, own_mD, other_mD = x_nD[of_n == 2][:1].unsqueeze(0), x_nD[of_n == 2], x_nD[of_n == 4]
    for events_mD, m in ((own_mD[:1], 1), (own_mD[:6], 6), (own_mD, 30), (other_mD, 0)):
        with torch.no_grad():
            state = attention.state(events_mD.unsqueeze(0), torch.ones(1, len(events_mD), dtype=torch.bool))
            read_D = attention.read(candidate_11D, state, 0)[0, 0]
        torch.testing.assert_close(read_D, m / (m + 2.0) * events_mD.mean(0), rtol=0, atol=1e-4)


def test_values_start_as_the_vectors_themselves() -> None:
    attention, (keys_BLD, mask_BL, times_BL, query_BCD) = started("elu1"), random_inputs()
    with torch.no_grad():
        attention.keys.zero_()
        means_BD = keys_BLD.sum(1) / mask_BL.sum(1, keepdim=True).clamp(min=1)
        for layer in (0, 1):
            read_BCD = attention.read(query_BCD, attention.state(keys_BLD, mask_BL, times_BL), layer)
            torch.testing.assert_close(read_BCD, means_BD.unsqueeze(1).expand_as(read_BCD), **EXACT)


def test_centres_are_the_groups_means() -> None:
    x_nD, of_n = groups(noise=0.01)
    x_nD = torch.nn.functional.normalize(x_nD, dim=1)
    means = torch.stack([x_nD[of_n == k].mean(0) for k in range(6)])
    found = cluster_centres(x_nD, 6, seed=0)
    nearest = torch.cdist(means, found).argmin(1)
    assert sorted(nearest.tolist()) == list(range(6))
    torch.testing.assert_close(found[nearest], means, **EXACT)
    assert torch.equal(found, cluster_centres(x_nD, 6, seed=0)) and not torch.equal(found, cluster_centres(x_nD, 6, seed=1))


@pytest.mark.parametrize("make", [lambda: groups()[0][:3], lambda: torch.ones(7, 8).double(), lambda: torch.zeros(5, 8).double()])
def test_fewer_vectors_than_clusters_are_enough(make: Callable[[], Tensor]) -> None:
    attention = started(features=16)
    attention.start_clusters(make())
    assert all(torch.isfinite(parameter).all() for parameter in attention.parameters())
    weights_6n, _ = weights_of(attention, 0)
    assert torch.isfinite(weights_6n).all() and (weights_6n.sum(1) < 1).all()
