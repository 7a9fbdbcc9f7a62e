"""BERT4Rec: which places are masked, whose positions they have, and what a long window keeps."""

from dataclasses import replace

import pytest
import torch

from longtrail.config import BERT4RecSettings, FullAttentionSettings, RecJPQItemsSettings
from longtrail.models.encoders.bert4rec import BERT4Rec, draw_masked, window_events
from tests.contracts.batches import SIZES, make_history, make_windows, rows


def make_bert4rec(**changes: object) -> BERT4Rec:
    torch.manual_seed(1)
    return BERT4Rec(BERT4RecSettings(**({"width": 8, "heads": 2, "max_history": 20} | changes)), SIZES)


@pytest.mark.parametrize(("targets", "wanted"), [(0, 0), (1, 1), (2, 1), (7, 1), (8, 2), (10, 2), (99, 20), (100, 20), (200, 20)])
def test_a_fifth_of_the_targets_is_masked_at_least_one_at_most_twenty(targets: int, wanted: int) -> None:
    is_target_BL = torch.zeros(3, 201, dtype=torch.bool)
    is_target_BL[:, 1 : 1 + targets] = True
    for seed in range(5):
        torch.manual_seed(seed)
        masked_BL = draw_masked(is_target_BL, 0.2, 20)
        assert masked_BL.sum(1).tolist() == [wanted] * 3
        assert not (masked_BL & ~is_target_BL).any()


def test_all_places_are_masked_equally_often_and_by_the_seed() -> None:
    is_target_BL = torch.ones(4_000, 10, dtype=torch.bool)
    is_target_BL[:, 3] = False
    torch.manual_seed(0)
    masked_BL = draw_masked(is_target_BL, 0.4, 20)
    expected = torch.full((10,), 4 / 9).index_fill_(0, torch.tensor([3]), 0)
    torch.testing.assert_close(masked_BL.float().mean(0), expected, rtol=0, atol=0.03)
    torch.manual_seed(0)
    assert torch.equal(masked_BL, draw_masked(is_target_BL, 0.4, 20))
    assert not torch.equal(masked_BL, draw_masked(is_target_BL, 0.4, 20))


def test_a_window_is_its_inputs_and_the_newest_target() -> None:
    windows = make_windows()
    events_BL, lengths_B, is_target_BL = window_events(windows)
    whole = make_history(0, (2, 6, 10, 5))  # what make_windows cut its inputs and targets from
    assert torch.equal(events_BL, whole.items_BL)
    assert torch.equal(lengths_B, whole.lengths_B)
    assert is_target_BL.sum(1).tolist() == [2, 6, 7, 1]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_window_longer_than_max_history_loses_its_oldest_events(positions: str) -> None:
    """Ten inputs and a target, five places: only the newest five events can be masked, and older ones change nothing."""
    model = make_bert4rec(max_history=5, mask_share=1.0, dropout=0.0, attention={"kind": "full", "positions": positions})
    windows = make_windows(3, (10, 3), (0, 0))
    events_BL, _, _ = window_events(windows)
    pairs = model.training_pairs(windows)
    assert pairs.targets_T.tolist() == [*events_BL[0, -5:].tolist(), *events_BL[1, :4].tolist()]
    items_BL = windows.history.items_BL.clone()
    items_BL[0, :6] = items_BL[0, :6] % SIZES.items + 1
    older = replace(windows, history=replace(windows.history, items_BL=items_BL))
    assert torch.equal(model.training_pairs(older).states_TD, pairs.states_TD)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_only_the_newest_events_are_read_and_the_mask_takes_a_place(positions: str) -> None:
    model = make_bert4rec(max_history=5, attention={"kind": "full", "positions": positions}).double().eval()
    history = make_history(4, (12, 7, 4, 3, 0))
    with torch.no_grad():
        user_BD = model.user_vectors(history)
        for b, n in enumerate(history.lengths_B.tolist()):
            kept = slice(max(0, n - 4), max(1, n))
            alone = rows(history, slice(b, b + 1))
            cut = {name: getattr(alone, name)[:, kept] for name in ("items_BL", "categories_BL", "actions_BL", "times_BL")}
            alone = replace(alone, **cut, lengths_B=torch.tensor([min(4, n)]))
            torch.testing.assert_close(user_BD[b : b + 1], model.user_vectors(alone), rtol=0, atol=1e-12)


def test_more_events_than_learned_positions_are_refused() -> None:
    model = make_bert4rec(max_history=5, attention=FullAttentionSettings(positions="learned"))
    with pytest.raises(ValueError, match="a history of 6 events, masks included; expected at most max_history = 5"):
        model.states(torch.ones(1, 6, dtype=torch.int64), torch.tensor([6]), torch.ones(1, 6, dtype=torch.bool))


def test_positions_count_from_the_newest_event() -> None:
    """With the item vectors at zero only positions differ: the mask's is the first row, the oldest event's that of its distance."""
    model = make_bert4rec(attention=FullAttentionSettings(positions="learned")).eval()
    with torch.no_grad():
        model.items.table.zero_()
        history = make_history(4, (6, 2))
        before = model.user_vectors(history)
        model.positions[7:] += 1  # beyond seven places: six events and the mask
        assert torch.equal(model.user_vectors(history), before)
        model.positions[6, 0] += 1  # the oldest event of the longer history
        changed = (model.user_vectors(history) - before).abs().amax(1)
    assert changed[0] > 1e-6
    assert changed[1] == 0


def test_the_mask_starts_as_large_as_what_stands_for_an_item() -> None:
    """Items are read times √D: a mask of the table's own spread would be lost beside them."""
    model = make_bert4rec(width=1024, blocks=1)
    read = model.items.table[1:].detach() * 1024**0.5
    assert model.mask.std().item() == pytest.approx(read.std().item(), rel=0.1)


def test_the_mask_is_no_item() -> None:
    """Not one row more than the catalogue has, dense or RecJPQ; and the mask learns from cloze while the padding row does not."""
    model = make_bert4rec(dropout=0.0)
    assert model.items.vectors().shape == (SIZES.items + 1, 8)
    assert make_bert4rec(items=RecJPQItemsSettings(splits=2, codes=4)).items.codes.shape == (SIZES.items + 1, 2)
    pairs = model.training_pairs(make_windows())
    (pairs.states_TD @ model.item_vectors()[1:].T).square().sum().backward()
    assert model.mask.grad.abs().sum() > 0
    assert not model.items.table.grad[0].any()
