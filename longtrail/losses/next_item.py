"""Which loss a retriever is trained with, by its settings."""

from collections.abc import Callable

from torch import Tensor

from longtrail.config.retrieval_models import EncoderSettings
from longtrail.losses.lambdarank import lambdarank_loss
from longtrail.losses.sampled import bce_loss, gbce_loss, sampled_softmax_loss
from longtrail.losses.softmax import softmax_loss
from longtrail.models.contracts import ItemEmbedding, Pairs

Loss = Callable[[Pairs, ItemEmbedding, EncoderSettings], Tensor]

LOSSES: dict[str, Loss] = {
    "softmax": lambda pairs, items, _: softmax_loss(pairs.states_TD, items.vectors(), pairs.targets_T),
    "sampled_softmax": lambda pairs, items, s: sampled_softmax_loss(pairs.states_TD, items, pairs.targets_T, negatives=s.negatives),
    "gbce": lambda pairs, items, s: gbce_loss(pairs.states_TD, items, pairs.targets_T, negatives=s.negatives, t=s.gbce_t, prior=s.gbce_prior),
    "bce": lambda pairs, items, _: bce_loss(pairs.states_TD, items, pairs.targets_T),
    "lambdarank": lambda pairs, items, _: lambdarank_loss(pairs.states_TD, items.vectors(), pairs.targets_T, pairs.windows_T),
}


def mean_over(pairs: Pairs, settings: EncoderSettings) -> int:
    """How many things `next_item_loss` is the mean of: windows with a target for LambdaRank, which makes a list of each; else targets."""
    if settings.loss != "lambdarank" or len(pairs.windows_T) == 0:
        return len(pairs.targets_T)
    return 1 + int(pairs.windows_T.diff().count_nonzero())


def next_item_loss(pairs: Pairs, items: ItemEmbedding, settings: EncoderSettings) -> Tensor:
    """The loss that `settings.loss` names, of what an encoder's `training_pairs` gave."""
    return LOSSES[settings.loss](pairs, items, settings)
