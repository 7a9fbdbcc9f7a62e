"""Draws the pictures of docs/models again: `python -m docs.images.models.draw`, from the root of the repository."""

from collections.abc import Callable
from pathlib import Path

from docs.images.models import ranking, retrieval
from docs.images.models.picture import Picture

PICTURES: dict[str, Callable[[], Picture]] = {
    make.__name__: make
    for make in (
        *(retrieval.popularity, retrieval.markov, retrieval.sasrec, retrieval.gsasrec, retrieval.bert4rec, retrieval.gru4rec),
        *(retrieval.blossom, retrieval.recjpq, retrieval.losses),
        *(ranking.mean_pooling, ranking.din, ranking.dien, ranking.sim, ranking.eta, ranking.twin, ranking.sdim, ranking.sam, ranking.ifa),
    )
}


def main(folder: Path) -> None:
    for name, make in PICTURES.items():
        make().save(folder / f"{name}.svg")


if __name__ == "__main__":
    main(Path(__file__).parent)
