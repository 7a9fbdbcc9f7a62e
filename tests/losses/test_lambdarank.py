"""LambdaRank's given gradient against loops over pairs, its lists, and that it ranks."""

import math

import pytest
import torch

from longtrail.losses import lambdarank_loss
from longtrail.losses.lambdarank import draw_lists, lambdas
from tests.losses.draws import randint, randn


def slow_lambdas(scores: list[float], relevant: list[bool], head: int, truncate: int) -> tuple[list[float], float]:
    """The equations, pair by pair."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:truncate]
    s, g = [scores[i] for i in order], [float(relevant[i]) for i in order]
    d = [1 / math.log2(p + 2) for p in range(len(order))]
    ideal = sum(gain * d[p] for p, gain in enumerate(sorted(g, reverse=True)[:head]))
    found = [0.0] * len(order)
    for j in range(min(head, len(order))):
        for i in range(len(order)):
            if g[i] == g[j] or ideal == 0:
                continue
            z = (s[i] - s[j]) * (1 if g[i] > g[j] else -1)
            delta = (g[i] - g[j]) * abs(d[i] - d[j]) / ideal
            if s[0] != s[-1]:
                delta /= abs(z) + 0.01
            pair = -delta / (1 + math.exp(min(z, 700)))  # beyond it math.exp overflows
            found[j] -= pair
            if i >= head:
                found[i] += pair
    size = sum(abs(x) for x in found)
    result = [0.0] * len(scores)
    for place, i in enumerate(order):
        result[i] = found[place] * math.log2(1 + size) / size if size else 0.0
    return result, sum(gain * d[p] for p, gain in enumerate(g[:head])) / ideal if ideal else 0.0


@pytest.mark.parametrize(("items", "head", "truncate"), [(1, 50, 3000), (7, 3, 5), (7, 7, 7), (30, 4, 20), (30, 50, 3000)])
@pytest.mark.parametrize("kind", ["distinct", "tied", "all equal", "huge"])
def test_lambdas_equal_the_loops(items: int, head: int, truncate: int, kind: str) -> None:
    scores = randn(12, items, seed=items)
    scores = {"distinct": scores, "tied": scores.round(), "all equal": torch.full_like(scores, 0.3), "huge": scores * 300}[kind]
    relevant = randn(12, items, seed=1) > 0.6
    relevant[0], relevant[1] = False, True
    fast, ndcg = lambdas(scores, relevant, head=head, truncate=truncate)
    for w in range(12):
        slow, value = slow_lambdas(scores[w].tolist(), relevant[w].tolist(), head, truncate)
        torch.testing.assert_close(fast[w], torch.tensor(slow, dtype=torch.float64), rtol=1e-10, atol=1e-14)
        assert ndcg[w].item() == pytest.approx(value)


def test_float32_is_near_float64() -> None:
    scores, relevant = randn(8, 200), randn(8, 200, seed=1) > 1
    torch.testing.assert_close(lambdas(scores.float(), relevant)[0].double(), lambdas(scores, relevant)[0], rtol=1e-3, atol=1e-5)


def test_under_autocast_all_but_the_scores_is_float32() -> None:
    scores, relevant = randn(8, 200).float(), randn(8, 200, seed=1) > 1
    expected = lambdas(scores, relevant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lambdas(scores, relevant)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_lists_begin_at_a_uniform_place_and_hold_all_that_follows() -> None:
    """Windows 0 and 2 of a batch, with 4 and 2 targets (one item twice); window 1 has none."""
    targets, windows = torch.tensor([3, 1, 4, 1, 5, 2]), torch.tensor([0, 0, 0, 0, 2, 2])
    starts = torch.zeros(6)
    for seed in range(800):
        chosen, relevant = draw_lists(targets, windows, 6, generator=torch.Generator().manual_seed(seed))
        assert [sorted((row.nonzero().squeeze(1) + 1).tolist()) for row in relevant] == [
            sorted(set(targets[chosen[0] : 4].tolist())),
            sorted(set(targets[chosen[1] : 6].tolist())),
        ]
        starts[chosen] += 1
    torch.testing.assert_close(starts / 800, torch.tensor([0.25] * 4 + [0.5] * 2), rtol=0, atol=0.06)


def test_the_gradient_handed_on_is_lambda_over_lists_in_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    states, vectors = randn(9, 3).requires_grad_(), randn(13, 3, seed=1).requires_grad_()
    targets, windows = randint(1, 13, 9, seed=2), torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3])
    gradients = []
    for limit in (1 << 21, 1, 300):
        monkeypatch.setattr("longtrail.losses.lambdarank.MAX_PAIRS", limit)
        loss = lambdarank_loss(states, vectors, targets, windows, generator=torch.Generator().manual_seed(5))
        gradients.append(torch.autograd.grad(loss, (states, vectors)))
    chosen, relevant = draw_lists(targets, windows, 12, generator=torch.Generator().manual_seed(5))
    lambda_WN, ndcg_W = lambdas((states[chosen] @ vectors[1:].T).detach(), relevant)
    assert loss.item() == pytest.approx(1 - ndcg_W.mean().item())
    for by_state, by_item in gradients:
        torch.testing.assert_close(by_state[chosen], lambda_WN @ vectors[1:].detach() / 4)
        torch.testing.assert_close(by_item[1:], lambda_WN.T @ states[chosen].detach() / 4)
        assert by_state.abs().sum(1).gt(0).sum() == 4
        assert not by_item[0].any()


def test_following_it_puts_the_relevant_first() -> None:
    torch.manual_seed(0)
    scores, relevant = torch.randn(4, 120), torch.rand(4, 120) < 0.1
    before = lambdas(scores, relevant)[1].mean()
    for _ in range(300):
        scores -= 0.1 * lambdas(scores, relevant)[0]
    assert before < 0.5 < 0.99 < lambdas(scores, relevant)[1].mean()


def test_no_target_costs_nothing() -> None:
    states, none = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    loss = lambdarank_loss(states, torch.zeros(9, 4), none, none)
    loss.backward()
    assert loss.item() == 0
