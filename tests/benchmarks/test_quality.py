"""The quality board: its files say what the code understands; expected sampled metrics are the average of drawn ones; a table makes nothing up."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from benchmarks.quality import __main__ as main_module
from benchmarks.quality import board as boards_module
from benchmarks.quality.board import Board, cells, load_boards
from benchmarks.quality.picture import curves_by_length, save_picture
from benchmarks.quality.prepare import features_digest
from benchmarks.quality.record import read_cells, to_run, with_tables, write_results
from benchmarks.quality.sampled import sampled_metrics
from benchmarks.quality.table import OTHERWISE, markdown, summary
from longtrail.errors import ConfigError
from longtrail.files import write_json


def test_every_board_is_understood_and_every_model_has_a_seed_before_any_has_two() -> None:
    boards = load_boards()
    order = list(cells(boards, None, 3))
    assert len(set(order)) == len(order) == 3 * sum(len(board.models) for board in boards.values())
    assert [cell.seed for cell in order] == sorted(cell.seed for cell in order)
    with pytest.raises(ConfigError, match="no such board"):
        load_boards(["none"])


def test_pieces_of_a_step_leave_cells_as_they_are_and_name_models_of_the_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, board: Board) -> None:
    text = (boards_module.BOARDS / "beauty-next-item.yaml").read_text(encoding="utf-8")
    monkeypatch.setattr(boards_module, "BOARDS", tmp_path)
    (tmp_path / "beauty-next-item.yaml").write_text(text + "\npieces: {sasrec: 4}\n", encoding="utf-8")
    cut = load_boards()["beauty-next-item"]
    assert cut.pieces == {"sasrec": 4} and cut.is_current(a_cell(board, "sasrec", 0, 0.1))
    (tmp_path / "beauty-next-item.yaml").write_text(text + "\npieces: {sasrek: 4}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="'sasrek' is not one of its models"):
        load_boards()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("metrics: [ndgc@10]", "'ndgc@10' is not measured; expected one of ndcg@10, recall@10, mrr, coverage@10, uni100_ndcg@10, uni100_recall@10"),
        ("metrics: [ndcg@20]", "'ndcg@20' is not measured"),
        ("metrics: [auc]", "'auc' is not measured"),
        ("metrics: [mrr]\npublished: {markov: {hit@10: 0.1}}", "'hit@10' is not measured"),
    ],
)
def test_a_metric_that_no_cell_has_is_refused(metrics: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards_module, "BOARDS", tmp_path)
    text = "title: t\nabout: a\ndataset: {kind: world}\nsplit: {}\nbaseline: markov\nmodels: {markov: {stage: retrieval, kind: markov}}\n"
    (tmp_path / "mine.yaml").write_text(text + metrics, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(f"mine.yaml: {message}")):
        load_boards()


def test_a_model_that_no_board_has_is_refused(board: Board) -> None:
    with pytest.raises(ConfigError, match="--model sasrek: no model of mine; expected one of popular_items, "):
        list(cells({"mine": board}, ["sasrek"], 1))


@pytest.mark.parametrize("code", [0, 1, None])
def test_a_failed_cell_is_a_failed_run(code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None: no time was left for it."""
    monkeypatch.setattr(main_module, "_run", lambda *_, **__: code)
    arguments = {"board": ["beauty-next-item"], "model": ["markov"], "seeds": 1, "workers": 1, "minutes": None, "data": tmp_path, "page": None}

    def run() -> None:
        main_module.quality(**arguments, work=tmp_path / "work", results=tmp_path / "quality.json")  # type: ignore[arg-type]

    if code == 1:
        with pytest.raises(typer.Exit):
            run()
    else:
        run()


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


def a_cell(board: Board, model: str, seed: int, value: float, **other: object) -> dict[str, Any]:
    return {
        "board": "beauty-next-item", "model": model, "seed": seed, "metrics": {"ndcg@10": value, "recall@10": 2 * value},
        "commit": "1" * 40 + "-dirty",
        "settings": board.models[model].model_dump(mode="json"), "protocol": board.protocol, "best_epoch": 3, "epochs": 5,
        "train_cpu_seconds": 60.0, "state_bytes": 1_000_000, "peak_memory_bytes": 2_000_000, "resumed": False, **other,
    }  # fmt: skip


@pytest.fixture
def board() -> Board:
    return load_boards(["beauty-next-item"])["beauty-next-item"]


