"""What every ranker must hold, as assertions: give each a model. They look at real candidates only; what stands in padded places is undefined."""

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from longtrail.models.contracts import Candidates, Context, History
from longtrail.models.masks import padding_mask
from tests.contracts.batches import SIZES, make_candidates, make_context, make_history, make_request, rows, with_garbage, with_padding

EXACT = {"rtol": 0.0, "atol": 1e-11}  # in float64; a batch of another shape may add up in another order


def real_logits(model: nn.Module, history: History, candidates: Candidates, context: Context) -> Tensor:
    """[sum of lengths]: the logits of real candidates."""
    with torch.no_grad():
        logits_BC = model(history, candidates, context)
    assert logits_BC.shape == candidates.items_BC.shape
    return logits_BC[padding_mask(candidates.lengths_B, logits_BC.shape[1])]


def assert_finite(model: nn.Module) -> None:
    assert torch.isfinite(real_logits(model.eval(), *make_request())).all()


def assert_padding_content_changes_nothing(model: nn.Module) -> None:
    """Bit-equal in the very dtype the model has."""
    history, candidates, context = make_request()
    mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
    mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])
    clean = real_logits(model.eval(), history, candidates, context)
    assert torch.equal(clean, real_logits(model, with_garbage(history, mask_BL), with_garbage(candidates, mask_BC), context))


def assert_padding_content_changes_no_training(model: nn.Module) -> None:
    """In training mode too: no statistic is taken over padding."""
    history, candidates, context = make_request()
    mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])
    clean, garbage, wider = (deepcopy(model).double().train() for _ in range(3))  # each pass moves the running statistics
    expected = real_logits(clean, history, candidates, context)
    torch.testing.assert_close(real_logits(garbage, history, with_garbage(candidates, mask_BC), context), expected, **EXACT)
    torch.testing.assert_close(real_logits(wider, history, with_padding(candidates, 4), context), expected, **EXACT)


def assert_more_padding_changes_nothing(model: nn.Module) -> None:
    history, candidates, context = make_request()
    model = model.double().eval()
    clean = real_logits(model, history, candidates, context)
    torch.testing.assert_close(clean, real_logits(model, with_padding(history, 7), with_padding(candidates, 3), context), **EXACT)


def assert_batch_of_one_equals_batch_of_many(model: nn.Module) -> None:
    history, candidates, context = make_request()
    model = model.double().eval()
    together = real_logits(model, history, candidates, context)
    alone = [real_logits(model, *(rows(part, slice(b, b + 1)) for part in (history, candidates, context))) for b in range(len(history.lengths_B))]
    torch.testing.assert_close(together, torch.cat(alone), **EXACT)


def assert_order_of_candidates_means_nothing(model: nn.Module) -> None:
    """It changes the order of the logits and nothing else: for rankers that look at the whole set too."""
    history, context = make_history(3, (9, 0)), make_context(3, 2)
    candidates = make_candidates(3, (6, 6))
    model = model.double().eval()
    logits = real_logits(model, history, candidates, context).view(2, 6)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = replace(
        candidates,
        items_BC=candidates.items_BC[:, order],
        categories_BC=candidates.categories_BC[:, order],
        statistics_BCF=candidates.statistics_BCF[:, order],
    )
    torch.testing.assert_close(real_logits(model, history, shuffled, context).view(2, 6), logits[:, order], **EXACT)


def assert_candidates_do_not_see_each_other(model: nn.Module) -> None:
    """Each candidate alone, in a request of its own, has the same logit (point-wise rankers)."""
    history, context = make_history(3, (9, 0)), make_context(3, 2)
    candidates = make_candidates(3, (6, 6))
    model = model.double().eval()
    logits = real_logits(model, history, candidates, context)
    each = torch.arange(2).repeat_interleave(6)
    alone = Candidates(
        items_BC=candidates.items_BC.view(12, 1),
        categories_BC=candidates.categories_BC.view(12, 1),
        statistics_BCF=candidates.statistics_BCF.view(12, 1, -1),
        lengths_B=torch.ones(12, dtype=torch.int64),
    )
    torch.testing.assert_close(real_logits(model, rows(history, each), alone, rows(context, each)), logits, **EXACT)


def assert_empty_histories_are_alike(model: nn.Module) -> None:
    """Finite, also when the whole batch is empty, and the same whatever the padded width."""
    candidates, context = make_candidates(5, (4, 4)), make_context(5, 2)
    model = model.double().eval()
    logits = real_logits(model, make_history(5, (0, 0), places=1), candidates, context)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits, real_logits(model, make_history(5, (0, 0), places=30), candidates, context), **EXACT)


