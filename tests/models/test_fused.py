"""The fused attention layer against its parts, look-ups against torch's, histories turned round against a loop."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from longtrail.models.attention.fused import PairLayer, attend, attention_weights
from longtrail.models.attention.pointwise import pooled
from longtrail.models.lookup import look_up
from longtrail.models.masks import padding_mask
from longtrail.models.order import newest_first, turned_places
from tests.contracts.batches import draws, make_history

EXACT = {"rtol": 0.0, "atol": 1e-11}
KINDS = ("linear", "sigmoid", "softmax", "softmax_eps")


def inputs(shape: tuple[int, ...], seed: int) -> tuple[dict[str, Tensor], Tensor]:
    B, C, L, D, H = shape
    random = draws(seed)
    sizes = {"keys": (B, L, D), "weights": (B, C, H, D), "bias": (B, C, H), "last": (H,), "last_bias": ()}
    values = {name: torch.randn(size, generator=random, dtype=torch.float64).requires_grad_() for name, size in sizes.items()}
    lengths_B = torch.randint(0, L + 1, (B,), generator=random)
    lengths_B[0] = (0, L, 1)[seed % 3]
    return values, padding_mask(lengths_B, L)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 5, 4, 2), (3, 1, 7, 2, 3), (2, 4, 1, 3, 5)])
@pytest.mark.parametrize(("kind", "biased"), [*itertools.product(KINDS, (True, False))])
def test_fused_equals_its_parts(kind: Any, biased: bool, shape: tuple[int, ...]) -> None:
    """Values, and gradients of a random function of both outputs by every input, in float64."""
    for seed in range(3):
        values, mask_BL = inputs(shape, seed)
        layer = PairLayer(values["weights"], values["bias"], values["last"], values["last_bias"] if biased else None, kind, 0.7)
        wanted = [value for name, value in values.items() if biased or name != "last_bias"]
        a_BCL, u_BCD = attend(values["keys"], mask_BL, layer)
        slow_a = attention_weights(values["keys"], mask_BL, layer)
        slow_u = pooled(slow_a, values["keys"])
        torch.testing.assert_close(a_BCL, slow_a, **EXACT)
        torch.testing.assert_close(u_BCD, slow_u, **EXACT)
        assert not a_BCL.masked_select(~mask_BL.unsqueeze(1)).any()
        random = draws(seed + 9)
        v, w = (torch.randn(x.shape, generator=random, dtype=torch.float64) for x in (a_BCL, u_BCD))
        for ours, theirs in zip(
            torch.autograd.grad((a_BCL * v).sum() + (u_BCD * w).sum(), wanted),
            torch.autograd.grad((slow_a * v).sum() + (slow_u * w).sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("used", ["weights", "read"])
def test_fused_needs_only_one_of_its_outputs(used: str) -> None:
    values, mask_BL = inputs((2, 3, 5, 4, 2), 1)
    layer = PairLayer(values["weights"], values["bias"], values["last"], values["last_bias"], "sigmoid")
    outputs = attend(values["keys"], mask_BL, layer)
    slow = attention_weights(values["keys"], mask_BL, layer)
    fast, slow = (outputs[0], slow) if used == "weights" else (outputs[1], pooled(slow, values["keys"]))
    for ours, theirs in zip(*(torch.autograd.grad(x.square().sum(), list(values.values())) for x in (fast, slow)), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_look_up_is_torchs() -> None:
    """Values and gradients, of a slice of a concatenation too; row 0 gets none."""
    table = torch.randn(7, 3, dtype=torch.float64)
    for ids in (torch.randint(0, 7, (4, 5), generator=draws(0)), torch.tensor([0, 0]), torch.zeros(2, 0, dtype=torch.int64)):
        gradients = []
        for rows in (look_up, lambda table, ids: functional.embedding(ids, table, padding_idx=0)):
            leaf = table.clone().requires_grad_()
            out = rows(leaf, ids)
            assert torch.equal(out, table[ids])
            torch.cat([out, out * 2], dim=-1).square().sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)
        assert not gradients[0][0].any()


def test_histories_turn_round() -> None:
    history = make_history()
    turned = newest_first(history)
    for field in ("items_BL", "categories_BL", "actions_BL", "times_BL"):
        for row, other, n in zip(getattr(history, field).tolist(), getattr(turned, field).tolist(), history.lengths_B.tolist(), strict=True):
            assert other[:n] == row[:n][::-1]
    assert turned_places(torch.tensor([0, 2, 3]), 3).tolist() == [[0, 0, 0], [1, 0, 0], [2, 1, 0]]
    back = newest_first(turned)
    mask_BL = padding_mask(history.lengths_B, 9)
    assert torch.equal(back.items_BL * mask_BL, history.items_BL)
