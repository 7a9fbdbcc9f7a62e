"""The benchmark of models: its slopes, its measure of memory, what it leaves out, and that a stopped run goes on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks.models import Work, attentions, calls, chosen, main, peak_bytes, registered, slope, table, too_large
from benchmarks.ranker_latency import device_name
from longtrail.files import read_json
from longtrail.models.attention import fused
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
    before = {"training": {"least_ms": 30.0, "peak_mb": 1.0}}
    assert too_large(before, 100, 1000) == "over 100 ms" and too_large(before, 200, 3) == "over 3 MB"
    assert too_large(before, 200, 1000) is None and too_large(None, 1, 1) is None


def test_a_cell_is_one_of_its_device_threads_and_sizes() -> None:
    work = Work()
    changed = [replace(work, candidates=200), replace(work, threads=2), replace(work, batch=32), replace(work, training_candidates=1)]
    keys = [other.key("sam", 64) for other in [work, *changed]]
    assert len({*keys, work.key("sam", 128), work.key("din", 64)}) == 7
    assert device_name() in keys[0] and torch.__version__ in keys[0]


def test_forward_is_as_in_serving_and_training_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ranker = registered()["ifa"](16)
    seen: list[tuple[bool, bool, bool, tuple[int, ...]]] = []
    plain = type(ranker).forward

    def noted(self: Any, history: Any, candidates: Any, context: Any) -> Any:
        seen.append((self.training, torch.is_inference_mode_enabled(), fused._compiled.get(), tuple(candidates.items_BC.shape)))
        return plain(self, history, candidates, context)

    monkeypatch.setattr(type(ranker), "forward", noted)
    made = calls(ranker, 16, Work(candidates=5, batch=3, training_candidates=2))
    made["forward"]()
    made["training"]()
    assert seen == [(False, True, True, (1, 5)), (True, False, False, (3, 2))]


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

    def run(lengths: list[int], candidates: int = 3, most_ms: float = 1e6) -> None:
        main(["full", "gru4rec"], lengths, candidates, 2, 2, 0.0, most_ms, 1e6, 1, "cpu", False, tmp_path / "out.json")

    def kept() -> dict[str, Any]:
        return dict(read_json(tmp_path / "out.json")["cells"])

    run([16])
    first = kept()
    run([16, 32])
    second = kept()
    assert {key.rsplit("|", 2)[0] for key in first} == {"full|16", "full, 4 heads|16", "gru4rec|16"} and len(second) == 6
    assert all(second[key] == value for key, value in first.items())
    for cell in second.values():
        assert cell["training"]["peak_mb"] >= cell["forward"]["peak_mb"] > 0 < cell["forward"]["least_ms"] <= cell["forward"]["p50_ms"]
    run([16], candidates=4)  # others, which are measured
    third = kept()
    assert len(third) == 9 and all(third[key] == value for key, value in second.items())
    capsys.readouterr()
    run([16, 32, 64], most_ms=0.0)  # what is known is shown, what would be measured is left out, and the file does not say so
    assert kept() == third
    out = capsys.readouterr().out
    assert "| gru4rec |" in out and "(6 cells)" in out and "('gru4rec', 64): 'over 0 ms'" in out
    assert "| full | – |" in table({}, ["full"], [64], "forward", "least_ms")
