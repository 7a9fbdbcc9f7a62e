"""SAM from outside: the sizes that the page shows, what it tells of its weights, its precision, memory and work."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.models import peak_bytes
from longtrail.config import SAMSettings
from longtrail.models.attention import compiled_layer, fused
from longtrail.models.contracts import Sizes
from longtrail.models.masks import padding_mask
from longtrail.models.rankers.sam import SAM
from tests.contracts.batches import SIZES, make_candidates, make_context, make_history, make_request
from tests.contracts.largest import Largest
from tests.models.test_sam import CLOSE, attention, make_sam

VARIANTS = {  # parameters by part [derived from the equations]
    "sam_2p": {"attention": 2 * 1041, "cell": 6240, "compression": 2 * 16016, "steps": 0, "cell_out": 0, "output": 96},
    "sam_3p": {"attention": 3 * 1041, "cell": 6240, "compression": 3 * 16016, "steps": 0, "cell_out": 0, "output": 144},
    "sam_3p_plus": {"attention": 3 * 1041, "cell": 6240, "compression": 16016, "steps": 3168, "cell_out": 9312, "output": 48},
}


@pytest.mark.parametrize(("name", "expected"), VARIANTS.items())
def test_variants_have_the_papers_sizes(name: str, expected: dict[str, int]) -> None:
    """Sizes of each part at D = 32, L = 1,000, and what the head is given beside query, newest actions and statistics, of the page's settings."""
    page = (Path(__file__).parents[2] / "docs/models/sam.md").read_text(encoding="utf-8")
    settings = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])["models"][name]
    model = SAM(SAMSettings(**settings, max_history=1000), SIZES)
    sizes = {key: value.numel() for key, value in model.named_parameters()}
    of = {
        "attention": sum(n for key, n in sizes.items() if key.startswith("passes") and "compress" not in key),
        "cell": sum(n for key, n in sizes.items() if key.startswith("cell")),
        "compression": sum(n for key, n in sizes.items() if "compress" in key),
        "steps": sum(n for key, n in sizes.items() if key.startswith("enhance.steps")),
        "cell_out": sum(n for key, n in sizes.items() if key.startswith("enhance.cell")),
        "output": len(model.head.norm.scale) - 32 - 3 * 32 - 6,
    }
    assert of == expected


def test_shown_weights_are_those_that_were_used() -> None:
    """Oldest first, as the history is; 0 on padding. Pooling with them gives what the first pass reads."""
    model, (history, candidates, context) = make_sam(), make_request()
    mask_BL = padding_mask(history.lengths_B, 9)
    with torch.no_grad():
        shown = model.attention_weights(history, candidates, context)
        keys_BLD, _, query_BCD = model._embedded(history, candidates)
        used = [a for a, _ in model._passes(keys_BLD, mask_BL, history.lengths_B, query_BCD)]
        read = shown[0] @ model.embedding.keys(history, mask_BL)
    assert [a.shape for a in shown] == [(5, 6, 9)] * 3
    for a, b in zip(shown, used, strict=True):
        for user, n in enumerate(history.lengths_B.tolist()):
            assert torch.equal(a[user, :, :n], b[user, :, :n].flip(-1))
            assert not a[user, :, n:].any()
    torch.testing.assert_close(read, used[0] @ keys_BLD, **CLOSE)


def test_health_is_entropy_and_mass_by_pass() -> None:
    """Against a loop over real candidates of users with a history; nothing to tell where nobody has one."""
    model, (history, candidates, context) = make_sam(), make_request()
    found = model.health(history, candidates, context)
    assert list(found) == [f"attention_{kind}_{i}" for i in (1, 2, 3) for kind in ("entropy", "mass")]
    for i, a_BCL in enumerate(model.attention_weights(history, candidates, context), start=1):
        entropies, masses = [], []
        for user, (n, shown) in enumerate(zip(history.lengths_B.tolist(), candidates.lengths_B.tolist(), strict=True)):
            for a in a_BCL[user, :shown, :n].tolist() if n else []:
                masses.append(sum(a))
                entropies.append(-sum(x / masses[-1] * math.log2(x / masses[-1]) for x in a))
        assert found[f"attention_entropy_{i}"] == pytest.approx(sum(entropies) / len(entropies))
        assert found[f"attention_mass_{i}"] == pytest.approx(sum(masses) / len(masses))
    assert model.health(make_history(0, (0, 0)), make_candidates(0, (2, 1)), make_context(0, 2)) == {}


