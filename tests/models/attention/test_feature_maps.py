"""The feature maps by hand: what each makes of a few numbers, its gradient, and what a read is divided by. No number here is made by the maps.

One head whose matrices are 1 in the diagonal, so that a map is given temperature * x, and reads are sums that fit on a page.
"""

import math

import pytest
import torch
from torch import Tensor

from longtrail.models.attention.feature_maps import FEATURE_MAPS
from longtrail.models.attention.linear import LinearAttention

E = math.e
GIVEN = (-1.0, 0.0, 2.0)
ELU = 1 / E - 1  # of -1
SHARES = tuple(math.exp(x) / (1 / E + 1 + E**2) for x in GIVEN)

# φ(-1, 0, 2) of keys and of queries, and the divisor's kind
FORMULAS = {
    "elu1": ((1 / E, 1.0, 3.0), (1 / E, 1.0, 3.0), "sum"),  # e^x up to 0, x + 1 from there
    "relu": ((0.01, 0.01, 2.01), (0.01, 0.01, 2.01), "sum"),
    "squared_relu": ((0.01, 0.01, 4.01), (0.01, 0.01, 4.01), "sum"),
    "shares": (SHARES, SHARES, "sum"),
    "clusters": (SHARES, SHARES, "prior"),
    "efficient": ((1 / E, 1.0, E**2), SHARES, "feature"),
    "linrec": ((ELU / math.sqrt(ELU**2 + 4), 0.0, 2 / math.sqrt(ELU**2 + 4)),) * 2 + ("none",),
}


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_every_map_is_written_down_here() -> None:
    assert set(FORMULAS) == set(FEATURE_MAPS) == set(READS)
    assert [name for name, of in FEATURE_MAPS.items() if of.clusters] == ["clusters"]


@pytest.mark.parametrize("graph", [False, True], ids=["values", "graph"])
@pytest.mark.parametrize("name", FORMULAS)
def test_features_of_three_numbers(name: str, graph: bool) -> None:
    """Of one vector, and of two that know nothing of each other; with a graph, where elu1 goes another way."""
    keys, queries, divide = FORMULAS[name]
    for map_, expected in ((FEATURE_MAPS[name].keys, keys), (FEATURE_MAPS[name].queries, queries)):
        x = numbers(*GIVEN).requires_grad_(graph)
        torch.testing.assert_close(map_(x), numbers(*expected), rtol=0, atol=1e-12)
        both = torch.stack([x, numbers(5.0, 5.0, 5.0)])
        torch.testing.assert_close(map_(both)[0], numbers(*expected), rtol=0, atol=1e-12)
        assert x.tolist() == list(GIVEN)  # left as it was
    assert FEATURE_MAPS[name].divide == divide


def test_large_numbers() -> None:
    """exp stops at e^30, which float32 holds in sums of any length; softmax does not overflow; small values of elu1 are not 1 + -1, rounded."""
    powers = FEATURE_MAPS["efficient"].keys(numbers(29.0, 30.0, 31.0, 1e4))
    torch.testing.assert_close(powers, numbers(E**29, E**30, E**30, E**30), rtol=1e-12, atol=0)
    for name in ("shares", "clusters"):
        assert FEATURE_MAPS[name].keys(numbers(1e4, 0.0)).tolist() == [1.0, 0.0]
    tiny = FEATURE_MAPS["elu1"].keys(torch.tensor([-20.0]))
    assert tiny.item() == pytest.approx(2.061153622e-9, rel=1e-6)


# d/dx of φ(x) . (1, 10, 100), by hand: of elu1 e^x or 1; of softmax p (g - Σ p g).
MEAN = SHARES[0] + 10 * SHARES[1] + 100 * SHARES[2]
SLOPES = {
    "elu1": (1 / E, 10.0, 100.0),
    "shares": (SHARES[0] * (1 - MEAN), SHARES[1] * (10 - MEAN), SHARES[2] * (100 - MEAN)),
}
SLOPES["clusters"] = SLOPES["shares"]


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_slopes(name: str) -> None:
    of, expected = FEATURE_MAPS[name], SLOPES.get(name)
    assert (of.slopes is None) == (expected is None)
    if of.slopes is not None and expected is not None:
        features, gradient = numbers(*FORMULAS[name][0]), numbers(1, 10, 100)
        torch.testing.assert_close(of.slopes(features, gradient), numbers(*expected), rtol=0, atol=1e-12)
        assert features.tolist() == list(FORMULAS[name][0])


