"""Who computes which examples of a step: its batch is cut over the processes, and each process's share over the pieces that it takes one by one.

Which examples a step has is a pure function of (seed, epoch, step). Neither the number of processes nor that of pieces changes it, so a training
may be resumed with others, in the middle of an epoch too, and sees every example once. What is drawn for an example (sampled candidates, negatives,
masks, dropout) does change with them: docs/training.md.
"""

from collections.abc import Iterator
from typing import Any, Protocol, Self


class Batches(Protocol):
    """A data source whose order is a pure function of its seed and the epoch."""

    def __len__(self) -> int:
        """Steps an epoch."""
        ...

    def set_epoch(self, epoch: int) -> None: ...

    def piece(self, index: int, piece: int, pieces: int) -> Any:
        """Every `pieces`-th example of step `index`, from the `piece`-th on; a blank batch, which weighs nothing, where there is none."""
        ...


class Pieces:
    """A process's pieces of each step of an epoch, `accumulate` of them a step, from `first_step` on; later epochs are whole.

    All processes get the same number of pieces.
    """

    def __init__(self, batches: Batches, *, accumulate: int = 1, first_step: int = 0) -> None:
        self.batches, self.accumulate, self.first_step = batches, accumulate, first_step
        self.rank, self.world = 0, 1

    def of(self, rank: int, world: int) -> Self:
        """Those of process `rank` of `world`."""
        self.rank, self.world = rank, world
        return self

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)
        self.first_step = 0

    @property
    def steps(self) -> int:
        """Of a whole epoch."""
        return len(self.batches)

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[Any]:
        first, pieces = self.rank * self.accumulate, self.world * self.accumulate
        for step in range(self.first_step, self.steps):
            for own in range(first, first + self.accumulate):
                yield self.batches.piece(step, own, pieces)
