"""Memory by length as in the one figure of SAM's authors: linear, and SAM's share of DIN's near their 1.44 / 1.037 at L = 1,000."""

import pytest

from benchmarks.sam_memory import table
from longtrail.models.attention import fused


def test_memory_has_the_shape_of_the_authors_figure() -> None:
    """By torch, where every pass keeps its hidden layer. Compiled code keeps none, and less is held."""
    before = fused.COMPILED_PAIRS
    found = table(64, (500, 1000))
    assert before == fused.COMPILED_PAIRS
    (din_500, din), (sam_500, sam) = found["DIN, torch"], found["SAM 3P, torch"]
    assert sam / din == pytest.approx(1.44 / 1.037, abs=0.15)
    assert 1.8 < din / din_500 < 2.1 and 1.8 < sam / sam_500 < 2.1
    assert found["SAM 3P, compiled"][1] < 0.7 * sam and found["DIN, compiled"][1] < din
