"""A trained model goes on from newer data: what it knew is kept, and what came since gets sensible starting values. Our choice, not the papers'.

N items before, N' now, D width. Ids are only ever appended, so row i is the same item, category or user in both; actions are matched by name.
There is nothing to do for new users: no model here has a table of them, a user is their history.
"""

import logging

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags
from torch import Tensor, nn

from longtrail.errors import ModelError
from longtrail.examples import FeatureSet
from longtrail.models.contracts import Sizes
from longtrail.models.items.dense import DenseItems
from longtrail.models.items.recjpq import RecJPQItems
from longtrail.models.store import LoadedModel, ModelCard
from longtrail.training.codes import extend_codes
from longtrail.training.interactions import interaction_matrix

log = logging.getLogger(__name__)


def continue_from(module: nn.Module, features: FeatureSet, previous: LoadedModel, *, seed: int) -> None:
    """Give `module`, new and built for `features`, the weights of `previous`, which was trained on an earlier state of the same log.

    A new item starts as what the people who touched it had touched before (`neighbour_vectors`), in RecJPQ with the codes that lie nearest to
    that; a new category as the mean of the known ones; a new action as it was built. Raises ModelError naming what does not fit: fewer
    items, categories or actions than before, or a weight of another shape.
    """
    card, before, after = previous.card, previous.module.state_dict(), module.state_dict()
    _check(card, features.sizes, features.actions)
    strangers = sorted(before.keys() ^ after.keys())
    if strangers:
        raise ModelError(f"model {card.name}: weight {strangers[0]} is not in both models; expected the settings it was trained with")
    parts = dict(module.named_modules())
    matrix_UN = interaction_matrix(features, binary=True)
    grown: dict[str, Tensor] = {}
    for name, tensor in before.items():
        owner, _, leaf = name.rpartition(".")
        more, slot = len(after[name]) - len(tensor) if tensor.ndim else 0, owner.rpartition(".")[2]
        if leaf == "actions" and tensor.shape[1:] == after[name].shape[1:]:
            places = [0, *(1 + features.actions.index(action) for action in card.actions)]
            grown[name] = after[name].index_copy(0, torch.tensor(places), tensor)
        elif tensor.shape == after[name].shape:
            grown[name] = tensor
        elif tensor.ndim == 0 or more < 0 or tensor.shape[1:] != after[name].shape[1:] or not isinstance(parts[owner], DenseItems | RecJPQItems):
            shapes = f"{list(tensor.shape)}; now {list(after[name].shape)}"
            raise ModelError(f"model {card.name}: weight {name} has shape {shapes}: expected the settings it was trained with")
        elif leaf == "codes":
            counts_UN = interaction_matrix(features, binary=card.settings.items.binary)  # as the first codes were made
            codes_NM = extend_codes(tensor.numpy(), before[f"{owner}.levels"].numpy(), counts_UN, seed=seed)
            grown[name] = torch.from_numpy(codes_NM)
        else:
            rows = neighbour_vectors(tensor, matrix_UN) if slot == "items" else tensor[1:].mean(0, keepdim=True).expand(more, -1)
            grown[name] = torch.cat([tensor, rows])
    module.load_state_dict(grown)
    log.info("continues from %s: %d known and %d new items", card.name, card.sizes.items, features.sizes.items - card.sizes.items)


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
    vectors_nD[~reached] = known[1:].mean(0)
    return torch.from_numpy(vectors_nD).to(known_ND.dtype)


def _check(card: ModelCard, sizes: Sizes, actions: tuple[str, ...]) -> None:
    lost = [action for action in card.actions if action not in actions]
    if lost:
        raise ModelError(f"model {card.name}: knows the action {lost[0]!r}, which the data has not; expected a later state of the log it learnt from")
    for field in ("items", "categories"):
        held, given = getattr(card.sizes, field), getattr(sizes, field)
        if held > given:
            raise ModelError(f"model {card.name}: {held} {field}; the data has {given}: expected a later state of the log it learnt from")