def test_a_table_holds_what_was_run_and_says_what_was_not(board: Board) -> None:
    runs = [("markov", 0, 0.03), ("sasrec", 0, 0.05), ("sasrec", 1, 0.07), ("popular_items", 0, 0.01)]
    rows = summary("beauty-next-item", board, found := [a_cell(board, *run) for run in runs])
    assert rows["sasrec"]["metrics"]["ndcg@10"] == pytest.approx({"mean": 0.06, "std": np.sqrt(2e-4)})
    assert (rows["sasrec"]["learnt"], rows["popular_items"]["learnt"], rows["markov"]["learnt"]) == (True, False, None)
    text = markdown(board, rows)
    missing = ", ".join(name for name in board.models if name not in {c["model"] for c in found})
    assert "blossom" in missing
    assert "0.0600 ± 0.0141" in text and f"Not run: {missing}." in text and text.count("has learnt nothing") == 1 and OTHERWISE not in text


def test_cells_of_other_settings_are_never_averaged_with_the_boards_own_and_are_marked(board: Board) -> None:
    older = {**board.models["sasrec"].model_dump(mode="json"), "learning_rate": 0.5}
    cells = [a_cell(board, "sasrec", 0, 0.01, settings=older), a_cell(board, "sasrec", 1, 0.02, settings={**older, "width": 8})]
    cells.append(a_cell(board, "sasrec", 2, 0.07))
    both = summary("beauty-next-item", board, cells)["sasrec"]
    assert (both["seeds"], both["current"], both["metrics"]["ndcg@10"]["mean"]) == (1, True, 0.07)
    rows = summary("beauty-next-item", board, cells[:2])
    assert (rows["sasrec"]["seeds"], rows["sasrec"]["current"], rows["sasrec"]["metrics"]["ndcg@10"]["mean"]) == (1, False, 0.01)
    assert f"sasrec {OTHERWISE}" in markdown(board, rows)


def test_a_cell_of_other_features_than_the_baselines_is_marked_and_not_averaged(board: Board) -> None:
    cells = [a_cell(board, "markov", 0, 0.03, features="a"), a_cell(board, "sasrec", 0, 0.05, features="a"), a_cell(board, "sasrec", 1, 0.09)]
    cells += [a_cell(board, "sasrec", 2, 0.01, features="b"), a_cell(board, "blossom", 0, 0.01, features="b")]
    rows = summary("beauty-next-item", board, cells)
    assert (rows["sasrec"]["seeds"], rows["sasrec"]["metrics"]["ndcg@10"]["mean"]) == (2, pytest.approx(0.07))
    assert rows["sasrec"]["current"] and not rows["blossom"]["current"]


def test_features_made_alike_have_one_digest_and_other_histories_another(tmp_path: Path) -> None:
    def made(name: str, segment: str, items: list[int]) -> Path:
        folder = tmp_path / name
        for inner in ("examples", "targets", f"history/{segment}"):
            (folder / inner).mkdir(parents=True)
        np.save(folder / "history" / segment / "items.npy", np.array(items))
        for file in ("catalogue.parquet", "examples/train.parquet", "targets/test.parquet"):
            (folder / file).write_bytes(b"the same")
        return folder

    first = features_digest(made("first", "segment-1", [1, 2]))
    assert first == features_digest(made("second", "segment-2", [1, 2])) != features_digest(made("third", "segment-1", [2, 1]))


def test_a_cell_of_other_settings_is_run_again_and_gives_way_to_a_recorded_one(board: Board, tmp_path: Path) -> None:
    def keep(cell: dict[str, Any]) -> None:
        file = tmp_path / "cells" / "beauty-next-item" / f"{cell['model']}-{cell['seed']}.json"
        write_json(file, cell)

    boards, results = {"beauty-next-item": board}, tmp_path / "recorded.json"
    (tmp_path / "cells" / "beauty-next-item").mkdir(parents=True)
    keep(a_cell(board, "sasrec", 0, 0.05))
    keep(a_cell(board, "blossom", 0, 0.01, protocol="another"))
    wanted = list(cells(boards, ["sasrec", "blossom", "markov"], 1))
    assert [cell.model for cell in to_run(wanted, boards, tmp_path)] == ["markov", "blossom"]
    recorded = [a_cell(board, "blossom", 0, 0.06), a_cell(board, "sasrec", 0, 0.02), a_cell(board, "markov", 0, 0.03)]
    recorded.append(a_cell(board, "gsasrec", 0, 0.04, protocol="another"))
    write_results(results, {"machine": "m", "cells": [*recorded, {**recorded[0], "model": "left the board"}]})
    found = read_cells(boards, tmp_path, results)
    assert {cell["model"]: cell["metrics"]["ndcg@10"] for cell in found} == {"blossom": 0.06, "sasrec": 0.05, "markov": 0.03}
    assert {cell["commit"] for cell in found} == {"1" * 12 + "-dirty"}
    assert len(results.read_text().splitlines()) == 2 + 5  # a line each


def test_a_metric_that_the_split_cannot_tell_is_null_and_a_dash(board: Board, tmp_path: Path) -> None:
    untold = a_cell(board, "sasrec", 0, 0.0, metrics={"ndcg@10": None, "recall@10": 0.123456}, valid={"ndcg@10": None})
    write_results(
        tmp_path / "recorded.json", {"machine": "m", "cells": [untold, a_cell(board, "markov", 0, 0.03), a_cell(board, "blossom", 0, 0.04)]}
    )
    found = read_cells({"beauty-next-item": board}, tmp_path, tmp_path / "recorded.json")
    (cell,) = (cell for cell in found if cell["model"] == "sasrec")
    assert (cell["metrics"], cell["valid"]) == ({"ndcg@10": None, "recall@10": 0.12346}, {"ndcg@10": None})
    rows = summary("beauty-next-item", board, found)
    assert rows["sasrec"]["learnt"] is None and "ndcg@10" not in rows["sasrec"]["metrics"]
    lines = [line for line in markdown(board, rows).splitlines() if line.startswith(("| sasrec", "| markov", "| blossom"))]
    assert [line.split(" | ")[0] for line in lines] == ["| blossom", "| markov", "| sasrec"] and "| – |" in lines[-1]


def test_a_page_has_its_tables_renewed_and_names_no_board_that_there_is_not() -> None:
    text = "before\n<!-- board: one -->\nold\n<!-- end -->\nafter\n"
    assert with_tables(text, {"one": "| new |\n"}, name="p.md") == "before\n<!-- board: one -->\n\n| new |\n\n<!-- end -->\nafter\n"
    with pytest.raises(ConfigError, match=r"p\.md: .*one.*expected one of two"):
        with_tables(text, {"two": ""}, name="p.md")


def test_a_model_run_at_three_lengths_is_a_curve_and_one_of_other_settings_is_not(tmp_path: Path) -> None:
    board = load_boards(["long-memory-click"])["long-memory-click"]
    of = {"board": "long-memory-click"}
    values = {"din_5000": 0.8, "din_50": 0.6, "din_200": 0.7, "sam_50": 0.6, "sam_200": 0.7, "sam_random_200": 0.6, "click_rate": 0.5}
    found = [a_cell(board, model, 0, 0.0, metrics={"auc": value, "gauc": value}) | of for model, value in values.items()]
    older = {**board.models["sam_5000"].model_dump(mode="json"), "learning_rate": 0.5}
    found.append(a_cell(board, "sam_5000", 0, 0.0, metrics={"auc": 0.9, "gauc": 0.9}, settings=older) | of)
    rows = summary("long-memory-click", board, found)
    assert curves_by_length(board, values) == {"din": ["din_50", "din_200", "din_5000"]}
    save_picture(board, rows, tmp_path / "curves.svg")
    save_picture(board, rows, tmp_path / "again.svg")
    assert (tmp_path / "curves.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    assert ">din<" in (text := (tmp_path / "curves.svg").read_text()) and ">sam<" not in text and ">5,000<" in text


def test_a_board_of_one_length_has_a_picture_of_its_models_beside_what_was_published(tmp_path: Path) -> None:
    board = load_boards(["ml-1m-next-item"])["ml-1m-next-item"]
    runs = [("markov", 0, 0.13), ("sasrec", 0, 0.17), ("sasrec", 1, 0.18), ("gsasrec", 0, 0.17)]
    found = [a_cell(board, *run) | {"board": "ml-1m-next-item"} for run in runs]
    save_picture(board, summary("ml-1m-next-item", board, found), tmp_path / "models.svg")
    text = (tmp_path / "models.svg").read_text()
    assert all(f">{name}<" in text for name in ("sasrec", "gsasrec", "markov", "published", "NDCG@10")) and ">bert4rec<" not in text


def test_the_page_of_the_board_shows_what_is_recorded() -> None:
    boards, page = load_boards(), Path("docs/quality.md").read_text(encoding="utf-8")
    found = json.loads(Path("benchmarks/quality/recorded.json").read_text())["cells"]
    tables = {name: markdown(board, summary(name, board, found)) for name, board in boards.items()}
    assert all(f"<!-- board: {name} -->" in page for name in boards)
    assert with_tables(page, tables, name="docs/quality.md") == page, (
        "run python -m benchmarks.quality --minutes 0 --results … --page docs/quality.md"
    )
