"""RecJPQ's layer against the obvious: a table made item by item, sub-scores added up split by split."""

import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from longtrail.config import DenseItemsSettings, DINSettings, RecJPQItemsSettings, SASRecSettings
from longtrail.models.contracts import ItemEmbedding, Sizes
from longtrail.models.encoders.sasrec import SASRec
from longtrail.models.items.dense import DenseItems
from longtrail.models.items.factory import item_slots, make_items
from longtrail.models.items.recjpq import RecJPQItems
from longtrail.models.registry import build_model
from longtrail.models.store import ModelCard, save_model
from tests.contracts.batches import SIZES, make_history

SHAPES = [(50, 12, 1, 7), (50, 12, 3, 7), (50, 12, 12, 256), (1, 8, 8, 2), (300, 8, 2, 1), (9, 4, 4, 256)]


def layer(
    items: int = 50, width: int = 12, splits: int = 3, codes: int = 7, *, composition: Literal["concat", "sum"] = "concat", std: float = 1.0
) -> RecJPQItems:
    torch.manual_seed(0)
    return RecJPQItems(items, width, splits=splits, codes=codes, composition=composition, std=std)


def slow_vectors(items: RecJPQItems) -> torch.Tensor:
    rows = [torch.zeros(items.width)]
    for item in range(1, items.items + 1):
        pieces = [items.centroids[k, int(items.codes[item, k])] for k in range(items.codes.shape[1])]
        rows.append(torch.cat(pieces) if items.composition == "concat" else torch.stack(pieces).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize(("items", "width", "splits", "codes"), SHAPES)
def test_vectors_are_their_pieces_one_after_another(items: int, width: int, splits: int, codes: int) -> None:
    recjpq = layer(items, width, splits, codes)
    assert isinstance(recjpq, ItemEmbedding)
    expected = slow_vectors(recjpq)
    assert torch.equal(recjpq.vectors(), expected)
    ids = torch.tensor([[0, 1, items], [items + 1, 10**9, 1]])
    assert torch.equal(recjpq.embed(ids), torch.cat([expected, torch.zeros(1, width)])[ids.where(ids <= items, torch.tensor(items + 1))])
    assert recjpq.embed(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4, width)
    assert recjpq.embed(torch.tensor(1)).shape == (width,)


@pytest.mark.parametrize(("items", "width", "splits", "codes"), [*SHAPES, (300, 5, 8, 256)])
def test_pieces_that_are_added_up(items: int, width: int, splits: int, codes: int) -> None:
    """Vectors, look-ups and scores, and the spread of first weights; the width need not be divisible by the splits."""
    added = layer(items, width, splits, codes, composition="sum")
    assert isinstance(added, ItemEmbedding) and added.centroids.shape == (splits, codes, width)
    expected = slow_vectors(added)
    torch.testing.assert_close(added.vectors(), expected, rtol=0, atol=1e-5)
    ids = torch.tensor([[0, 1, items], [items + 1, 10**9, 1]])
    torch.testing.assert_close(added.embed(ids), expected[ids.where(ids <= items, torch.tensor(0))], rtol=0, atol=1e-5)
    assert added.embed(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4, width) and added.embed(torch.tensor(1)).shape == (width,)
    sub_BMb = torch.einsum("bd,mcd->bmc", torch.eye(width), added.centroids)
    scores_BN = sum(sub_BMb[:, k, added.codes[1:, k].long()] for k in range(splits))
    torch.testing.assert_close(scores_BN, added.vectors()[1:].T, rtol=0, atol=1e-5)
    weights = torch.randn(2, 3, width)
    (added.embed(ids) * weights).sum().backward()
    twin = added.centroids.detach().clone().requires_grad_()
    for place, item in zip(weights.flatten(0, 1), ids.flatten().tolist(), strict=True):
        for k in range(splits if 0 < item <= items else 0):
            (twin[k, int(added.codes[item, k])] @ place).backward()
    torch.testing.assert_close(added.centroids.grad, twin.grad, rtol=0, atol=1e-5)
    wide = RecJPQItems(3000, 64, splits=splits, composition="sum", std=0.02)
    assert wide.vectors()[1:].std().item() == pytest.approx(0.02, rel=0.05)


def test_added_pieces_with_codes_of_their_own_can_be_any_table() -> None:
    """One-hot codes of M splits have rank M (b - 1) + 1: with as many items, no two alike, every table is a sum of pieces; concatenated it is not."""
    added, joined = (layer(13, 12, 3, 5, composition=composition) for composition in ("sum", "concat"))
    codes_NM = torch.cat([torch.zeros(2, 3), torch.block_diag(*[torch.arange(1.0, 5)[:, None]] * 3)])
    wanted_ND = torch.cat([torch.zeros(1, 12), torch.randn(13, 12)])
    wanted_ND /= wanted_ND[1:].std()
    for items in (added, joined):
        items.set_codes(codes_NM)
        items.start(wanted_ND, std=1.0)
    torch.testing.assert_close(added.vectors(), wanted_ND, rtol=0, atol=1e-2)
    assert (joined.vectors() - wanted_ND).square().mean() > 0.1


@pytest.mark.parametrize(("items", "width", "splits", "codes"), SHAPES)
def test_scores_are_sums_of_sub_scores(items: int, width: int, splits: int, codes: int) -> None:
    """⟨w_i, φ⟩ by reconstruction = by gathering sub-scores = by adding up split after split; and so are the ten best."""
    recjpq = layer(items, width, splits, codes)
    phi_BD = torch.randn(4, width)
    dense_BN = phi_BD @ recjpq.vectors()[1:].T
    sub_BMb = torch.einsum("bmd,mcd->bmc", phi_BD.view(4, splits, -1), recjpq.centroids)
    places_NM = recjpq.codes[1:].long() + torch.arange(splits) * codes
    gathered_BN = sub_BMb.flatten(1)[:, places_NM].sum(-1)
    looped_BN = torch.zeros(4, items)
    for k in range(splits):
        looped_BN += sub_BMb[:, k, recjpq.codes[1:, k].long()]
    torch.testing.assert_close(gathered_BN, dense_BN, rtol=0, atol=1e-5)
    torch.testing.assert_close(looped_BN, dense_BN, rtol=0, atol=1e-5)
    best = [scores.topk(min(10, items)).values for scores in (dense_BN, gathered_BN, looped_BN)]
    torch.testing.assert_close(best[0], best[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(best[0], best[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2, 4, 8, 16, 32, 64])
def test_parameters_are_codes_times_width_whatever_the_splits_and_items(splits: int) -> None:
    for items in (3, 5000):
        recjpq = RecJPQItems(items, 64, splits=splits)
        assert sum(p.numel() for p in recjpq.parameters()) == 256 * 64
        assert recjpq.codes.dtype == torch.uint8 and recjpq.codes.numel() == (items + 1) * splits


@pytest.mark.parametrize("splits", [1, 8, 64])
def test_first_vectors_have_the_spread_of_a_table(splits: int) -> None:
    torch.manual_seed(0)
    first = RecJPQItems(3000, 64, splits=splits, std=0.02).vectors()[1:]
    assert first.std().item() == pytest.approx(0.02, rel=0.05) and abs(first.mean().item()) < 1e-3


def test_one_split_tells_at_most_256_scores_apart() -> None:
    recjpq = layer(2000, 8, 1, 256)
    assert len(torch.unique(torch.randn(8) @ recjpq.vectors()[1:].T)) <= 256


def test_with_a_code_of_its_own_for_every_item_it_is_a_table() -> None:
    """N <= 256, one split: vectors, look-ups and gradients of a DenseItems with the same numbers."""
    recjpq, dense = layer(200, 6, 1, 256), DenseItems(200, 6)
    recjpq.set_codes(torch.cat([torch.zeros(1, 1), torch.randperm(256)[:200, None]]))
    with torch.no_grad():
        dense.table.copy_(recjpq.vectors())
    ids, weights = torch.randint(0, 203, (5, 7)), torch.randn(5, 7, 6)
    assert torch.equal(recjpq.embed(ids), dense.embed(ids))
    (recjpq.embed(ids) * weights).sum().backward()
    (dense.embed(ids) * weights).sum().backward()
    assert recjpq.centroids.grad is not None and dense.table.grad is not None
    torch.testing.assert_close(recjpq.centroids.grad[0, recjpq.codes[1:, 0].long()], dense.table.grad[1:])


def test_only_pieces_in_use_learn_and_codes_never_do() -> None:
    recjpq = layer(50, 12, 3, 7)
    before = recjpq.codes.clone()
    ids = torch.tensor([0, 3, 3, 17, 51])  # padding and an unknown id among them
    optimiser = torch.optim.SGD(recjpq.parameters(), lr=0.1)
    recjpq.embed(ids).square().sum().backward()
    used = torch.zeros(3, 7, dtype=torch.bool)
    used[torch.arange(3), recjpq.codes[[3, 17]].long()] = True
    assert recjpq.centroids.grad is not None
    assert torch.equal(recjpq.centroids.grad.abs().sum(-1) > 0, used)
    optimiser.step()
    assert torch.equal(recjpq.codes, before) and not recjpq.codes.requires_grad
    assert {name for name, _ in recjpq.named_parameters()} == {"centroids"}


def test_the_future_changes_no_state_of_sasrec() -> None:
    settings = SASRecSettings(width=8, blocks=2, heads=2, max_history=20, items=RecJPQItemsSettings(splits=4, codes=16))
    torch.manual_seed(0)
    model, history = SASRec(settings, SIZES).eval(), make_history(2, (9, 9))
    states_BLD = model.states(history)
    history.items_BL[:, 5:] = history.items_BL[:, 5:] % SIZES.items + 1
    assert torch.equal(model.states(history)[:, :5], states_BLD[:, :5])
    assert not torch.equal(model.states(history)[:, 5:], states_BLD[:, 5:])


@pytest.mark.parametrize("codes", [4, 256])
def test_start_is_the_least_squares_fit_for_the_codes(codes: int) -> None:
    """Column j goes to split j mod M, and no other pieces come nearer to the given vectors than those found, up to one common scale."""
    recjpq = layer(60, 12, 3, codes)
    wanted_ND = torch.randn(61, 12, dtype=torch.float64)
    untouched = recjpq.centroids.detach().clone()
    recjpq.start(wanted_ND, std=0.3)
    assert recjpq.vectors()[1:].std().item() == pytest.approx(0.3, rel=1e-4) and not recjpq.vectors()[0].any()
    found_ND = recjpq.vectors().detach().double()
    scale = None
    for k in range(3):
        one_hot_Nb = nn.functional.one_hot(recjpq.codes[1:, k].long(), codes).double()
        dealt_Nd = wanted_ND[1:, k::3]
        fit_Nd = one_hot_Nb @ torch.linalg.lstsq(one_hot_Nb, dealt_Nd, driver="gelsd").solution
        ratio = float((found_ND[1:, 4 * k : 4 * k + 4] * fit_Nd).sum() / fit_Nd.square().sum())
        scale = scale or ratio
        assert ratio == pytest.approx(scale, rel=1e-4)
        torch.testing.assert_close(found_ND[1:, 4 * k : 4 * k + 4], scale * fit_Nd, rtol=0, atol=1e-5)
        unused = one_hot_Nb.sum(0) == 0
        assert torch.equal(recjpq.centroids[k][unused], untouched[k][unused])


def test_start_of_added_pieces_is_their_least_squares_fit() -> None:
    added = layer(60, 12, 3, 8, composition="sum")
    wanted_ND, untouched = torch.randn(61, 12, dtype=torch.float64), added.centroids.detach().clone()
    added.codes[1:, 1] %= 7
    added.start(wanted_ND, std=0.3)
    assert added.vectors()[1:].std().item() == pytest.approx(0.3, rel=1e-4) and torch.equal(added.centroids[1, 7], untouched[1, 7])
    one_hot_NS = torch.cat([nn.functional.one_hot(added.codes[1:, k].long(), 8) for k in range(3)], dim=1).double()
    fit_ND = one_hot_NS @ torch.linalg.lstsq(one_hot_NS, wanted_ND[1:], driver="gelsd").solution
    found_ND = added.vectors()[1:].detach().double()
    torch.testing.assert_close(found_ND, fit_ND * (0.3 / fit_ND.std()), rtol=0, atol=1e-3)


def test_codes_that_do_not_fit_are_refused() -> None:
    recjpq = layer(5, 12, 3, 7)
    for wrong in (torch.zeros(5, 3), torch.zeros(6, 2), torch.zeros(6)):
        with pytest.raises(ValueError, match="shape"):
            recjpq.set_codes(wrong)
    with pytest.raises(ValueError, match="from 0 to 7; expected 0 to 6"):
        recjpq.set_codes(torch.tensor([[0] * 3] * 5 + [[0, 7, 0]]))
    with pytest.raises(ValueError, match="width 12 is not divisible by splits 5"):
        RecJPQItems(5, 12, splits=5)
    with pytest.raises(ValueError, match="codes is 257"):
        RecJPQItems(5, 12, splits=3, codes=257)


def test_a_grown_catalogue_keeps_the_old_vectors() -> None:
    recjpq = layer(5, 12, 3, 7)
    old_ND, codes_NM = recjpq.vectors().detach().clone(), recjpq.codes
    recjpq.set_codes(torch.cat([codes_NM, torch.tensor([[6, 0, 3], [1, 1, 1]])]))
    assert recjpq.items == 7 and torch.equal(recjpq.vectors()[:6], old_ND)
    assert recjpq.embed(torch.tensor([7, 8])).abs().sum(-1).gt(0).tolist() == [True, False]


@pytest.mark.parametrize("model", [SASRecSettings, DINSettings])
def test_settings_refuse_a_width_that_the_splits_do_not_divide(model: type) -> None:
    with pytest.raises(ValidationError, match=r"width is 20, items.splits is 8"):
        model(width=20, heads=2, items=RecJPQItemsSettings()) if model is SASRecSettings else model(width=20, items=RecJPQItemsSettings())
    assert model(width=24, items=RecJPQItemsSettings()).width == 24
    assert model(width=20, items=RecJPQItemsSettings(composition="sum")).width == 20


def test_the_factory_and_the_finder() -> None:
    assert isinstance(make_items(DenseItemsSettings(), 5, 8, std=0.1), DenseItems)
    made = make_items(RecJPQItemsSettings(splits=4, codes=9), 5, 8, std=0.1)
    assert isinstance(made, RecJPQItems) and made.centroids.shape == (4, 9, 2) and made.codes.shape == (6, 4)
    assert make_items(RecJPQItemsSettings(splits=4, codes=9, composition="sum"), 5, 7, std=0.1).vectors().shape == (6, 7)
    din = build_model(DINSettings(width=8, items=RecJPQItemsSettings()), SIZES)
    assert item_slots(din) == [din.get_submodule("embedding.items")]
    assert item_slots(build_model(DINSettings(), SIZES)) == []


def test_sizes_by_arithmetic() -> None:
    """Item side alone, D = 512, M = 8: 13 times smaller at MovieLens-1M's 3,416 items, more than 240 times at Gowalla's 1,271,638."""

    def ratio(items: int) -> float:
        return items * 512 * 4 / (256 * 512 * 4 + items * 8)

    assert ratio(3_416) == pytest.approx(12.7, abs=0.1)
    assert ratio(1_271_638) == pytest.approx(243, abs=1)


def test_sizes_on_disk(tmp_path: Path) -> None:
    """SASRec of MovieLens-1M's size, saved: the files differ by what the arithmetic says of the item side, levels (4 M b bytes) included."""
    items, width = 3_416, 512
    bytes_of = {}
    for name, slot in (("dense", DenseItemsSettings()), ("recjpq", RecJPQItemsSettings(splits=8))):
        settings = SASRecSettings(width=width, blocks=1, heads=1, max_history=10, items=slot)
        module = build_model(settings, Sizes(items=items, categories=1, actions=1))
        rest = sum(p.numel() for key, p in module.named_parameters() if not key.startswith("items."))
        card = ModelCard(name=name, settings=settings, sizes=Sizes(items=items, categories=1, actions=1), actions=("click",), prior_click_rate=0.1)
        save_model(tmp_path / name, module, card, {})
        bytes_of[name] = (tmp_path / name / "model.safetensors").stat().st_size - 4 * rest
    header = 4096
    assert math.isclose(bytes_of["dense"], (items + 1) * width * 4, abs_tol=header)
    assert math.isclose(bytes_of["recjpq"], 256 * width * 4 + 8 * 256 * 4 + (items + 1) * 8, abs_tol=header)
    assert bytes_of["dense"] / bytes_of["recjpq"] == pytest.approx(12.5, abs=0.1)
