"""What every retriever must hold, as assertions: give each a model."""

from dataclasses import replace

import torch
from torch import nn

from longtrail.config import EncoderSettings
from longtrail.losses import next_item_loss
from longtrail.losses.next_item import LOSSES
from longtrail.models.contracts import Pairs
from longtrail.models.masks import padding_mask
from tests.contracts.batches import SIZES, make_history, make_windows, rows, with_garbage, with_padding

EXACT = {"rtol": 0.0, "atol": 1e-11}


def assert_vectors_fit_each_other(model: nn.Module) -> None:
    """One width; a row an item and a zero row for padding; finite for an empty history too."""
    history = make_history()
    with torch.no_grad():
        users_BD, items_ND = model.eval().user_vectors(history), model.item_vectors()
    assert items_ND.shape == (SIZES.items + 1, users_BD.shape[1])
    assert len(users_BD) == len(history.lengths_B)
    assert torch.isfinite(users_BD).all()
    assert not items_ND[0].any()


def assert_padding_content_changes_nothing(model: nn.Module) -> None:
    """Bit-equal in the very dtype the model has."""
    history = make_history()
    garbage = with_garbage(history, padding_mask(history.lengths_B, history.items_BL.shape[1]))
    with torch.no_grad():
        assert torch.equal(model.eval().user_vectors(history), model.user_vectors(garbage))


def assert_more_padding_changes_nothing(model: nn.Module) -> None:
    history = make_history()
    model = model.double().eval()
    with torch.no_grad():
        torch.testing.assert_close(model.user_vectors(history), model.user_vectors(with_padding(history, 8)), **EXACT)


def assert_batch_of_one_equals_batch_of_many(model: nn.Module) -> None:
    history = make_history()
    model = model.double().eval()
    with torch.no_grad():
        alone = [model.user_vectors(rows(history, slice(b, b + 1))) for b in range(len(history.lengths_B))]
        torch.testing.assert_close(model.user_vectors(history), torch.cat(alone), **EXACT)


def assert_new_ids_are_read_as_unknown(model: nn.Module) -> None:
    """Items, categories and actions that came after the model was trained: no error, and all alike."""
    history = make_history()
    mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
    for name, known in (("items_BL", SIZES.items), ("categories_BL", SIZES.categories), ("actions_BL", SIZES.actions)):
        ids_BL = getattr(history, name)
        near, far = (replace(history, **{name: torch.full_like(ids_BL, known + more).masked_fill(~mask_BL, 0)}) for more in (1, 1000))
        with torch.no_grad():
            assert torch.equal(model.eval().user_vectors(near), model.user_vectors(far))


def assert_empty_histories_are_alike(model: nn.Module) -> None:
    """Finite and one vector for all of them, also where the whole batch is empty, whatever the padded width."""
    model = model.double().eval()
    with torch.no_grad():
        narrow, wide = (model.user_vectors(make_history(5, (0, 0), places=places)) for places in (1, 15))
    assert torch.isfinite(narrow).all()
    torch.testing.assert_close(narrow, narrow[:1].expand_as(narrow), **EXACT)
    torch.testing.assert_close(narrow, wide, **EXACT)


def assert_nobody_has_no_vector(model: nn.Module) -> None:
    """A batch of no users, in training mode too: no rows, as wide and of the type of those of a batch of some."""
    history = make_history()
    for module in (model.train(), model.eval()):
        expected = module.user_vectors(history)[:0]
        found = module.user_vectors(rows(history, slice(0, 0)))
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


UNTRAINED = (
    assert_vectors_fit_each_other,
    assert_padding_content_changes_nothing,
    assert_more_padding_changes_nothing,
    assert_batch_of_one_equals_batch_of_many,
    assert_empty_histories_are_alike,
    assert_nobody_has_no_vector,
    assert_new_ids_are_read_as_unknown,
)


def pairs_of(model: nn.Module, windows: object, seed: int = 0) -> Pairs:
    """Cloze models draw their places from torch's global generator."""
    torch.manual_seed(seed)
    return model.training_pairs(windows)


