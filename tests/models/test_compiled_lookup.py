"""Look-ups as large batches make them, compiled, beside torch's own in float64."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from longtrail.config import MeanPoolingSettings
from longtrail.models import lookup
from longtrail.models.lookup import look_up, look_up_and_add, look_up_both
from longtrail.models.registry import build_model
from tests.contracts.batches import SIZES, draws, make_request

IDS = (torch.randint(0, 7, (4, 45), generator=draws(0)), torch.tensor([0, 0, 6]), torch.tensor([[3]]), torch.zeros(2, 0, dtype=torch.int64))


@pytest.fixture(autouse=True)
def all_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "COMPILED_ROWS", 0)


def close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 3, 16, 37])
def test_a_table_learns(width: int) -> None:
    """Of whole gradients and of columns of a wider one; ids come twice, row 0 learns nothing."""
    table = torch.randn(7, width, generator=draws(1))
    for ids in IDS:
        found = []
        for rows, leaf in ((look_up, table.clone()), (lambda t, i: functional.embedding(i, t, padding_idx=0), table.double())):
            leaf.requires_grad_()
            out = rows(leaf, ids)
            torch.cat([out, out * 2], dim=-1).pow(3).sum().backward()
            assert leaf.grad is not None
            found.append((out.detach(), leaf.grad))
        close(*found)
        assert not found[0][1][0].any()


@pytest.mark.parametrize(("part", "width"), [(1, 1), (2, 5), (16, 32), (33, 40)])
def test_two_tables_learn_at_once(part: int, width: int) -> None:
    first, second = torch.randn(7, part, generator=draws(2)), torch.randn(7, width, generator=draws(3))
    for ids in IDS:
        others, found = ids.flip(0), []
        for dtype in (torch.float32, torch.float64):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in (first, second)]
            if dtype == torch.float32:
                out = look_up_both(leaves[1], others, leaves[0], ids)
            else:
                out = look_up_and_add(leaves[1], others, functional.embedding(ids, leaves[0], padding_idx=0))
            out.pow(3).sum().backward()
            assert leaves[0].grad is not None and leaves[1].grad is not None
            found.append((out.detach(), leaves[0].grad, leaves[1].grad))
        close(*found)


def test_a_model_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With unknown ids, padding and few pairs of category and action."""
    model = build_model(MeanPoolingSettings(), SIZES).train()
    history, candidates, context = make_request()
    places = -(-200 // history.items_BL.shape[1])
    for name in ("items_BL", "categories_BL", "actions_BL", "times_BL"):
        object.__setattr__(history, name, getattr(history, name).repeat(1, places))
    history.items_BL[1, 0] = SIZES.items + 9
    found = []
    for least in (0, 1 << 60):
        monkeypatch.setattr(lookup, "COMPILED_ROWS", least)
        alone = deepcopy(model)  # a pass in training mode moves what the head's normalisation remembers
        alone(history, candidates, context).square().sum().backward()
        found.append([p.grad for p in alone.parameters()])
    for x, y in zip(*found, strict=True):
        assert x is not None and y is not None
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
