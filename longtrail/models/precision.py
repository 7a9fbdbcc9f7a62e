"""Half precision is for matrix products; losses, and what is added up over a long history, are taken in float32, whatever autocast says."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, in float32 where it is of half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of `x` is to be taken: autocast's where autocast is on, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype
