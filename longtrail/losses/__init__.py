"""What models minimise.

Losses are means over real things: padding has no say in them, and an empty batch costs 0. They are taken in float32 or float64, never lower.
"""

from longtrail.losses.lambdarank import lambdarank_loss
from longtrail.losses.next_item import mean_over, next_item_loss
from longtrail.losses.ranking import ranking_loss
from longtrail.losses.sampled import bce_loss, gbce, gbce_loss, sampled_softmax_loss
from longtrail.losses.softmax import softmax_loss

__all__ = ["bce_loss", "gbce", "gbce_loss", "lambdarank_loss", "mean_over", "next_item_loss", "ranking_loss", "sampled_softmax_loss", "softmax_loss"]
