"""What serving runs, compiled, against the layer and the models as they are."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from longtrail.config import DINSettings, SAMSettings
from longtrail.models.attention.compiled import GROUP, TILE, pair_scores
from longtrail.models.attention.fused import PairLayer, attention_weights, serving
from longtrail.models.contracts import Candidates, Context, History, Sizes
from longtrail.models.masks import padding_mask
from longtrail.models.rankers.din import DIN
from longtrail.models.rankers.sam import SAM

KINDS = ("linear", "sigmoid", "softmax", "softmax_eps")
EDGES = (0, 1, TILE - 1, TILE, TILE + 1, 2 * TILE + 5)
SIZES = Sizes(items=50, categories=4, actions=3)


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts calls of the compiled path."""
    calls: list[int] = []

    def counted(*values: Any, **named: Any) -> Any:
        calls.append(1)
        return pair_scores(*values, **named)

    monkeypatch.setattr("longtrail.models.attention.compiled.pair_scores", counted)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_layer(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random cases and edges: lengths 0, 1, about a tile, all; padding behind; 1 candidate; hidden units that fill no group; no bias; a scale."""
    calls, chance = spy(monkeypatch), random.Random(kind)
    for case in range(60):
        drawn, length = draws(case), EDGES[case % len(EDGES)]
        places = max(1, length + chance.choice((0, 0, 1, 70)))
        C, D, H = chance.choice((1, 2, 7)), chance.choice((1, 8, 32)), chance.choice((1, GROUP, GROUP + 1, 8))
        keys, weights = (torch.randn(*shape, generator=drawn) * chance.choice((0.1, 1.0, 9.0)) for shape in ((1, places, D), (1, C, H, D)))
        bias, last = torch.randn(1, C, H, generator=drawn), torch.randn(H, generator=drawn)
        last_bias = None if case % 3 == 0 else torch.randn((), generator=drawn)
        layer = PairLayer(weights, bias, last, last_bias, kind, chance.choice((1.0, 0.3)))
        mask_1L = padding_mask(torch.tensor([length]), places)
        with torch.inference_mode():
            slow = attention_weights(keys, mask_1L, layer)
            with serving():
                fast = attention_weights(keys, mask_1L, layer)
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
        assert not fast[:, :, length:].any()
    assert len(calls) == 60


def test_sigmoids_saturate_and_faults_show() -> None:
    """Far beyond what float32's exp holds, and what is not a number stays so."""
    x = np.array([-1e30, -200, -90, -15, -1e-7, 0, 3, 15, 90, 1e30, np.nan], np.float32)
    one, none = np.ones((1, 1, 1), np.float32), np.zeros((1, 1), np.float32)
    (found,) = pair_scores(x[:, None], len(x), one, none, np.ones(1, np.float32), 0.0, squashed=False)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-x.astype(np.float64))), rtol=0, atol=3e-7)
    steps = np.linspace(-30, 30, 4 * TILE + 3, dtype=np.float32)
    (found,) = pair_scores(steps[:, None], len(steps), one, none, np.ones(1, np.float32), 0.0, squashed=False)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-steps.astype(np.float64))), rtol=0, atol=3e-7)


def one_request(length: int, places: int, candidates: int) -> tuple[History, Candidates, Context]:
    drawn = draws(length)

    def ids(most: int, count: int) -> torch.Tensor:
        return torch.randint(1, most + 1, (1, count), generator=drawn)

    history = History(
        items_BL=ids(SIZES.items, places),
        categories_BL=ids(SIZES.categories, places),
        actions_BL=ids(SIZES.actions, places),
        times_BL=ids(10**15, places).sort().values,
        lengths_B=torch.tensor([length]),
    )
    shown = Candidates(
        items_BC=ids(SIZES.items, candidates),
        categories_BC=ids(SIZES.categories, candidates),
        statistics_BCF=torch.randn(1, candidates, 3, generator=drawn),
        lengths_B=torch.tensor([candidates]),
    )
    return history, shown, Context(statistics_BG=torch.randn(1, 3, generator=drawn), times_B=torch.tensor([10**15]))


@pytest.mark.parametrize(
    "settings",
    [
        SAMSettings(max_history=200),
        SAMSettings(max_history=200, attention_weights="scaled_sigmoid", feedback=False, enhancement=2),
        SAMSettings(max_history=200, attention_weights="softmax_eps", read_scale="norm", attention_hidden=3),
        DINSettings(max_history=200),
    ],
    ids=["sam", "sam scaled, enhanced", "sam softmax", "din"],
)
def test_models_score_the_same(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy(monkeypatch)
    torch.manual_seed(3)
    model = (SAM(settings, SIZES) if isinstance(settings, SAMSettings) else DIN(settings, SIZES)).eval()
    for length, places, candidates in ((0, 1, 3), (1, 1, 1), (1, 4, 2), (37, 200, 5), (200, 200, 40)):
        request = one_request(length, places, candidates)
        with torch.inference_mode():
            slow = model(*request)
            before = len(calls)
            with serving():
                fast = model(*request)
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
        assert len(calls) > before, "the compiled path was not taken"


def test_it_is_taken_for_one_served_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, batches and float64 go the way they always went."""
    calls = spy(monkeypatch)
    torch.manual_seed(0)
    model = SAM(SAMSettings(max_history=20), SIZES).eval()
    request = one_request(9, 9, 2)
    model(*request)
    with torch.inference_mode():
        model(*request)
    with serving(), torch.no_grad():
        model(*request)
    with serving():
        model(*request).sum().backward()
    with serving(), torch.inference_mode():
        model.double()(*request)
    assert not calls
