"""Random batches with the edges in them: an empty history, one event, a full one; one candidate, all of them."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from longtrail.examples import SequenceBatch
from longtrail.models.contracts import Candidates, Context, History, Sizes
from longtrail.models.masks import padding_mask

SIZES = Sizes(items=40, categories=6, actions=5)
HISTORY_LENGTHS = (0, 1, 5, 9, 4)
CANDIDATE_LENGTHS = (6, 3, 1, 6, 2)


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_history(seed: int = 0, lengths: tuple[int, ...] = HISTORY_LENGTHS, places: int | None = None, sizes: Sizes = SIZES) -> History:
    """Ids in the real places, zeros in the padded ones."""
    random, lengths_B = draws(seed), torch.tensor(lengths)
    shape = (len(lengths), places or max(1, *lengths))
    mask_BL = padding_mask(lengths_B, shape[1])

    def ids(largest: int) -> Tensor:
        return torch.randint(1, largest + 1, shape, generator=random).masked_fill(~mask_BL, 0)

    return History(
        items_BL=ids(sizes.items), categories_BL=ids(sizes.categories), actions_BL=ids(sizes.actions), times_BL=ids(10**9), lengths_B=lengths_B
    )


def make_candidates(seed: int = 0, lengths: tuple[int, ...] = CANDIDATE_LENGTHS, places: int | None = None, sizes: Sizes = SIZES) -> Candidates:
    random, lengths_B = draws(seed + 1), torch.tensor(lengths)
    shape = (len(lengths), places or max(1, *lengths))
    mask_BC = padding_mask(lengths_B, shape[1])
    return Candidates(
        items_BC=torch.randint(1, sizes.items + 1, shape, generator=random).masked_fill(~mask_BC, 0),
        categories_BC=torch.randint(1, sizes.categories + 1, shape, generator=random).masked_fill(~mask_BC, 0),
        statistics_BCF=torch.randn(*shape, 3, generator=random) * mask_BC.unsqueeze(-1),
        lengths_B=lengths_B,
    )


def make_context(seed: int = 0, requests: int = len(HISTORY_LENGTHS)) -> Context:
    random = draws(seed + 2)
    return Context(statistics_BG=torch.randn(requests, 3, generator=random), times_B=torch.randint(1, 10**9, (requests,), generator=random))


def make_request(seed: int = 0) -> tuple[History, Candidates, Context]:
    return make_history(seed), make_candidates(seed), make_context(seed)


def make_windows(seed: int = 0, lengths: tuple[int, ...] = (1, 5, 9, 4), context: tuple[int, ...] = (0, 0, 3, 4)) -> SequenceBatch:
    """Training windows of these numbers of inputs; the events of window b before place `context[b]` are no targets."""
    events = make_history(seed, tuple(n + 1 for n in lengths))
    lengths_B, context_B = torch.tensor(lengths), torch.tensor(context)
    places_L = torch.arange(max(lengths))
    real_BL = padding_mask(lengths_B, max(lengths))
    inputs = {name: getattr(events, name)[:, :-1].masked_fill(~real_BL, 0) for name in ("items_BL", "categories_BL", "actions_BL", "times_BL")}
    return SequenceBatch(
        history=History(**inputs, lengths_B=lengths_B),
        targets_BL=events.items_BL[:, 1:].masked_fill(~(real_BL & (places_L + 1 >= context_B.unsqueeze(1))), 0),
        first_targets_B=events.items_BL[:, 0].masked_fill(context_B > 0, 0),
        lengths_B=lengths_B,
        users_B=torch.arange(1, len(lengths) + 1),
    )


def with_garbage(batch: Any, mask: Tensor) -> Any:
    """Every padded place of a History or Candidates holds noise: ids that exist, huge ids, huge numbers, times of centuries away."""
    random = draws(99)
    changed = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if field.name == "lengths_B":
            continue
        huge = torch.rand(value.shape, generator=random) < 0.5
        largest = 10**17 if field.name.startswith("times") else 10**6
        noise = torch.where(huge, torch.randint(1, largest, value.shape, generator=random), torch.randint(1, 6, value.shape, generator=random))
        noise = noise.to(value.dtype)
        changed[field.name] = torch.where(mask.view(*mask.shape, *[1] * (value.ndim - 2)), value, noise)
    return replace(batch, **changed)


def with_padding(batch: Any, more: int) -> Any:
    """`more` padded places at the right."""
    changed = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if field.name != "lengths_B":
            changed[field.name] = torch.cat([value, value.new_zeros(len(value), more, *value.shape[2:])], dim=1)
    return replace(batch, **changed)


def rows(batch: Any, wanted: Tensor | slice) -> Any:
    """Some of the rows of a batch."""
    return replace(batch, **{field.name: getattr(batch, field.name)[wanted] for field in fields(batch)})
