"""Few candidates read events directly, by compiled code: numbers and gradients as by a state, which test_linear.py holds to the equations."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from longtrail.config import IFASettings
from longtrail.models.attention import linear
from longtrail.models.attention.linear import LinearAttention
from longtrail.models.attention.user_state import UserState
from longtrail.models.attention.vector_code import TILE
from longtrail.models.contracts import History
from longtrail.models.masks import padding_mask
from longtrail.models.rankers.ifa import IFA
from tests.contracts.batches import SIZES, draws, make_candidates, make_context, make_history

D, C, L = 32, 3, 2 * TILE + 9
EVENTS = linear.COMPILED_EVENTS // 8  # a history, of eight
LENGTHS = (0, 1, TILE - 1, TILE, TILE + 1, 2 * TILE, L, 0, 5, 6, 7)  # more requests than one part of the weights' gradients takes
CASES: list[dict[str, Any]] = [
    {"feature_map": "clusters", "heads": 1, "features": 32, "layers": 1},
    {"feature_map": "clusters", "heads": 2, "features": 6, "layers": 2},
    {"feature_map": "shares", "heads": 2, "features": 8, "layers": 2},
    {"feature_map": "elu1", "heads": 4, "features": 4, "layers": 1},
]


def make_attention(**changes: Any) -> LinearAttention:
    torch.manual_seed(2)
    attention = LinearAttention(D, **changes)
    with torch.no_grad():
        for parameter in (attention.key_bias, attention.query_bias, attention.log_priors):
            if parameter is not None:
                parameter.normal_()
    return attention


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, zeros on padding, their mask, queries, and the gradient by what they read."""
    random, mask_BL = draws(3), padding_mask(torch.tensor(LENGTHS), L)
    keys_BLD = torch.randn(len(LENGTHS), L, D, generator=random) * mask_BL.unsqueeze(-1)
    return keys_BLD, mask_BL, *torch.randn(2, len(LENGTHS), C, D, generator=random)


def reads_and_gradients(attention: LinearAttention, dtype: torch.dtype, *, directly: bool) -> list[Tensor]:
    """Every layer's read, then gradients of keys, queries and all parameters, as float64."""
    keys_BLD, mask_BL, query_BCD, given_BCD = (x.to(dtype) if x.is_floating_point() else x for x in inputs())
    asked = [keys_BLD.requires_grad_(), query_BCD.requires_grad_(), *attention.parameters()]
    real_BLD = keys_BLD * mask_BL.unsqueeze(-1)  # padded keys are constants
    layers = range(len(attention.queries))
    if directly:
        reads = [attention.read_events(query_BCD, real_BLD, mask_BL, i) for i in layers]
    else:
        state = attention.state(real_BLD, mask_BL)
        reads = [attention.read(query_BCD, state, i) for i in layers]
    total = sum((read * (i + 1) * given_BCD).sum() for i, read in enumerate(reads))
    assert isinstance(total, Tensor)
    return [x.double() for x in (*reads, *torch.autograd.grad(total, asked))]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_direct_reads_are_those_of_a_state(changes: dict[str, Any]) -> None:
    """Against float64: lengths of no, one, part of, exactly and more than a tile."""
    attention = make_attention(**changes)
    exact = reads_and_gradients(deepcopy(attention).double(), torch.float64, directly=False)
    for found, expected in zip(reads_and_gradients(attention, torch.float32, directly=True), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.detach().abs().max().item())
    assert not exact[0][0].any()


def test_threads_change_no_bit() -> None:
    attention, threads = make_attention(**CASES[1]), torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(reads_and_gradients(attention, torch.float32, directly=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_stands_on_padding_is_not_read() -> None:
    attention, (keys_BLD, mask_BL, query_BCD, _) = make_attention(**CASES[0]), inputs()
    with torch.no_grad():
        clean = attention.read_events(query_BCD, keys_BLD, mask_BL, 0)
        dirty = attention.read_events(query_BCD, keys_BLD.masked_fill(~mask_BL.unsqueeze(-1), torch.nan), mask_BL, 0)
    assert torch.equal(clean, dirty) and not clean[0].any()


@pytest.mark.parametrize(
    ("changes", "candidates", "events", "directly"),
    [
        ({}, 1, EVENTS, True),
        ({}, 42, EVENTS, True),
        ({}, 43, EVENTS, False),
        ({}, 1, EVENTS - 1, False),
        ({"feature_map": "linrec"}, 1, EVENTS, False),
        ({"half_life_days": 3.0}, 1, EVENTS, False),
        ({"features": 30}, 1, EVENTS, False),
    ],
)
def test_when_events_are_read_directly(changes: dict[str, Any], candidates: int, events: int, directly: bool) -> None:
    settings: dict[str, Any] = {"feature_map": "clusters", "heads": 1, "features": 32} | changes
    attention = LinearAttention(64, **settings)
    query_BCD = torch.zeros(8, candidates, 64)
    assert attention.reads_directly(query_BCD, events) == directly
    assert not attention.reads_directly(query_BCD[:1], 8 * events)
    assert not attention.reads_directly(query_BCD.double(), events)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not attention.reads_directly(query_BCD, events)


def test_a_ranker_learns_the_same_without_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and the gradients of all weights, two layers, lengths 0 to 40."""
    torch.manual_seed(1)
    model = IFA(IFASettings(width=16, heads=2, features=8, layers=2, exact_heads=2, hidden=(8, 4), max_history=40, relation="none"), SIZES).eval()
    request = make_history(0, (0, 1, 40, 12)), make_candidates(0, (1, 3, 2, 3)), make_context(0, 4)
    made, make, found = [], model.state, []

    def remembered(history: History) -> UserState:
        made.append(make(history))
        return made[-1]

    monkeypatch.setattr(model, "state", remembered)
    for events in (1 << 15, 1):
        monkeypatch.setattr(linear, "COMPILED_EVENTS", events)
        logits_BC = model(*request)
        assert len(made) == 1  # by the first call alone
        found.append([logits_BC, *torch.autograd.grad(logits_BC.square().sum(), list(model.parameters()), allow_unused=True)])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1e-3, one.detach().abs().max().item()))
