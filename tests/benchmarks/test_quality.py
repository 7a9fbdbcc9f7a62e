"""The quality board: its files say what the code understands; expected sampled metrics are the average of drawn ones; a table makes nothing up."""

import numpy as np
import pytest

from benchmarks.quality.board import cells, load_boards
from benchmarks.quality.sampled import sampled_metrics
from benchmarks.quality.table import markdown, summary
from longtrail.errors import ConfigError


def test_every_board_is_understood_and_every_model_has_a_seed_before_any_has_two() -> None:
    boards = load_boards()
    order = list(cells(boards, None, 3))
    assert len(set(order)) == len(order) == 3 * sum(len(board.models) for board in boards.values())
    assert [cell.seed for cell in order] == sorted(cell.seed for cell in order)
    with pytest.raises(ConfigError, match="no such board"):
        load_boards(["none"])


def test_the_expectation_is_the_mean_of_draws() -> None:
    rng = np.random.default_rng(0)
    ranks, others = np.array([1, 5, 60, 0]), np.array([500, 500, 200, 500])
    found = sampled_metrics(ranks, others, 10)
    draws = 20_000
    share = np.where(ranks > 0, (ranks - 1) / others, 1.0)
    above = rng.binomial(100, np.broadcast_to(share, (draws, 4)))
    hit = above < 10
    assert found["uni100_recall@10"] == pytest.approx(hit.mean(), abs=0.01)
    assert found["uni100_ndcg@10"] == pytest.approx((hit / np.log2(above + 2)).mean(), abs=0.01)


def test_a_table_holds_what_was_run_and_says_what_was_not() -> None:
    board = load_boards(["beauty-next-item"])["beauty-next-item"]

    def cell(model: str, seed: int, value: float) -> dict[str, object]:
        metrics = {"ndcg@10": value, "recall@10": 2 * value}
        return {"board": "beauty-next-item", "model": model, "seed": seed, "metrics": metrics, "train_cpu_seconds": 60.0, "state_bytes": 1_000_000}

    found = [cell("markov", 0, 0.03), cell("sasrec", 0, 0.05), cell("sasrec", 1, 0.07), cell("popular_items", 0, 0.01)]
    rows = summary("beauty-next-item", board, found)
    assert rows["sasrec"]["metrics"]["ndcg@10"] == pytest.approx({"mean": 0.06, "std": np.sqrt(2e-4)})
    assert (rows["sasrec"]["learnt"], rows["popular_items"]["learnt"], rows["markov"]["learnt"]) == (True, False, None)
    text = markdown(board, rows)
    missing = ", ".join(name for name in board.models if name not in {c["model"] for c in found})
    assert "blossom" in missing
    assert "0.0600 ± 0.0141" in text and f"Not run: {missing}." in text and text.count("has learnt nothing") == 1