def test_sums_are_float32_under_autocast() -> None:
    """10,000 equal behaviours. bfloat16 has 8 bits: a sum that was rounded to it once, or made of rounded keys, would be wrong by 1e-3."""
    model = make_sam(passes=1, compression=0).float()
    keys_BLD = torch.full((1, 10_000, model.embedding.width), 1.001)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        a_BCL, read_BCD = attention(model, 0)(keys_BLD, torch.ones(1, 10_000, dtype=torch.bool), keys_BLD[:, :2], keys_BLD[:, :2])
    assert a_BCL.dtype == read_BCD.dtype == torch.float32
    torch.testing.assert_close(read_BCD, (a_BCL.double().sum(-1, keepdim=True) * 1.001).float().expand_as(read_BCD), rtol=3e-4, atol=0)


@pytest.mark.parametrize("length", [64, 128, 256])
def test_nothing_larger_than_the_hidden_layer_is_made(length: int) -> None:
    """Forward and backward: memory is linear in L, and [B, C, L, D], let alone [B, C, L, 4D], is never built (H = 5 < D = 32)."""
    sizes = Sizes(items=40, categories=6, actions=5)
    model = SAM(SAMSettings(width=16, attention_hidden=5, max_history=length, hidden=(8,)), sizes)
    history, candidates = make_history(0, (length, length - 3)), make_candidates(0, (30, 7))
    with Largest() as largest:
        model(history, candidates, make_context(0, 2)).sum().backward()
    assert largest.elements == 2 * 30 * (5 + 1) * length  # backward: the hidden layer and the weights, side by side


def test_work_is_linear_in_the_history() -> None:
    """Log-log slope over L = 500 … 8,000 of all numbers that a training step makes, and of the largest tensor."""
    lengths, made, largest = [500, 1000, 2000, 4000, 8000], [], []
    for length in lengths:
        model = SAM(SAMSettings(max_history=length, hidden=(8,)), SIZES)
        with Largest() as seen:
            model(make_history(0, (length,)), make_candidates(0, (4,)), make_context(0, 1)).sum().backward()
        made.append(math.log(seen.all))
        largest.append(math.log(seen.elements))
    for y in (made, largest):
        assert 0.9 < slope(lengths, y) < 1.1


def slope(lengths: list[int], logs: list[float]) -> float:
    """Of a line through logarithms over those of the lengths."""
    x, n = [math.log(length) for length in lengths], len(lengths)
    return sum((a - sum(x) / n) * (b - sum(logs) / n) for a, b in zip(x, logs, strict=True)) / sum((a - sum(x) / n) ** 2 for a in x)


@pytest.mark.parametrize("passes", [1, 3])
def test_memory_is_linear_in_the_history_where_layers_are_compiled(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training step holds at most, measured, over L = 2,048 … 8,192 of 16 candidates: each layer by compiled_layer.py."""
    calls, real = [], compiled_layer.attend
    monkeypatch.setattr(compiled_layer, "attend", lambda *given: calls.append(1) or real(*given))
    lengths, peaks = [2048, 4096, 8192], []
    candidates, context = make_candidates(0, (16,)), make_context(0, 1)
    for length in lengths:
        torch.manual_seed(0)
        model, history = SAM(SAMSettings(passes=passes, max_history=length, hidden=(8,)), SIZES), make_history(0, (length,))
        assert length * 16 >= fused.COMPILED_PAIRS
        peaks.append(peak_bytes(lambda model=model, history=history: model(history, candidates, context).sum().backward()))
    assert len(calls) == passes * len(lengths)
    assert 0.9 < slope(lengths, [math.log(peak) for peak in peaks]) < 1.1
