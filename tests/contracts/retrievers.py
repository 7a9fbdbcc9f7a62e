"""What every retriever must hold, as assertions: give each a model."""

from dataclasses import replace

import torch
from torch import nn

from longtrail.models.masks import padding_mask
from tests.contracts.batches import SIZES, make_history, rows, with_garbage, with_padding

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
    history = make_history()
    mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
    near, far = (replace(history, items_BL=torch.full_like(history.items_BL, SIZES.items + more).masked_fill(~mask_BL, 0)) for more in (1, 1000))
    with torch.no_grad():
        assert torch.equal(model.eval().user_vectors(near), model.user_vectors(far))


UNTRAINED = (
    assert_vectors_fit_each_other,
    assert_padding_content_changes_nothing,
    assert_more_padding_changes_nothing,
    assert_batch_of_one_equals_batch_of_many,
    assert_new_ids_are_read_as_unknown,
)


def assert_the_future_changes_nothing(model: nn.Module) -> None:
    """Sequence encoders: `states` at t are bit-equal whatever stands after t."""
    history = make_history(2, (9, 9, 9))
    with torch.no_grad():
        states_BLD = model.eval().states(history)
        for t in range(9):
            items_BL = history.items_BL.clone()
            items_BL[:, t + 1 :] = items_BL[:, t + 1 :] % SIZES.items + 1
            assert torch.equal(model.states(replace(history, items_BL=items_BL))[:, : t + 1], states_BLD[:, : t + 1]), t


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


SEQUENTIAL = (assert_the_future_changes_nothing, assert_prefixes_have_their_own_vectors)
