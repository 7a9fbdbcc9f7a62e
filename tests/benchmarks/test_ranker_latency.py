"""The benchmark of one request: every twin says what its model says, and each is timed."""

import pytest
import torch

from benchmarks.ranker_latency import check_equal, hardware, make_request, measure, request_cpu_ms, show
from longtrail.config import DINSettings
from longtrail.models.attention import fused
from longtrail.models.contracts import Sizes
from longtrail.models.rankers.din import DIN


def test_models_and_twins_are_timed() -> None:
    rows = measure(12, 3, width=16, repeats=2, seconds=0.0)
    assert {row["model"] for row in rows} == {"sam", "sam, tiled", "ifa", "ifa, stored state", "din", "din, tiled"}
    assert all(row["cpu_ms"] > 0 < row["min_ms"] <= row["p50_ms"] <= row["p99_ms"] and row["calls"] == 2 and row["width"] == 32 for row in rows)
    assert "| 12 | 3 | 32 | sam, tiled |" in show(rows)


def test_twins_must_agree() -> None:
    one = torch.ones(2)
    check_equal({"sam": lambda: one, "sam, tiled": lambda: one + 1e-5})
    with pytest.raises(AssertionError, match=r"sam, tiled: logits differ by 0\.1"):
        check_equal({"sam": lambda: one, "sam, tiled": lambda: one + 0.1})


def test_a_request_is_scored_as_the_service_does(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(items=9, categories=3, actions=1)
    seen: list[tuple[bool, bool, bool]] = []
    ranker = DIN(DINSettings(width=4, hidden=(8,), attention_hidden=(4,), max_history=6), sizes)
    ranker.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_inference_mode_enabled(), fused._compiled.get())))
    assert request_cpu_ms(ranker, make_request(6, 3, sizes)) > 0
    assert set(seen) == {(False, True, True)}


def test_hardware_is_named() -> None:
    about = hardware()
    assert about["processor"] and "device" not in about
    assert about["threads"] == torch.get_num_threads()
