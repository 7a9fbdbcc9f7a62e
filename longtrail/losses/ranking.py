"""What rankers minimise. B requests, C candidates."""

import torch
from torch import Tensor
from torch.nn import functional

from longtrail.models.masks import padding_mask
from longtrail.models.precision import at_least_float32


def ranking_loss(logits_BC: Tensor, clicks_BC: Tensor, lengths_B: Tensor, *, exposed_BC: Tensor | None = None, listwise: float = 0.0) -> Tensor:
    """Mean binary cross-entropy over the exposed candidates, plus `listwise` times `listwise_loss` over the whole sets.

    `exposed_BC` marks what was shown and so has a label; None: every real candidate was. What stands in padded places, NaN even, changes
    neither loss nor gradient. With `listwise` 0 this is plain cross-entropy. IFA's authors name a loss consistent between training and serving
    but published none: this one is a reconstruction.
    """
    real_BC = padding_mask(lengths_B, logits_BC.shape[1])
    exposed_BC = real_BC if exposed_BC is None else exposed_BC & real_BC
    logits_BC = at_least_float32(logits_BC).masked_fill(~real_BC, 0)
    losses_BC = functional.binary_cross_entropy_with_logits(logits_BC, clicks_BC.to(logits_BC.dtype), reduction="none")
    loss = losses_BC.masked_fill(~exposed_BC, 0).sum() / exposed_BC.sum().clamp(min=1)
    return loss + listwise * listwise_loss(logits_BC, clicks_BC, lengths_B, exposed_BC=exposed_BC) if listwise else loss


def listwise_loss(logits_BC: Tensor, clicks_BC: Tensor, lengths_B: Tensor, *, exposed_BC: Tensor | None = None) -> Tensor:
    """Mean over the clicks of -log softmax(logits of the request's real candidates)[clicked]; 0 where nothing was clicked.

    Candidates that were not exposed are weak negatives: they stand in the softmax, and a label they may carry is not read.
    """
    real_BC = padding_mask(lengths_B, logits_BC.shape[1])
    clicked_BC = (clicks_BC > 0) & (real_BC if exposed_BC is None else exposed_BC & real_BC)
    logits_BC = at_least_float32(logits_BC)
    # A finite floor: an all-padding row is then uniform and left out, not NaN.
    shares_BC = logits_BC.masked_fill(~real_BC, torch.finfo(logits_BC.dtype).min).log_softmax(-1)
    return -shares_BC.masked_fill(~clicked_BC, 0).sum() / clicked_BC.sum().clamp(min=1)