# Two events k = (1, 0) and (0, 2) whose values are themselves, one candidate q = (3, 0), temperature 2: φ is given (2, 0), (0, 4) and (6, 0).
# Each weight is φ(q) . φ(k) over what its kind of divisor says; the read is w_1 (1, 0) + w_2 (0, 2).


def of_sum(one: float, two: float) -> tuple[float, float]:
    return one / (one + two), two / (one + two)


def softmax(*values: float) -> tuple[float, ...]:
    total = sum(math.exp(value) for value in values)
    return tuple(math.exp(value) / total for value in values)


def products(q: tuple[float, ...], one: tuple[float, ...], two: tuple[float, ...]) -> tuple[float, float]:
    return q[0] * one[0] + q[1] * one[1], q[0] * two[0] + q[1] * two[1]


def over_prior(one: float, two: float, prior: float) -> tuple[float, float]:
    return one / (one + two + prior), two / (one + two + prior)


PRIOR = 3.0
# x . c / |x| + b, c the axes: (1, 0) → (1, 0) + b_k, (0, 2) → (0, 1) + b_k, (3, 0) → (1, 0) + b_q, all times 2. |x| is sqrt(|x|² + 1e-6).
KEY_BIAS, QUERY_BIAS = (0.5, -0.25), (0.0, 1.0)
ONE, TWO, ASKED = 1 / math.sqrt(1 + 1e-6), 2 / math.sqrt(4 + 1e-6), 3 / math.sqrt(9 + 1e-6)
CLUSTERS = products(softmax(2 * ASKED, 2.0), softmax(2 * (ONE + 0.5), -0.5), softmax(1.0, 2 * (TWO - 0.25)))
EFFICIENT = products(softmax(6, 0), (E**2 / (E**2 + 1), 1 / (1 + E**4)), (1 / (E**2 + 1), E**4 / (1 + E**4)))

READS = {
    "elu1": of_sum(7 * 3 + 1 * 1, 7 * 1 + 1 * 5),
    "relu": of_sum(6.01 * 2.01 + 0.01 * 0.01, 6.01 * 0.01 + 0.01 * 4.01),
    "squared_relu": of_sum(36.01 * 4.01 + 0.01 * 0.01, 36.01 * 0.01 + 0.01 * 16.01),
    "shares": of_sum(*products(softmax(6, 0), softmax(2, 0), softmax(0, 4))),
    "clusters": over_prior(*CLUSTERS, PRIOR),
    "efficient": EFFICIENT,  # each feature of the keys adds up to 1 over the events
    "linrec": (1 / math.sqrt(2), 0.0),  # unit vectors (1, 0), (0, 1) and (1, 0), over sqrt(F)
}


def make_attention(name: str) -> LinearAttention:
    attention = LinearAttention(2, heads=1, features=2, feature_map=name, temperature=2.0, prior_events=PRIOR).double()
    with torch.no_grad():
        attention.keys.copy_(torch.eye(2))
        attention.queries.copy_(torch.eye(2).unsqueeze(0))
        attention.values.copy_(torch.eye(2).unsqueeze(0))
        if FEATURE_MAPS[name].clusters:
            assert attention.key_bias is not None and attention.query_bias is not None and attention.log_priors is not None
            attention.key_bias.copy_(numbers(*KEY_BIAS))
            attention.query_bias.copy_(numbers(*QUERY_BIAS))
            attention.log_priors.fill_(math.log(PRIOR))  # the constructor's is in float32
    return attention


@torch.no_grad()
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_a_read_of_two_events(name: str) -> None:
    """And the weights that explain it; a third place is padding."""
    attention, (one, two) = make_attention(name), READS[name]
    keys_BLD = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]], dtype=torch.float64)
    mask_BL = torch.tensor([[True, True, False]])
    query_BCD = torch.tensor([[[3.0, 0.0]]], dtype=torch.float64)
    read_BCD = attention.read(query_BCD, attention.state(keys_BLD, mask_BL), 0)
    torch.testing.assert_close(read_BCD[0, 0], numbers(one, 2 * two), rtol=0, atol=1e-12)
    weights_BCL = attention.weights(query_BCD, keys_BLD, mask_BL, torch.zeros(1, 3, dtype=torch.int64))
    torch.testing.assert_close(weights_BCL[0, 0], numbers(one, two, 0), rtol=0, atol=1e-12)


def test_the_reads_differ() -> None:
    """Of such numbers that one map cannot stand for another."""
    assert len({(round(one, 6), round(two, 6)) for one, two in READS.values()}) == len(READS)
