"""From settings to the item slot of a model."""

from torch import nn

from longtrail.config import DenseItemsSettings, ItemsSettings, RecJPQItemsSettings
from longtrail.errors import ModelError
from longtrail.models.items.dense import DenseItems
from longtrail.models.items.recjpq import RecJPQItems


def make_items(settings: ItemsSettings, items: int, width: int, *, std: float) -> DenseItems | RecJPQItems:
    """The ItemEmbedding of `settings` for ids 1..`items`, with fresh weights of spread `std` from torch's global generator.

    Raises ValueError where pieces are concatenated and `width` is not divisible by the splits, ModelError for settings that it does not know.
    """
    if isinstance(settings, RecJPQItemsSettings):
        return RecJPQItems(items, width, splits=settings.splits, codes=settings.codes, composition=settings.composition, std=std)
    if isinstance(settings, DenseItemsSettings):
        return DenseItems(items, width, std=std)
    raise ModelError(f"no table of items of {type(settings).__name__}; expected it in make_items ({__name__})")


def item_slots(module: nn.Module) -> list[RecJPQItems]:
    """The RecJPQ layers of a model, wherever they stand in it: usually one, or none."""
    return [part for part in module.modules() if isinstance(part, RecJPQItems)]
