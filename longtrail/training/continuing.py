"""A trained model goes on from newer data: what it knew is kept, and what came since gets sensible starting values. Our choice, not the papers'.

N items before, N' now, D width. Actions are matched by name, items and categories by their keys where the model brings its vocabulary
(longtrail/models/vocabulary.py): ids follow the time of the first event, so one event that comes late moves the ids of all items first seen after it.
Without a vocabulary row i is taken to be the same item in both. There is nothing to do for new users: no model here has a table of them, a user is
their history.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from scipy.sparse import csr_matrix, diags
from torch import Tensor, nn

from longtrail.errors import ModelError
from longtrail.examples import FeatureSet
from longtrail.models.contracts import Grows, Sizes
from longtrail.models.items.recjpq import RecJPQItems
from longtrail.models.store import LoadedModel, ModelCard
from longtrail.models.vocabulary import Vocabulary
from longtrail.training.codes import extend_codes
from longtrail.training.interactions import before_held_out, interaction_matrix, unlabelled_until

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]
# Settings of how a model learns or where it starts: training may go on with others. All else is what the weights mean.
_STEPS = {"learning_rate", "weight_decay", "weight_average", "batch_size", "max_epochs", "patience", "dropout", "max_history"}
_LOSS = {"loss", "negatives", "gbce_t", "gbce_prior", "mask_share", "max_masked", "listwise", "sampled_candidates", "relation_dropout"}
_STARTS = {"item_start", "attention_init", "prior_events", "temperature", "half_life_days"}
LEARNING = frozenset(_STEPS | _LOSS | _STARTS)
LEAST_KNOWN = 0.5  # share of a model's items that must still be there, our choice: with less it is another log


def continue_from(module: nn.Module, features: FeatureSet, previous: LoadedModel, *, seed: int, since: int | None = None) -> None:
    """Give `module`, new and built for `features`, the weights of `previous`, which was trained on an earlier state of the same log.

    Which weights have a row for each item, category or action, the parts say that hold them (longtrail.models.contracts.Grows).

    A new item starts as what the people who touched it had touched before (`neighbour_vectors`), in RecJPQ with the codes that lie nearest to
    that; a new category as the mean of the known ones; a new action as it was built. A ranker's new items start from events that do not tell the
    newer half of the clicks it learns from, from `since` (UTC µs; None: when the first of them came) on: see `unlabelled_until`.

    Raises ModelError naming what does not fit: items, categories or actions that are no longer there, a weight of another shape, or other settings
    (but those in LEARNING).
    """
    card, before, after = previous.card, previous.module.state_dict(), module.state_dict()
    places_N, places_C = _places(previous, features)
    other, strangers = _differences(card.settings, getattr(module, "settings", card.settings)), sorted(before.keys() ^ after.keys())
    if strangers:
        raise ModelError(f"model {card.name}: weight {strangers[0]} is not in both models; expected the settings it was trained with{other}")
    if other:
        raise ModelError(f"model {card.name}: expected the settings it was trained with{other}")
    parts = dict(module.named_modules())
    items, categories = _Rows(places_N, features.sizes.items + 1), _Rows(places_C, features.sizes.categories + 1)
    told, until = features, None
    if card.stage == "ranking" and items.new:
        told = before_held_out(features)
        until = unlabelled_until(told, since=_first_event(told, items.order[items.known :]) if since is None else since)
    matrix_UN = items.columns(interaction_matrix(told, binary=True, until=until))
    grow = {
        "items": lambda rows: items.moved(rows, lambda known: torch.cat([known, neighbour_vectors(known, matrix_UN)])),
        "categories": lambda rows: categories.moved(rows, lambda known: torch.cat([known, _mean(known).expand(categories.new, -1)])),
    }
    grown: dict[str, Tensor] = {}
    for name, tensor in before.items():
        owner, _, leaf = name.rpartition(".")
        part = parts[owner]
        axis = part.axes.get(leaf) if isinstance(part, Grows) else None
        if tensor.shape[1:] != after[name].shape[1:] or (tensor.shape != after[name].shape and axis is None):
            shapes = f"{list(tensor.shape)}; now {list(after[name].shape)}"
            every = _differences(card.settings, getattr(module, "settings", card.settings), may_change=frozenset())
            raise ModelError(f"model {card.name}: weight {name} has shape {shapes}: expected the settings it was trained with{every}")
        if axis is None:
            grown[name] = tensor
        elif axis == "actions":
            places = [0, *(1 + features.actions.index(action) for action in card.actions)]
            grown[name] = after[name].index_copy(0, torch.tensor(places), tensor)
        elif isinstance(part, RecJPQItems):
            counts_UN = items.columns(interaction_matrix(told, binary=card.settings.items.binary, until=until))  # as the first codes were made
            extend = partial(_more_codes, levels_Mb=before[f"{owner}.levels"], matrix_UN=counts_UN, seed=seed)
            grown[name] = items.moved(tensor, extend)
        else:
            grown[name] = grow[axis](tensor)
    module.load_state_dict(grown)
    log.info("continues from %s: %d known and %d new items", card.name, items.known - 1, items.new)


def _first_event(features: FeatureSet, items_n: Ints) -> int | None:
    """When the first of these items was met, UTC µs; None where the training period has none of them."""
    events = features.history.flat(np.arange(1, features.users + 1), features.train_lengths[1:])
    met_E = np.isin(events.items, items_n)
    return int(events.times[met_E].min()) if met_E.any() else None


def _differences(before: Any, after: Any, may_change: frozenset[str] = LEARNING) -> str:
    """ ": positions was 'learned', is 'rotary'" and the like, of slots' settings too; nothing where they agree."""
    found = []
    for name, value in before:
        now = getattr(after, name, None)
        if isinstance(value, BaseModel) and isinstance(now, BaseModel):
            found += [_differences(value, now, may_change).removeprefix(": ")]
        elif value != now and name not in may_change:
            found += [f"{name} was {value!r}, is {now!r}"]
    return f": {text}" if (text := ", ".join(filter(None, found))) else ""


