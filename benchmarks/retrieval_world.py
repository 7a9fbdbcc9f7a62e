"""Codes and scores as training makes them, at a million items, for benchmarks/retrieval.py: scores of random codes do not prune.

The log is a light generator's, not longtrail.datasets.world's, which is made for truth and not for size: items stand in clusters with Zipf popularity
within each, a user walks between a few clusters. The codes are those of longtrail.training.codes (truncated SVD), the items RecJPQItems, the encoder
the mean of the history's item vectors through one linear layer, the loss a sampled softmax. N items, U users, L history, D width, M splits.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from tqdm import tqdm

from longtrail.files import atomic_file
from longtrail.models.items.recjpq import RecJPQItems
from longtrail.training.codes import assign, svd_components

log = logging.getLogger(__name__)
CLUSTERS, INTERESTS, LENGTH, HELD_OUT = 2000, 3, 24, 512


def sequences(items: int, users: int, seed: int) -> NDArray[np.int64]:
    """[U, L] item ids."""
    rng = np.random.default_rng(seed)
    size = items // CLUSTERS
    chance = 1 / np.arange(1, size + 1) ** 0.9
    cumulated = np.cumsum(chance / chance.sum())
    own = rng.zipf(1.2, size=(users, INTERESTS)) % CLUSTERS
    cluster_UL = np.take_along_axis(own, rng.integers(0, INTERESTS, size=(users, LENGTH)), 1)
    place_UL = np.minimum(np.searchsorted(cumulated, rng.random((users, LENGTH))), size - 1)
    return 1 + rng.permutation(CLUSTERS * size)[cluster_UL * size + place_UL]


class MeanPooling(nn.Module):
    def __init__(self, items: RecJPQItems) -> None:
        super().__init__()
        self.items, self.map = items, nn.Linear(items.width, items.width)
        nn.init.eye_(self.map.weight)

    def forward(self, history_BL: Tensor) -> Tensor:
        return self.map(self.items.embed(history_BL).mean(1))


def trained(folder: Path, *, items: int, width: int, splits: int, users: int = 120_000, steps: int = 1500) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [N + 1, M], centroids [M, 256, D / M], vectors of users that were not trained on [512, D]); kept in `folder` for the next run."""
    path = folder / f"trained-{items}-{width}-{splits}-{steps}.safetensors"
    if not path.is_file():
        with atomic_file(path) as aside:
            save_file(_train(items, width, splits, users, steps), aside)
    kept = load_file(path)
    return kept["codes"], kept["centroids"], kept["users"]


def _train(items: int, width: int, splits: int, users: int, steps: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    log_UL = sequences(items, users, 0)
    seen_UL = log_UL[HELD_OUT:]
    matrix_UN = csr_matrix((np.ones(seen_UL.size), (np.repeat(np.arange(len(seen_UL)), LENGTH), seen_UL.ravel() - 1)), shape=(len(seen_UL), items))
    assigned = assign(svd_components(matrix_UN, splits, seed=0), splits, 256, seed=0)
    layer = RecJPQItems(items, width, splits=splits, std=0.05)
    layer.set_codes(torch.from_numpy(assigned.codes_NM), torch.from_numpy(assigned.levels_Mb))
    model = MeanPooling(layer)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    events = torch.from_numpy(seen_UL)
    frequency_N = torch.bincount(events.ravel(), minlength=items + 1).float().clamp(min=1)
    for _ in tqdm(range(steps), desc="train", unit="step", mininterval=10):
        batch_BL = events[torch.randint(len(events), (384,))]
        user_BD, targets_B = model(batch_BL[:, :-1]), batch_BL[:, -1]
        uniform = torch.randint(1, items + 1, (640,))
        drawn = torch.cat([targets_B, uniform])
        logits = user_BD @ layer.embed(drawn).T - torch.cat([frequency_N[targets_B].log() * 0.5, torch.zeros(640)])
        logits[:, :384].masked_fill_((targets_B[None] == targets_B[:, None]) & ~torch.eye(384, dtype=torch.bool), -torch.inf)
        loss = nn.functional.cross_entropy(logits, torch.arange(384))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    log.info("trained %d steps: loss %.3f", steps, float(loss.detach()))
    with torch.no_grad():
        held_out = model(torch.from_numpy(log_UL[:HELD_OUT, :-1]))
    return {"codes": layer.codes.contiguous(), "centroids": layer.centroids.detach().contiguous(), "users": held_out.contiguous()}
