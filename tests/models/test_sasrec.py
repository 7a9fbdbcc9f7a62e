"""SASRec: its memory, its positions, its start."""

from dataclasses import replace

import pytest
import torch

from longtrail.config import FullAttentionSettings, SASRecSettings
from longtrail.models.contracts import History, Sizes
from longtrail.models.encoders.sasrec import SASRec
from longtrail.models.order import newest
from tests.contracts.batches import SIZES, make_history
from tests.contracts.largest import Largest


def make_sasrec(**changes: object) -> SASRec:
    torch.manual_seed(1)
    return SASRec(SASRecSettings(**({"width": 8, "heads": 2, "max_history": 20} | changes)), SIZES)


def test_no_square_of_the_length_is_made() -> None:
    """Forward and backward at L = 1,024, D = 8: the largest tensor is the fused projection or the FFN's, linear in L."""
    settings = SASRecSettings(width=8, heads=1, blocks=1, max_history=1024, dropout=0.1)
    model = SASRec(settings, Sizes(items=40, categories=6, actions=5)).train()
    with Largest() as largest:
        model.states(make_history(0, (1024,))).sum().backward()
    assert largest.elements <= 1024 * 8 * 4 < 1024 * 1024


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_only_the_newest_events_are_read(positions: str) -> None:
    """Longer than max_history: as if the older ones were not there, for each user by their own length."""
    model = make_sasrec(max_history=5, attention={"kind": "full", "positions": positions}).double().eval()
    history = make_history(4, (12, 7, 3, 0))
    with torch.no_grad():
        user_BD = model.user_vectors(history)
        for b, n in enumerate(history.lengths_B.tolist()):
            kept = slice(max(0, n - 5), max(1, n))
            alone = History(
                items_BL=history.items_BL[b : b + 1, kept],
                categories_BL=history.categories_BL[b : b + 1, kept],
                actions_BL=history.actions_BL[b : b + 1, kept],
                times_BL=history.times_BL[b : b + 1, kept],
                lengths_B=torch.tensor([min(5, n)]),
            )
            torch.testing.assert_close(user_BD[b : b + 1], model.user_vectors(alone), rtol=0, atol=1e-12)


def test_more_events_than_learned_positions_are_refused() -> None:
    model = make_sasrec(max_history=5, attention=FullAttentionSettings(positions="learned"))
    with pytest.raises(ValueError, match="a history of 12 events; expected at most max_history = 5"):
        model.states(make_history(4, (12, 7, 3, 0)))


def test_newest_keeps_all_fields_in_step() -> None:
    history = History(
        items_BL=torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
        categories_BL=torch.tensor([[11, 12, 13, 14], [15, 16, 0, 0]]),
        actions_BL=torch.tensor([[21, 22, 23, 24], [25, 26, 0, 0]]),
        times_BL=torch.tensor([[31, 32, 33, 34], [35, 36, 0, 0]]),
        lengths_B=torch.tensor([4, 2]),
    )
    cut = newest(history, 3)
    assert cut.items_BL.tolist() == [[2, 3, 4], [5, 6, 0]]
    assert cut.categories_BL.tolist() == [[12, 13, 14], [15, 16, 0]]
    assert cut.actions_BL.tolist() == [[22, 23, 24], [25, 26, 0]]
    assert cut.times_BL.tolist() == [[32, 33, 34], [35, 36, 0]]
    assert cut.lengths_B.tolist() == [3, 2]
    assert newest(history, 4) is history


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_order_and_start_matter(positions: str) -> None:
    """One block, and two older events change places: without positions the newest would read the same."""
    model = make_sasrec(blocks=1, attention={"kind": "full", "positions": positions}).eval()
    history = make_history(3, (6, 0))
    with torch.no_grad():
        model.start.fill_(0.5)
        user_BD = model.user_vectors(history)
        assert torch.equal(user_BD[1], model.start)
        turned = replace(history, items_BL=history.items_BL[:, [0, 2, 1, 3, 4, 5]])
        assert (model.user_vectors(turned)[0] - user_BD[0]).abs().max() > 1e-5


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_gradients_reach_every_parameter_and_no_padding_row(positions: str) -> None:
    model = make_sasrec(dropout=0.0, attention={"kind": "full", "positions": positions}).train()
    states = model.prefix_states(make_history(3, (6, 2)))
    (states @ model.item_vectors()[1:].T).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name != "start":  # zeros at first: its own score is zero, and so is this loss's gradient
            assert parameter.grad[: states.shape[1]].abs().sum() > 0, name
    assert not model.items.table.grad[0].any()


def test_dropout_is_off_when_serving() -> None:
    model = make_sasrec(dropout=0.5)
    history = make_history(3, (6, 2))
    with torch.no_grad():
        assert not torch.equal(model.train().user_vectors(history), model.user_vectors(history))
        assert torch.equal(model.eval().user_vectors(history), model.user_vectors(history))