def _more_codes(codes_NM: Tensor, *, levels_Mb: Tensor, matrix_UN: csr_matrix, seed: int) -> Tensor:
    return torch.from_numpy(extend_codes(codes_NM.numpy(), levels_Mb.numpy(), matrix_UN, seed=seed))


class _Rows:
    """Rows of a table of the previous model and of the new one: what is known stands first while new rows are made, then each goes to its place."""

    def __init__(self, places_N: Ints, size: int) -> None:
        """`places` [N + 1] in the new table of `size` rows; -1: no longer there."""
        self.kept = np.flatnonzero(places_N >= 0)
        now = places_N[self.kept]
        self.order = np.concatenate([now, np.setdiff1d(np.arange(size), now)])
        self.known, self.new = len(now), size - len(now)

    def columns(self, matrix_UN: csr_matrix) -> csr_matrix:
        """A matrix by new ids, with known columns first, in the order of the old ids."""
        return matrix_UN if np.array_equal(self.order, np.arange(len(self.order))) else matrix_UN[:, self.order]

    def moved(self, tensor: Tensor, extend: Callable[[Tensor], Tensor]) -> Tensor:
        """The new table, from the old one and from `extend`, which puts new rows behind those still known."""
        rows = extend(tensor[torch.from_numpy(self.kept)])
        return torch.empty_like(rows).index_copy_(0, torch.from_numpy(self.order), rows)


def neighbour_vectors(known_ND: Tensor, matrix_UN: csr_matrix) -> Tensor:
    """[N' - N, D] for the items after the first N of `known_ND` [N + 1, D], from the interactions [U, N' + 1].

    The mean over an item's users of the mean of the known items that each touched, scaled as a whole to the known items' root mean square, since
    means of means are short. The mean item where no user is known.
    """
    N1 = len(known_ND)
    known = known_ND.double().numpy()
    past_UN, new_Un = matrix_UN[:, :N1], matrix_UN[:, N1:]
    mean_UD = diags(1 / np.maximum(np.asarray(past_UN.sum(1)).ravel(), 1)) @ (past_UN @ known)
    knowing_U = np.asarray(past_UN.sum(1)).ravel() > 0
    users_n = np.asarray(new_Un.T @ knowing_U.astype(np.float64))
    vectors_nD = (new_Un.T @ mean_UD) / np.maximum(users_n, 1)[:, None]
    reached = users_n > 0
    if reached.any():
        vectors_nD *= np.sqrt((known[1:] ** 2).mean()) / max(float(np.sqrt((vectors_nD[reached] ** 2).mean())), 1e-12)
    vectors_nD[~reached] = _mean(known_ND.double()).numpy()
    return torch.from_numpy(vectors_nD).to(known_ND.dtype)


def _mean(known_ND: Tensor) -> Tensor:
    """[D]: of the rows but padding's; zeros where there is none."""
    return known_ND[1:].sum(0) / max(1, len(known_ND) - 1)


def _places(previous: LoadedModel, features: FeatureSet) -> tuple[Ints, Ints]:
    """Where the previous model's items [N + 1] and categories [C + 1] stand now."""
    card, sizes = previous.card, features.sizes
    lost = [action for action in card.actions if action not in features.actions]
    if lost:
        raise ModelError(f"model {card.name}: knows the action {lost[0]!r}, which the data has not; expected a later state of the log it learnt from")
    if previous.vocabulary is None:
        _check_sizes(card, sizes)
        return np.arange(card.sizes.items + 1), np.arange(card.sizes.categories + 1)
    found = len(previous.vocabulary.items), len(previous.vocabulary.categories)
    if found != (card.sizes.items, card.sizes.categories):
        held = f"{card.sizes.items} items and {card.sizes.categories} categories"
        raise ModelError(f"model {card.name}: its vocabulary has {found[0]} items and {found[1]} categories; its card says {held}")
    places_N, places_C = previous.vocabulary.places_in(Vocabulary.read(features.folder / "catalogue.parquet"))
    still = int((places_N[1:] >= 0).sum())
    if still < LEAST_KNOWN * card.sizes.items:
        raise ModelError(
            f"model {card.name}: {still} of its {card.sizes.items} items are in the data: expected a later state of the log it learnt from"
        )
    moved = int((places_N != np.arange(len(places_N))).sum())
    if moved:
        log.info("%s: %d items have other ids now, %d of them are gone", card.name, moved, card.sizes.items - still)
    return places_N, places_C


def _check_sizes(card: ModelCard, sizes: Sizes) -> None:
    for field in ("items", "categories"):
        held, given = getattr(card.sizes, field), getattr(sizes, field)
        if held > given:
            raise ModelError(f"model {card.name}: {held} {field}; the data has {given}: expected a later state of the log it learnt from")
