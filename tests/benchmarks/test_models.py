"""The benchmark of models: its slopes, its measure of memory, what it leaves out, and that a stopped run goes on."""

from pathlib import Path

import pytest
import torch
import typer

from benchmarks.models import attentions, chosen, main, peak_bytes, registered, slope, table, too_large
from longtrail.files import read_json
from longtrail.models.attention.full import FullAttention
from longtrail.models.registry import MODELS


def test_slopes() -> None:
    assert slope([64, 128, 256], [3.0, 12.0, 48.0]) == pytest.approx(2)
    assert slope([64, 1024], [5.0, 5.0]) == pytest.approx(0)


def test_memory_is_the_most_held_at_once() -> None:
    """4 MB live through, and 8 MB of which 4 MB are let go before the next 4: 12 MB, not 16."""
    x = torch.zeros(1000, 1000)

    def call() -> None:
        first = x + 1
        second = (first + 1) + 1
        (second + 1).sum()

    assert peak_bytes(call) == pytest.approx(12e6, rel=0.01)


def test_what_would_take_too_long_is_left_out() -> None:
    cells = {"a|64": {"training": {"least_ms": 30.0, "peak_mb": 1.0}}, "b|64": {"left_out": "over 100 ms"}}
    assert too_large(cells, "a", 128, 100, 1000) == "over 100 ms" and too_large(cells, "a", 128, 200, 3) == "over 3 MB"
    assert too_large(cells, "a", 128, 200, 1000) is None and too_large(cells, "a", 512, 1, 1) is None
    assert too_large(cells, "b", 128, 1e9, 1e9) == "over 100 ms"


def test_every_trained_model_is_there() -> None:
    names = registered()
    for _, kind in MODELS:
        assert kind in ("popularity", "markov") or kind in names or {f"{kind} full", f"{kind} blossom"} <= set(names), kind
    with pytest.raises(typer.BadParameter, match="no model begins with 'nothing'"):
        chosen(["nothing"])


def test_the_naive_twin_is_full_attention() -> None:
    builders = attentions()
    torch.manual_seed(0)
    full = builders["full"](33).double()
    assert isinstance(full, FullAttention)
    naive = builders["naive"](33).double()
    naive.load_state_dict(full.state_dict())
    x_BLD, lengths_B = torch.randn(2, 33, 64, dtype=torch.float64), torch.tensor([33, 33])
    torch.testing.assert_close(naive(x_BLD, lengths_B), full(x_BLD, lengths_B), rtol=0, atol=1e-12)


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

    def run(lengths: list[int]) -> None:
        main(["full", "gru4rec"], lengths, 3, 0.0, 1e6, 1e6, 1, "cpu", False, tmp_path / "out.json")

    run([16])
    first = read_json(tmp_path / "out.json")["cells"]
    run([16, 32])
    second = read_json(tmp_path / "out.json")["cells"]
    assert set(first) == {"full|16", "full, 4 heads|16", "gru4rec|16"} and len(second) == 6
    assert all(second[key] == value for key, value in first.items())
    for cell in second.values():
        assert cell["training"]["peak_mb"] >= cell["forward"]["peak_mb"] > 0 < cell["forward"]["least_ms"] <= cell["forward"]["p50_ms"]
    assert "| gru4rec |" in capsys.readouterr().out and "| full | – |" in table({}, ["full"], [64], "forward", "least_ms")
