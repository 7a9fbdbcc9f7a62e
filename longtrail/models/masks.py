"""The only maker of masks. B rows, L places."""

import torch
from torch import Tensor


def padding_mask(lengths_B: Tensor, places: int) -> Tensor:
    """bool [B, L], True where something real stands: the first `lengths_B[b]` of `places` places (everything is right-padded)."""
    return torch.arange(places, device=lengths_B.device) < lengths_B.unsqueeze(-1)
