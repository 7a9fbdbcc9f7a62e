"""SIM, ETA and TWIN: searches against loops, the second stage against the textbook's attention, and that memory is bounded."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longtrail.config import ETASettings, SIMSettings, TWINSettings
from longtrail.models.attention.selected import SelectedAttention, newer_first, search
from longtrail.models.contracts import Candidates, History
from longtrail.models.masks import padding_mask
from longtrail.models.rankers.eta import ETA
from longtrail.models.rankers.sim import SIM
from longtrail.models.rankers.twin import TWIN
from longtrail.models.rankers.two_stage import TwoStageRanker
from tests.contracts.batches import SIZES, draws, make_candidates, make_context, make_history, make_request

CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-10}
SMALL: dict[str, Any] = {"width": 4, "hidden": (8,), "max_history": 12, "heads": 2}
KINDS: dict[str, Any] = {
    "hard": (SIM, SIMSettings),
    "soft": (SIM, SIMSettings),
    "eta": (ETA, ETASettings),
    "twin": (TWIN, TWINSettings),
}


def make(kind: str, **changes: Any) -> Any:
    torch.manual_seed(3)
    model, settings = KINDS[kind]
    more = {"search": "soft"} if kind == "soft" else {"bits": 6} if kind == "eta" else {}
    built = model(settings(**(SMALL | more | changes)), SIZES).double().eval()
    for name, parameter in built.named_parameters():
        if name.startswith("bias."):  # TWIN's, which are zero at first
            torch.nn.init.normal_(parameter)
    return built


def slow_search_scores(model: Any, kind: str, history: History, candidates: Candidates, b: int, c: int, times_B: Tensor) -> list[tuple[float, ...]]:
    """What each real behaviour of a user is ranked by, larger first; an empty tuple is out of the question."""
    mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
    keys, query = model.embedding.keys(history, mask_BL)[b], model.embedding.queries(candidates)[b, c]
    scores: list[tuple[float, ...]] = []
    for j in range(int(history.lengths_B[b])):
        if kind == "hard":
            alike = history.categories_BL[b, j] == candidates.categories_BC[b, c]
            scores.append((float(j),) if alike else ())
        elif kind == "soft":
            scores.append((float((query @ model.soft.query) @ (keys[j] @ model.soft.key)),))
        elif kind == "eta":
            bits = [[bool(x @ plane >= 0) for plane in model.planes.T] for x in (query, keys[j])]
            scores.append((-float(sum(x != y for x, y in zip(*bits, strict=True))), float(j)))
        else:
            thing = keys[j] - model.embedding.actions[history.actions_BL[b, j]]
            seconds = max(0, int(times_B[b] - history.times_BL[b, j]) // 1_000_000)
            bias = model.bias.actions[history.actions_BL[b, j]] + model.bias.gaps[1 + min(31, math.floor(math.log2(seconds + 1)))]
            heads = zip(model.attention.query, model.attention.key, strict=True)
            scores.append((sum(float((query @ wq) @ (thing @ wk)) / math.sqrt(wq.shape[1]) for wq, wk in heads) + float(bias.sum()),))
    return scores


@pytest.mark.parametrize("top_k", [1, 3, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_is_what_a_loop_finds(kind: str, top_k: int) -> None:
    model = make(kind, top_k=top_k)
    for seed in range(4):
        history, candidates, context = make_request(seed)
        with torch.no_grad():
            places_BCK, found_BCK = model.found(history, candidates, context, model.embedding.queries(candidates))
            assert places_BCK.shape == (5, 6, min(top_k, 9))
            for b, shown in enumerate(candidates.lengths_B.tolist()):
                for c in range(shown):
                    scores = slow_search_scores(model, kind, history, candidates, b, c, context.times_B)
                    wanted = sorted((j for j, score in enumerate(scores) if score), key=lambda j: scores[j], reverse=True)[:top_k]
                    assert places_BCK[b, c][found_BCK[b, c]].tolist() == wanted


def slow_attention(layer: SelectedAttention, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """The textbook's multi-head attention of one candidate over k behaviours, projected one by one."""
    reads = []
    for h in range(layer.heads):
        scores = [(q @ layer.query[h]) @ (k @ layer.key[h]) / math.sqrt(layer.query.shape[2]) for k in keys]
        shares = torch.softmax(torch.stack(scores) + (0 if bias is None else bias[:, h]), dim=0)
        reads.append(sum((share * (v @ layer.value[h]) for share, v in zip(shares, values, strict=True)), torch.zeros(())))
    return torch.cat(reads) @ layer.output.weight.T + layer.output.bias


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_the_textbooks_attention_over_what_was_found(kind: str) -> None:
    model = make(kind, top_k=3)
    history, candidates, context = make_request()
    mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
    with torch.no_grad():
        query_BCD = model.embedding.queries(candidates)
        places_BCK, found_BCK = model.found(history, candidates, context, query_BCD)
        read_BCD = model.read(history, candidates, context, query_BCD)
        keys_BLD = model.embedding.keys(history, mask_BL)
        asked_BLD = model.embedding.things(history.items_BL, history.categories_BL, mask_BL) if kind == "twin" else keys_BLD
        bias_BLH = model.bias(history, mask_BL, context.times_B) if kind == "twin" else None
        for b, shown in enumerate(candidates.lengths_B.tolist()):
            for c in range(shown):
                at = places_BCK[b, c][found_BCK[b, c]]
                if len(at):
                    bias = None if bias_BLH is None else bias_BLH[b, at]
                    slow = slow_attention(model.attention, query_BCD[b, c], asked_BLD[b, at], keys_BLD[b, at], bias)
                else:
                    slow = model.attention.output.bias
                torch.testing.assert_close(read_BCD[b, c], slow, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", [-1e2, -1e4, 1e4])
def test_places_where_nothing_was_found_count_nothing_whatever_the_scores(score: float, dtype: torch.dtype) -> None:
    """Even where all real scores are far below those of the places that found nothing, or of any number one might put in their stead."""
    torch.manual_seed(4)
    layer = SelectedAttention(4, 2).to(dtype)
    query_BCD, values_BCKD = torch.randn(1, 1, 4, dtype=dtype), torch.randn(1, 1, 4, 4, dtype=dtype)
    keys_BCKD = torch.randn(1, 1, 4, 4, dtype=dtype) / 100
    found_BCK = torch.tensor([[[True, False, True, False]]])
    bias_BCKH = torch.where(found_BCK, score, 0.0).unsqueeze(-1).expand(1, 1, 4, 2).to(dtype)
    with torch.no_grad():
        read = layer(query_BCD, keys_BCKD, values_BCKD, found_BCK, bias_BCKH)[0, 0]
        taken = found_BCK[0, 0]
        slow = slow_attention(layer, query_BCD[0, 0], keys_BCKD[0, 0, taken], values_BCKD[0, 0, taken], None)
        torch.testing.assert_close(read, slow, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-9)
        other = values_BCKD.masked_fill(~found_BCK.unsqueeze(-1), 1e9)
        assert torch.equal(layer(query_BCD, keys_BCKD, other, found_BCK, bias_BCKH)[0, 0], read)
        nothing = layer(query_BCD, keys_BCKD, values_BCKD, torch.zeros_like(found_BCK), bias_BCKH)[0, 0]
        torch.testing.assert_close(nothing, layer.output.bias, rtol=0, atol=0)
        half = at_bfloat16(layer, query_BCD, keys_BCKD, values_BCKD, found_BCK, bias_BCKH)
        torch.testing.assert_close(half, slow, rtol=0, atol=0.1, check_dtype=False)


def at_bfloat16(layer: SelectedAttention, *given: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(*given)[0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_candidates_equal_all_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, request = make(kind, top_k=3), make_request()
    with torch.no_grad():
        whole = model(*request)
        monkeypatch.setattr("longtrail.models.attention.pointwise.CHUNK_BYTES", 1)
        torch.testing.assert_close(model(*request), whole, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_with_everything_found_it_is_attention_over_the_whole_history(kind: str) -> None:
    """top-k at the history's length: what is found no longer depends on the scores (of a hard search: all of one category)."""
    wide, wider = make(kind, top_k=9), make(kind, top_k=500)
    history, candidates, context = make_request()
    with torch.no_grad():
        torch.testing.assert_close(wide(history, candidates, context), wider(history, candidates, context), **CLOSE)
        _, found_BCK = wider.found(history, candidates, context, wider.embedding.queries(candidates))
        if kind != "hard":
            assert torch.equal(found_BCK.sum(-1), history.lengths_B.unsqueeze(1).expand(-1, 6))


def test_no_gradient_goes_through_a_search() -> None:
    """Only the soft search of SIM is trained, and only by its auxiliary logits; TWIN's score is trained by the second stage."""
    history, candidates, context = make_request()
    soft = make("soft", top_k=3)
    own, auxiliary = soft.training_logits(history, candidates, context)
    weights = [soft.soft.query, soft.soft.key]
    assert torch.autograd.grad(own.sum(), weights, allow_unused=True, retain_graph=True) == (None, None)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(auxiliary.sum(), weights))
    torch.testing.assert_close(own, soft(history, candidates, context))
    assert len(make("hard").training_logits(history, candidates, context)) == 1
    twin = make("twin", top_k=3)
    found = torch.autograd.grad(twin(history, candidates, context).sum(), [twin.attention.query, twin.bias.actions, twin.bias.gaps])
    assert all(g.abs().max() > 0 for g in found)


def test_the_auxiliary_sum_is_that_of_a_loop() -> None:
    """Σ_j r_j k_j / n, which is computed from K K alone."""
    model, (history, candidates, _) = make("soft"), make_request()
    keys_BLD = model.embedding.keys(history, padding_mask(history.lengths_B, 9))
    query_BCD = model.embedding.queries(candidates)
    with torch.no_grad():
        fast_BCD = model.soft.sums(keys_BLD, query_BCD, history.lengths_B)
        r_BCL = model.soft.scores(keys_BLD, query_BCD)
        slow_BCD = torch.einsum("bcl,bld->bcd", r_BCL, keys_BLD) / history.lengths_B.clamp(min=1).view(-1, 1, 1)
    torch.testing.assert_close(fast_BCD, slow_BCD, **CLOSE)


def test_equal_distances_prefer_the_newer() -> None:
    """Up to the longest history that the docstring promises."""
    for dtype in (torch.float32, torch.float64):
        scores_L = torch.randint(-32, 33, (131_072,), generator=draws(0)) * 2
        order = newer_first(scores_L.to(dtype).view(1, 1, -1)).flatten().numpy().argsort()[::-1]
        assert np.array_equal(order, np.lexsort((np.arange(131_072), scores_L.numpy()))[::-1])


def test_search_leaves_out_padding_and_what_is_out_of_the_question() -> None:
    scores_BCL = torch.tensor([[[3.0, -torch.inf, 9.0, 7.0]], [[1.0, 2.0, 3.0, 4.0]]])
    places_BCK, found_BCK = search(lambda block: scores_BCL[:, block], padding_mask(torch.tensor([3, 0]), 4), 1, 2)
    assert places_BCK[0, 0].tolist() == [2, 0]
    assert found_BCK.tolist() == [[[True, True]], [[False, False]]]


class Bytes(TorchDispatchMode):
    """The largest storage made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_bounded_whatever_the_number_of_candidates(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without blocks, 400 candidates would gather [400, 20, 8] behaviours (256 kB in float32) and score [400, 300] (480 kB)."""
    monkeypatch.setattr("longtrail.models.attention.pointwise.CHUNK_BYTES", 32 << 10)
    model: TwoStageRanker = make(kind, top_k=20).float()
    history, candidates = make_history(0, (300,)), make_candidates(0, (400,))
    with torch.no_grad(), Bytes() as made:
        query_BCD = model.embedding.queries(candidates)
        model.read(history, candidates, make_context(0, 1), query_BCD)
    places = 400 * 20 * 8  # the indices themselves, int64
    assert made.largest <= max(places, 64 << 10)
