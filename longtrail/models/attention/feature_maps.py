"""Feature maps φ of linear attention (linear.py). B users, L history, D width, F features of a head, X features of all heads.

Published elsewhere: elu1, `efficient` and `linrec`, each with its source below. Ours: `shares`, and `clusters`, φ(x) = softmax(t (x · c_f / |x| +
b_f)), which says to which of F clusters of directions x belongs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_FLOOR = 1e-2  # of the relu maps, ours: a candidate unlike every behaviour reads their mean and not 0 / 0
_LARGEST = 30.0  # exponent of `efficient`, ours: in place of a running maximum, with which states would no longer just add


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """φ of keys and of queries, both [..., F] → [..., F], and what the read is divided by.

    "sum": φ(q)ᵀz, so that weights are not negative and add up to 1; "prior": φ(q)ᵀz + p, p learned, so that they add up to less; "feature": each
    feature of A by its own z; "none": sqrt(F), and weights may be negative and grow with L. `slopes`, of keys, where it is quick: the gradient by
    the argument, given φ and the gradient by φ, which may be overwritten. `clusters`: φ is given x · c / |x| + b in place of x · c.
    """

    keys: Callable[[Tensor], Tensor]
    queries: Callable[[Tensor], Tensor]
    divide: str = "sum"
    slopes: Callable[[Tensor, Tensor], Tensor] | None = None
    clusters: bool = False
    compiled: bool = False  # whether linear_layer.py knows it


def _elu1(x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return functional.elu(x) + 1
    return x.clamp(max=0).exp_().add_(x.clamp(min=0))  # the same in three quarters of the time, and small values are not multiples of 6e-8


def _elu1_slopes(features: Tensor, gradient: Tensor) -> Tensor:
    return gradient.mul_(features.clamp(max=1))


def _relu(x: Tensor) -> Tensor:
    return functional.relu(x) + _FLOOR


def _squared_relu(x: Tensor) -> Tensor:
    return functional.relu(x).square() + _FLOOR


def _shares(x: Tensor) -> Tensor:
    return x.softmax(-1)


def _shares_slopes(features: Tensor, gradient: Tensor) -> Tensor:
    return gradient.sub_((features * gradient).sum(-1, keepdim=True)).mul_(features)


def _exponential(x: Tensor) -> Tensor:
    return x.clamp(max=_LARGEST).exp()


def _unit_elu(x: Tensor) -> Tensor:
    return functional.normalize(functional.elu(x), dim=-1)


FEATURE_MAPS = {
    "elu1": FeatureMap(keys=_elu1, queries=_elu1, slopes=_elu1_slopes, compiled=True),  # Katharopoulos et al., ICML 2020
    "relu": FeatureMap(keys=_relu, queries=_relu),
    "squared_relu": FeatureMap(keys=_squared_relu, queries=_squared_relu),
    # ours: soft membership in F clusters; a query reads the means of its own
    "shares": FeatureMap(keys=_shares, queries=_shares, slopes=_shares_slopes, compiled=True),
    "clusters": FeatureMap(keys=_shares, queries=_shares, divide="prior", slopes=_shares_slopes, clusters=True, compiled=True),  # ours
    "efficient": FeatureMap(keys=_exponential, queries=_shares, divide="feature"),  # Shen et al., WACV 2021: keys' softmax is over places
    "linrec": FeatureMap(keys=_unit_elu, queries=_unit_elu, divide="none"),  # Liu et al., SIGIR 2023, as in its code
}


def inner(x_BLD: Tensor, weights_DX: Tensor, bias_X: Tensor | None) -> Tensor:
    """What φ is given: x W, or with a bias x W / |x| + b."""
    inner_BLX = x_BLD @ weights_DX
    return inner_BLX if bias_X is None else inner_BLX * over_length(x_BLD) + bias_X


def over_length(x_BLD: Tensor) -> Tensor:
    """1 / |x| [B, L, 1]; of vectors shorter than 1e-3, less."""
    return torch.rsqrt(torch.linalg.vector_norm(x_BLD, dim=-1, keepdim=True).square() + 1e-6)
