"""DIN against a slow twin with the concatenated features and loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longtrail.config import DINSettings, SAMSettings
from longtrail.models.masks import padding_mask
from longtrail.models.rankers.din import DIN, TargetAttention
from longtrail.models.rankers.sam import SAM
from tests.contracts.batches import SIZES, draws, make_candidates, make_context, make_history, make_request
from tests.contracts.largest import Largest
from tests.contracts.weights import with_drawn_weights
from tests.models.test_sam import CLOSE, SHAPES, random_inputs


def make_din(**changes: Any) -> DIN:
    torch.manual_seed(1)
    settings = {"width": 3, "hidden": (8, 4), "max_history": 12, "attention_hidden": (5, 4)} | changes
    return DIN(DINSettings(**settings), SIZES).double().eval()


def slow_weights(attention: TargetAttention, k: Tensor, q: Tensor) -> Tensor:
    """a [n] of one candidate over n real behaviours, n > 0."""
    scores = []
    for k_j in k:
        z = torch.cat([q, k_j, q - k_j, q * k_j])
        hidden = torch.sigmoid(z @ attention.first.flatten(0, 1) + attention.first_bias)
        for weight, bias in zip(attention.middle, attention.middle_bias, strict=True):
            hidden = torch.sigmoid(weight @ hidden + bias[:, 0])
        scores.append(attention.last @ hidden + (0.0 if attention.last_bias is None else attention.last_bias))
    l = torch.stack(scores)  # noqa: E741
    return {"linear": l, "sigmoid": torch.sigmoid(l), "softmax": torch.softmax(l / math.sqrt(len(q)), dim=0)}[attention.kind]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hidden", [(6,), (5, 4), (7, 3, 2)])
@pytest.mark.parametrize("kind", ["linear", "sigmoid", "softmax"])
def test_weights_equal_the_slow_twin(kind: str, hidden: tuple[int, ...], shape: tuple[int, int, int]) -> None:
    model = with_drawn_weights(make_din(attention_weights=kind, attention_hidden=hidden))
    for seed in range(2):
        keys_BLD, mask_BL, lengths_B, query_BCD = random_inputs(model, shape, seed)  # type: ignore[arg-type]
        with torch.no_grad():
            fast_BCL, read_BCD = model.attention(keys_BLD, mask_BL, query_BCD)
            slow_BCL = torch.zeros_like(fast_BCL)
            for b, n in enumerate(lengths_B.tolist()):
                for c in range(query_BCD.shape[1] if n else 0):
                    slow_BCL[b, c, :n] = slow_weights(model.attention, keys_BLD[b, :n], query_BCD[b, c])
        torch.testing.assert_close(fast_BCL, slow_BCL, **CLOSE)
        torch.testing.assert_close(read_BCD, slow_BCL @ keys_BLD, **CLOSE)


def test_one_pass_of_sam_is_this_attention() -> None:
    """SAM's z of the first pass, [q - k ; q * k ; m - k ; m * k] with m = q, is DIN's with nothing for q and k alone and the two pairs added up."""
    torch.manual_seed(2)
    sam = SAM(SAMSettings(width=3, attention_hidden=5, passes=1, hidden=(4,)), SIZES).double().eval()
    din = make_din(attention_weights="sigmoid", attention_hidden=(5,)).attention
    (one,) = sam.passes
    with torch.no_grad():
        din.first.zero_()
        din.first[2:] = one.first[:2] + one.first[2:]
        for own, other in ((din.first_bias, one.first_bias), (din.last, one.second), (din.last_bias, one.second_bias)):
            own.copy_(other.fill_(0.3) if other is not one.second else other)
        keys_BLD, mask_BL, _, query_BCD = random_inputs(sam, (3, 9, 4), seed=1)
        for found, expected in zip(din(keys_BLD, mask_BL, query_BCD), one(keys_BLD, mask_BL, query_BCD, query_BCD), strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_the_intensity_of_an_interest_survives() -> None:
    """By default, as in the papers, weights are not normalised: every behaviour twice is twice the read, of DIN and of SAM; not so with a softmax."""
    for kind, factor in ((DINSettings().attention_weights, 2.0), ("sigmoid", 2.0), ("softmax", 1.0)):
        model = make_din(attention_weights=kind)
        keys_BLD, mask_BL, _, query_BCD = random_inputs(model, (1, 9, 3), seed=1)  # type: ignore[arg-type]
        (_, once), (_, twice) = (model.attention(keys_BLD.repeat(1, n, 1), mask_BL.repeat(1, n), query_BCD) for n in (1, 2))
        torch.testing.assert_close(twice, factor * once, **CLOSE)
    for kind, factor in ((SAMSettings().attention_weights, 2.0), ("softmax", 1.0)):
        (one,) = SAM(SAMSettings(width=3, passes=1, attention_weights=kind), SIZES).double().passes
        (_, once), (_, twice) = (one(keys_BLD.repeat(1, n, 1), mask_BL.repeat(1, n), query_BCD, query_BCD) for n in (1, 2))
        torch.testing.assert_close(twice, factor * once, **CLOSE)


@pytest.mark.parametrize("kind", ["linear", "sigmoid", "softmax"])
def test_an_empty_history_has_no_weight(kind: str) -> None:
    model = make_din(attention_weights=kind)
    lengths_B = torch.tensor([0, 2])
    keys_BLD = torch.randn(2, 4, 6, dtype=torch.float64, generator=draws(0))
    with torch.no_grad():
        weights_BCL, _ = model.attention(keys_BLD, padding_mask(lengths_B, 4), keys_BLD[:, :3])
    assert not weights_BCL[0].any()
    assert not weights_BCL[1, :, 2:].any()
    assert weights_BCL[1, :, :2].all()


def test_blocks_of_candidates_equal_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, request = make_din(), make_request()
    with torch.no_grad():
        whole = model(*request)
        monkeypatch.setattr("longtrail.models.attention.pointwise.CHUNK_BYTES", 1)
        torch.testing.assert_close(model(*request), whole, **CLOSE)


@pytest.mark.parametrize("length", [64, 256])
def test_nothing_larger_than_the_hidden_layer_is_made(length: int) -> None:
    """Forward and backward: [B, C, L, D], let alone [B, C, L, 4D], is never built (H = 5 < D = 32)."""
    model = DIN(DINSettings(width=16, attention_hidden=(5,), max_history=length, hidden=(8,)), SIZES)
    with Largest() as largest:
        model(make_history(0, (length, length - 3)), make_candidates(0, (30, 7)), make_context(0, 2)).sum().backward()
    assert largest.elements == 2 * 30 * (5 + 1) * length  # backward: the hidden layer and the weights, side by side


def test_weights_are_shown() -> None:
    model, (history, candidates, context) = make_din(attention_weights="softmax"), make_request()
    (a_BCL,) = model.attention_weights(history, candidates, context)
    assert a_BCL.shape == (5, 6, 9)
    torch.testing.assert_close(a_BCL.sum(-1), (history.lengths_B > 0).double().unsqueeze(1).expand(-1, 6))
