"""Small catalogues of codes, with their vectors, for the tests of every engine. N items, M splits, b sub-ids, E width of a split, B users."""

import numpy as np
import torch
from torch import Tensor

from longtrail.retrieval.index import Exclusion

SHAPES = ("random", "peaked", "flat", "tied", "few values")


def catalogue(rng: np.random.Generator, items: int, splits: int, codes: int, shape: str, width: int = 2) -> tuple[Tensor, Tensor]:
    """(codes [N + 1, M], centroids [M, b, E]) whose products with small integers are exact in float32."""
    codes_NM = rng.integers(0, codes, size=(items + 1, splits), dtype=np.uint8)
    if shape == "peaked":
        centroids = np.rint(rng.standard_normal((splits, codes, width)) ** 5)
    elif shape == "flat":
        centroids = 100 + rng.integers(0, 2, size=(splits, codes, width))
    elif shape == "tied":
        centroids = np.ones((splits, codes, width))
    elif shape == "few values":
        centroids = rng.integers(-1, 2, size=(splits, codes, width))
    else:
        centroids = rng.integers(-50, 51, size=(splits, codes, width))
    return torch.from_numpy(codes_NM), torch.from_numpy(centroids.astype(np.float32)).clamp(-2000, 2000)


def vectors(codes_NM: Tensor, centroids: Tensor) -> Tensor:
    """[N + 1, M E]; row 0 zeros."""
    rows = torch.cat([centroids[k][codes_NM[:, k].long()] for k in range(len(centroids))], 1)
    rows[0] = 0
    return rows


def users(rng: np.random.Generator, count: int, width: int) -> Tensor:
    return torch.from_numpy(rng.integers(-3, 4, size=(count, width)).astype(np.float32))


def exclusions(rng: np.random.Generator, count: int, items: int) -> Exclusion:
    """From none to nearly all, with repeats, zeros, negative and unknown ids."""
    sizes = rng.choice([0, 1, items // 2, 2 * items], size=count)
    return Exclusion(np.concatenate([[0], np.cumsum(sizes)]), rng.integers(-3, items + 3, size=int(sizes.sum())))
