"""Rotary positions (Su et al., 2021, arXiv 2104.09864). L places, d head width."""

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10_000.0


def rotate(x_BLHd: Tensor, *, theta: float = THETA) -> Tensor:
    """[B, L, H, d], d even: the pair (2j, 2j + 1) at place t turned counter-clockwise by t · theta^(-2j / d), places counted from 0."""
    L, d = x_BLHd.shape[1], x_BLHd.shape[3]
    pairs = torch.view_as_complex(x_BLHd.unflatten(3, (d // 2, 2)))
    turns_Ld = turns(L, d, theta, pairs.dtype, x_BLHd.device)
    return torch.view_as_real(pairs * turns_Ld.unsqueeze(1)).flatten(3)


def turns(L: int, d: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Unit complex numbers [L, d / 2]: what the pairs of place t are multiplied by."""
    return _turns(1 << (L - 1).bit_length(), d, theta, dtype, device)[:L]


@lru_cache(maxsize=8)
def _turns(places: int, d: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The angles are taken in float64, so that late places are as exact as early ones."""
    with torch.inference_mode(mode=False):  # else the first caller's mode would stick to the kept tensor
        speeds = theta ** (-torch.arange(0, d, 2, dtype=torch.float64, device=device) / d)
        angles = torch.arange(places, dtype=torch.float64, device=device).unsqueeze(1) * speeds
        return torch.polar(torch.ones_like(angles), angles).to(dtype)