def assert_pairs_are_of_the_windows(model: nn.Module) -> None:
    """One state a target, window by window; targets are targets of their window; nothing that is only context is asked for."""
    windows = make_windows()
    allowed = [{int(i) for i in [first, *targets] if i} for first, targets in zip(windows.first_targets_B, windows.targets_BL, strict=True)]
    for seed in range(20):
        states_TD, targets_T, windows_T = pairs_of(model.eval(), windows, seed)
        assert len(states_TD) == len(targets_T) == len(windows_T)
        assert torch.isfinite(states_TD).all()
        assert targets_T.min() > 0
        assert windows_T.tolist() == sorted(windows_T.tolist())
        assert {*windows_T.tolist()} == {b for b, items in enumerate(allowed) if items}
        assert all(target in allowed[window] for target, window in zip(targets_T.tolist(), windows_T.tolist(), strict=True))


def assert_padding_content_changes_no_training(model: nn.Module) -> None:
    """In training mode, dropout and all: the same states, bit for bit."""
    windows = make_windows()
    garbage = replace(windows, history=with_garbage(windows.history, padding_mask(windows.lengths_B, windows.history.items_BL.shape[1])))
    for clean, dirty in zip(pairs_of(model.train(), windows), pairs_of(model, garbage), strict=True):
        assert torch.equal(clean, dirty)


def assert_gradients_reach_every_parameter(model: nn.Module) -> None:
    """From the scores of training pairs and of an empty history; finite, and zero for the padding row. Frozen ones aside."""
    model = model.double().train()
    users_BD = torch.cat([pairs_of(model, make_windows()).states_TD, model.user_vectors(make_history())])
    scores_BN = users_BD @ model.item_vectors()[1:].T
    (scores_BN * torch.randn(scores_BN.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))).sum().backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, f"{name} has a zero gradient"
        if name.endswith("table"):
            assert not parameter.grad[0].any(), f"{name}: the padding row learns"


def assert_every_loss_trains(model: nn.Module) -> None:
    """A few steps of each loss bring a batch's targets up in the order of the catalogue: the pieces are wired with the right sign."""
    windows, start = make_windows(), {name: value.clone() for name, value in model.state_dict().items()}
    for loss in LOSSES:
        settings = EncoderSettings.model_validate({"loss": loss, "negatives": 8})
        model.load_state_dict(start)
        optimiser = torch.optim.Adam(model.train().parameters(), lr=0.03)
        before = _mean_rank(model, windows)
        for step in range(40):
            optimiser.zero_grad()
            next_item_loss(pairs_of(model, windows, step), model.items, settings).backward()
            optimiser.step()
        after = _mean_rank(model, windows)
        assert after < 0.8 * before, (loss, before, after)


@torch.no_grad()
def _mean_rank(model: nn.Module, windows: object) -> float:
    """Of the targets of ten draws; from 0."""
    model.eval()
    ranks = []
    for seed in range(10):
        states_TD, targets_T, _ = pairs_of(model, windows, 100 + seed)
        scores_TN = states_TD @ model.item_vectors()[1:].T
        ranks.append((scores_TN > scores_TN.gather(1, targets_T[:, None] - 1)).sum(1))
    model.train()
    return float(torch.cat(ranks).float().mean())


ENCODERS = (
    assert_pairs_are_of_the_windows,
    assert_padding_content_changes_no_training,
    assert_gradients_reach_every_parameter,
    assert_every_loss_trains,
)


def assert_the_future_changes_nothing(model: nn.Module) -> None:
    """Sequence encoders: `states` at t are bit-equal whatever stands after t: items, categories, actions and times, all at once; known or not."""
    history, places_L = make_history(2, (9, 9, 9)), torch.arange(9)
    names = ("items_BL", "categories_BL", "actions_BL", "times_BL")
    with torch.no_grad():
        states_BLD = model.eval().states(history)
        for t in range(9):
            for other in (make_history(3 + t, (9, 9, 9)), with_garbage(history, places_L.expand(3, 9) <= t)):
                future = {name: torch.where(places_L > t, getattr(other, name), getattr(history, name)) for name in names}
                assert torch.equal(model.states(replace(history, **future))[:, : t + 1], states_BLD[:, : t + 1]), t
        first = model.states(make_history(3, (9, 9, 9)))
        assert not torch.equal(first[:, 0], states_BLD[:, 0])  # what is read at all is read from the first place on


def assert_prefixes_have_their_own_vectors(model: nn.Module) -> None:
    """Sequence encoders: the user after t events is `states` at t - 1, and row t of `prefix_states`; so training and serving are one."""
    history = make_history(2, (9, 6))
    model = model.double().eval()
    with torch.no_grad():
        states_BLD, prefixes_BLD = model.states(history), model.prefix_states(history)
        for t in range(7):
            user_BD = model.user_vectors(replace(history, lengths_B=torch.tensor([t, min(t, 6)])))
            torch.testing.assert_close(prefixes_BLD[:, t], user_BD, **EXACT)
            if t:
                torch.testing.assert_close(states_BLD[:, t - 1], user_BD, **EXACT)


def assert_every_target_is_asked_for(model: nn.Module) -> None:
    """Causal encoders: the pairs are all targets of a batch, each with the user vector of the events before it."""
    windows, model = make_windows(), model.double().eval()
    with torch.no_grad():
        states_TD, targets_T, windows_T = model.training_pairs(windows)
        wanted = []
        for b, row in enumerate(torch.cat([windows.first_targets_B[:, None], windows.targets_BL], dim=1).tolist()):
            for t, target in enumerate(row):
                if target:
                    before = replace(rows(windows.history, slice(b, b + 1)), lengths_B=torch.tensor([t]))
                    wanted.append((b, target, model.user_vectors(before)[0]))
    assert [(b, target) for b, target, _ in wanted] == list(zip(windows_T.tolist(), targets_T.tolist(), strict=True))
    torch.testing.assert_close(states_TD, torch.stack([state for *_, state in wanted]), **EXACT)


CAUSAL = (assert_the_future_changes_nothing, assert_prefixes_have_their_own_vectors, assert_every_target_is_asked_for)


def assert_masked_events_do_not_show(model: nn.Module) -> None:
    """Cloze encoders: whatever stands in a masked place, every state is bit-equal; and what stands in another place, before or after, matters."""
    history, masked_BL = make_history(2, (9, 9, 9)), torch.zeros(3, 9, dtype=torch.bool)
    masked_BL[:, [2, 5]] = True
    other_BL = history.items_BL % SIZES.items + 1
    with torch.no_grad():
        states_BTD = model.eval().states(history.items_BL, history.lengths_B, masked_BL).unflatten(0, (3, 2))
        hidden_BL = torch.where(masked_BL, other_BL, history.items_BL)
        assert torch.equal(model.states(hidden_BL, history.lengths_B, masked_BL).unflatten(0, (3, 2)), states_BTD)
        for place in (0, 4, 8):
            shown_BL = history.items_BL.clone()
            shown_BL[:, place] = other_BL[:, place]
            changed_BT = (model.states(shown_BL, history.lengths_B, masked_BL).unflatten(0, (3, 2)) - states_BTD).abs().amax(-1)
            assert (changed_BT > 1e-6).all()


def assert_training_and_serving_ask_alike(model: nn.Module) -> None:
    """Cloze encoders: the user vector is the state of a mask that stands for the next event, whatever that event is."""
    windows, model = make_windows(), model.double().eval()
    history = windows.history
    items_BL = nn.functional.pad(history.items_BL, (0, 1)).scatter(1, history.lengths_B[:, None], 7)
    masked_BL = torch.arange(items_BL.shape[1]) == history.lengths_B[:, None]
    with torch.no_grad():
        torch.testing.assert_close(model.states(items_BL, history.lengths_B + 1, masked_BL), model.user_vectors(history), **EXACT)


CLOZE = (assert_masked_events_do_not_show, assert_training_and_serving_ask_alike)