def assert_empty_batches_have_empty_logits(model: nn.Module) -> None:
    """Nobody asks, or nothing is asked about: logits of that very shape; in training nothing is learnt from it, running statistics included."""
    history, candidates, context = make_request()
    without = Candidates(
        items_BC=candidates.items_BC[:, :0],
        categories_BC=candidates.categories_BC[:, :0],
        statistics_BCF=candidates.statistics_BCF[:, :0],
        lengths_B=torch.zeros_like(candidates.lengths_B),
    )
    nobody = [rows(part, slice(0, 0)) for part in (history, candidates, context)]
    before = deepcopy(model.state_dict())
    for request in ((history, without, context), nobody, (nobody[0], rows(without, slice(0, 0)), nobody[2])):
        shape = request[1].items_BC.shape
        assert real_logits(model.eval(), *request).dtype == real_logits(model, history, candidates, context).dtype
        each = model.train().training_logits(*request) if hasattr(model, "training_logits") else [model.train()(*request)]  # type: ignore[operator]
        assert all(logits_BC.shape == shape for logits_BC in each)
        if each[0].requires_grad:
            sum(logits_BC.sum() for logits_BC in each).backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def assert_new_ids_are_read_as_unknown(model: nn.Module) -> None:
    """Items that came after the model was trained: no error, and all alike."""
    history, candidates, context = make_request()
    mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])

    def logits_of(item: int) -> Tensor:
        new = replace(candidates, items_BC=torch.full_like(candidates.items_BC, item).masked_fill(~mask_BC, 0))
        late = replace(history, items_BL=history.items_BL.masked_fill(history.items_BL == history.items_BL[3, 2], item))
        return real_logits(model.eval(), late, new, context)

    assert torch.isfinite(logits_of(SIZES.items + 1)).all()
    assert torch.equal(logits_of(SIZES.items + 1), logits_of(SIZES.items + 1000))


def assert_new_categories_and_actions_are_read_as_unknown(model: nn.Module) -> None:
    """They came after the model was trained, on events and candidates among known ones: as id 0, which says that nobody knows."""
    history, candidates, context = make_request()

    def logits_of(category: int, action: int) -> Tensor:
        late = replace(
            history,
            categories_BL=torch.where(history.categories_BL == history.categories_BL[3, 2], category, history.categories_BL),
            actions_BL=torch.where(history.actions_BL == history.actions_BL[3, 2], action, history.actions_BL),
        )
        new = replace(
            candidates, categories_BC=torch.where(candidates.categories_BC == history.categories_BL[3, 2], category, candidates.categories_BC)
        )
        assert (late.categories_BL[3, 2], late.actions_BL[3, 2]) == (category, action) and not torch.equal(
            new.categories_BC, candidates.categories_BC
        )
        return real_logits(model.eval(), late, new, context)

    expected = logits_of(0, 0)
    for more in (1, 1000):
        assert torch.equal(logits_of(SIZES.categories + more, 0), expected)
        assert torch.equal(logits_of(0, SIZES.actions + more), expected)


def assert_gradients_reach_every_parameter(model: nn.Module) -> None:
    """From the real candidates' logits; finite, and zero for the padding row of every table."""
    history, candidates, context = make_request()
    model = model.double().train()
    each = model.training_logits(history, candidates, context) if hasattr(model, "training_logits") else [model(history, candidates, context)]  # type: ignore[operator]
    weights = torch.randn(each[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    sum((logits_BC * weights)[padding_mask(candidates.lengths_B, logits_BC.shape[1])].sum() for logits_BC in each).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, f"{name} has a zero gradient"
        if name.endswith(("table", "actions", "gaps")):
            assert parameter.grad[0].abs().sum() == 0, f"{name}: the padding row learns"


def assert_training_matters(model: nn.Module) -> None:
    """A few steps lower the loss of a batch: the pieces are wired with the right sign."""
    history, candidates, context = make_request()
    mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])
    clicks_BC = (candidates.items_BC % 2).float()
    optimiser = torch.optim.Adam(model.train().parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(model(history, candidates, context)[mask_BC], clicks_BC[mask_BC])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses[:: len(losses) - 1]


UNTRAINED = (
    assert_finite,
    assert_padding_content_changes_nothing,
    assert_padding_content_changes_no_training,
    assert_more_padding_changes_nothing,
    assert_batch_of_one_equals_batch_of_many,
    assert_order_of_candidates_means_nothing,
    assert_empty_histories_are_alike,
    assert_empty_batches_have_empty_logits,
    assert_new_ids_are_read_as_unknown,
    assert_new_categories_and_actions_are_read_as_unknown,
)
POINTWISE = (assert_candidates_do_not_see_each_other,)  # not for rankers that look at the whole set
TRAINED = (assert_gradients_reach_every_parameter, assert_training_matters)
