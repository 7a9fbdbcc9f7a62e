"""The head against a slow twin, and every ranker's logits against the line of its page that says what its head is given.

S statistics, D width, X features of the head.
"""

import math
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longtrail.config import (
    DIENSettings,
    DINSettings,
    ETASettings,
    IFASettings,
    MeanPoolingSettings,
    SAMSettings,
    SDIMSettings,
    SIMSettings,
    TWINSettings,
)
from longtrail.models.contracts import Candidates, Context, History
from longtrail.models.embedding import BehaviourEmbedding
from longtrail.models.head import Head
from longtrail.models.registry import MODELS, build_model
from tests.contracts.batches import SIZES, draws, make_candidates, make_context, make_history
from tests.contracts.weights import with_drawn_weights
from tests.models.attention.test_cross import slow_cross
from tests.models.test_din import slow_weights
from tests.models.test_pooling_rankers import slow_augru, slow_sdim
from tests.models.test_sam import slow_read
from tests.models.test_two_stage import slow_attention

CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-10}
PAGES = Path(__file__).parents[2] / "docs" / "models"
SMALL: dict[str, Any] = {"width": 3, "hidden": (7, 5), "max_history": 12}
FEW: dict[str, Any] = {"top_k": 3, "heads": 2}
RANKERS: dict[str, Any] = {
    "mean pooling": MeanPoolingSettings(**SMALL),
    "din": DINSettings(**SMALL, attention_hidden=(6,)),
    "din two layers": DINSettings(**SMALL, attention_hidden=(6, 5), attention_weights="softmax"),
    "dien": DIENSettings(**SMALL, attention_hidden=(6, 5)),
    "sim hard": SIMSettings(**SMALL, **FEW),
    "sim soft": SIMSettings(**SMALL, **FEW, search="soft"),
    "eta": ETASettings(**SMALL, **FEW, bits=5),
    "twin": TWINSettings(**SMALL, **FEW),
    "sdim": SDIMSettings(**SMALL, hashes=4, bits=2),
    "sam 1p": SAMSettings(**SMALL, attention_hidden=5, compression=3, passes=1),
    "sam 2p": SAMSettings(**SMALL, attention_hidden=5, compression=3, passes=2),
    "sam 3p": SAMSettings(**SMALL, attention_hidden=5, compression=3),
    "sam 3p+": SAMSettings(**SMALL, attention_hidden=5, compression=3, enhancement=3),
    "ifa": IFASettings(**SMALL, features=3, layers=2, heads=2, exact_heads=2, relation="softmax"),
    "ifa alone": IFASettings(**SMALL, feature_map="elu1", features=3, recent_events=2, exact_heads=2, relation="none"),
}


def slow_logit(head: Head, read: list[float], statistics: list[float]) -> float:
    """Of one candidate, number by number: BatchNorm → units → PReLU → … → 1 over [read ; statistics], and the linear layer over the statistics."""
    norm = zip(head.norm.mean.tolist(), head.norm.variance.tolist(), head.norm.scale.tolist(), head.norm.shift.tolist(), strict=True)
    x = [
        (v - mean) / math.sqrt(variance + 1e-3) * scale + shift for v, (mean, variance, scale, shift) in zip([*read, *statistics], norm, strict=True)
    ]
    linears = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
    slopes = [layer.weight.item() for layer in head.layers if isinstance(layer, nn.PReLU)]
    for linear, slope in zip(linears, [*slopes, 1.0], strict=True):
        sums = [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)]
        x = [v if v > 0 else slope * v for v in sums]
    (deep,) = x
    return deep + sum(w * v for w, v in zip(head.wide.tolist(), statistics, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("widths", "hidden"), [((3, 2), (200, 80)), ((4,), (6,)), ((), (3, 5, 2)), ((5, 1), ())])
def test_head_equals_the_slow_twin(widths: tuple[int, ...], hidden: tuple[int, ...]) -> None:
    """Parts of these widths, in their order; dropout is off when serving; slopes, running statistics and scales are anything, signs too."""
    torch.manual_seed(0)
    head, random = with_drawn_weights(Head(sum(widths), hidden, 0.5)).eval(), draws(1)
    parts, item_BCF = ([torch.randn(3, 4, w, generator=random).double() for w in each] for each in (widths, (3,)))
    user_BG, lengths = torch.randn(3, 3, generator=random).double(), (4, 1, 0)
    slopes = [layer.weight.item() for layer in head.layers if isinstance(layer, nn.PReLU)]
    assert len(slopes) == len(hidden) and all(abs(slope) > 1e-3 for slope in slopes)
    logits_BC = head(parts, *item_BCF, user_BG, torch.arange(4) < torch.tensor(lengths).unsqueeze(1))
    assert logits_BC.shape == (3, 4)
    for b, C in enumerate(lengths):
        for c in range(C):
            read = [v for part in parts for v in part[b, c].tolist()]
            expected = slow_logit(head, read, [*item_BCF[0][b, c].tolist(), *user_BG[b].tolist()])
            assert logits_BC[b, c].item() == pytest.approx(expected, abs=1e-10)


def test_head_has_the_sizes_it_is_given_and_starts_near_zero() -> None:
    """200 and 80 units by default; the last layer a tenth of torch's start, so that the linear one over the statistics orders at first."""
    torch.manual_seed(0)
    settings = MeanPoolingSettings()
    head = build_model(settings, SIZES).head
    assert settings.hidden == (200, 80)
    linears = [layer for layer in head.layers if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
    assert [tuple(layer.weight.shape) for layer in linears] == [(200, 3 * 32 + 3 * 32 + 6), (80, 200), (1, 80)]
    for layer, factor in zip(linears, (1, 1, 0.1), strict=True):
        bound = factor / math.sqrt(layer.in_features)  # of torch's uniform numbers
        assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound


def slow_things(embedding: BehaviourEmbedding, items: Tensor, categories: Tensor, n: int) -> list[Tensor]:
    """item ‖ category of the n real ones."""
    pairs = zip(items[:n].tolist(), categories[:n].tolist(), strict=True)
    return [torch.cat([embedding.items.table[item], embedding.categories.table[category]]) for item, category in pairs]


class Said:
    """What the symbols of a page mean for one request: [C, *] of its real candidates. Reads are those that the tests of each ranker are held to."""

    def __init__(self, model: Any, history: History, candidates: Candidates, context: Context, b: int) -> None:
        self.model, self.request, self.b = model, (history, candidates, context), b
        self.n, self.C = int(history.lengths_B[b]), int(candidates.lengths_B[b])
        embedding = model.embedding
        self.q = torch.stack(slow_things(embedding, candidates.items_BC[b], candidates.categories_BC[b], self.C))
        things, actions = slow_things(embedding, history.items_BL[b], history.categories_BL[b], self.n), history.actions_BL[b, : self.n].tolist()
        self.things = torch.stack(things) if things else self.q.new_zeros(0, self.q.shape[1])
        self.keys = self.things + embedding.actions[actions] if things else self.things

    def value(self, name: str) -> Tensor:
        """[C, *] of one entry of head([…]), a product where the page has one."""
        first, *others = (self.symbol(part) for part in name.split(" ∗ "))
        for other in others:
            first = first * other
        return first

    def symbol(self, name: str) -> Tensor:
        if name == "newest actions":
            return self.model.embedding.recent(self.request[0], 1)[self.b].expand(self.C, -1)
        if name in ("q", "statistics"):
            _, candidates, context = self.request
            users_CG = context.statistics_BG[self.b].expand(self.C, -1)
            return self.q if name == "q" else torch.cat([candidates.statistics_BCF[self.b, : self.C], users_CG], dim=1).double()
        if name == "Σ_j k_j":
            return self.keys.sum(0).expand(self.C, -1)
        kind = self.model.settings.kind
        return getattr(self, kind if kind not in ("sim", "eta", "twin") else "two_stage")(name)

    def mean_pooling(self, name: str) -> Tensor:
        assert name == "u"
        return (self.keys.sum(0) / max(1, self.n)).expand(self.C, -1)

    def din(self, name: str) -> Tensor:
        assert name == "u"
        reads = [slow_weights(self.model.attention, self.keys, q) @ self.keys if self.n else torch.zeros_like(q) for q in self.q]
        return torch.stack(reads)

    def dien(self, name: str) -> Tensor:
        assert name == "h_n"
        if not self.n:
            return torch.zeros_like(self.q)
        states_LD = self.model.interest(self.keys.unsqueeze(0))[0][0]
        return torch.stack([slow_augru(self.model.evolution, states_LD, slow_weights(self.model.attention, states_LD, q)) for q in self.q])

    def two_stage(self, name: str) -> Tensor:
        assert name == "u"
        model, (history, candidates, context), b = self.model, self.request, self.b
        places_BCK, found_BCK = model.found(history, candidates, context, model.embedding.queries(candidates))
        twin, reads = model.settings.kind == "twin", []
        for c, q in enumerate(self.q):
            at = places_BCK[b, c][found_BCK[b, c]]
            bias = (
                model.bias(history, torch.arange(history.items_BL.shape[1]) < history.lengths_B.unsqueeze(1), context.times_B)[b, at]
                if twin
                else None
            )
            asked = (self.things if twin else self.keys)[at]
            reads.append(slow_attention(model.attention, q, asked, self.keys[at], bias) if len(at) else model.attention.output.bias)
        return torch.stack(reads)

    def sdim(self, name: str) -> Tensor:
        assert name == "u"
        return torch.stack([slow_sdim(self.model, self.keys, q) for q in self.q])

    @cached_property
    def sams(self) -> Tensor:
        """o [C, *]."""
        return slow_read(self.model, self.keys.flip(0).unsqueeze(0), torch.tensor([self.n]), self.q.unsqueeze(0))[0]

    def sam(self, name: str) -> Tensor:
        """o is [s_1 ; m_1 ; … ; s_P ; m_P], or [s_P ; h_3]; the first and last of several passes are named, what is between them is "…"."""
        o, R, D = self.sams, self.model.settings.compression, self.q.shape[1]
        if self.model.enhance is not None:
            return {"s_P": o[:, :R], "h_3": o[:, R:]}[name]
        nothing = o[:, :0]
        one = {"s_1": o[:, :R], "m_1": o[:, R : R + D], "…": o[:, R + D : -(R + D)]}
        last = {"s_P": o[:, -(R + D) : -D], "m_P": o[:, -D:]} if self.model.settings.passes > 1 else {"…": nothing, "s_P": nothing, "m_P": nothing}
        return (one | last)[name]

    def ifa(self, name: str) -> Tensor:
        """O and X are held to their equations in test_ifa.py; here Y is X and what candidates say of each other."""
        history, _, _ = self.request
        queries_BCD = self.model.embedding.queries(self.request[1])
        read_CD, x_CD = (part_BCD[self.b, : self.C] for part_BCD in self.model.read(history, queries_BCD))
        if name != "Y" or self.model.relation is None:
            return {"O": read_CD, "X": x_CD, "Y": x_CD}[name]
        norm, attention, output = self.model.relation.norm, self.model.relation.softmax, self.model.relation.output
        spread = (x_CD.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        normal_1CD = ((x_CD - x_CD.mean(1, keepdim=True)) / spread * norm.weight + norm.bias).unsqueeze(0)
        return x_CD + slow_cross(attention, normal_1CD, normal_1CD, [self.C])[0][0] @ output.weight.T + output.bias


def a_request() -> tuple[History, Candidates, Context]:
    """No history, one event, as many as are read; one candidate and several."""
    return make_history(1, (0, 1, 5, 12)), make_candidates(1, (3, 1, 2, 3)), make_context(1, 4)


def said_by_the_page(settings: Any) -> list[str]:
    """The entries of the page's head([…]); SAM has two such lines, the second one for the enhancement."""
    lines = re.findall(r" logit = head\(\[(.+?)\]\)", (PAGES / f"{settings.kind}.md").read_text(encoding="utf-8"))
    assert len(lines) == (2 if settings.kind == "sam" else 1), lines
    return lines[1 if getattr(settings, "enhancement", 0) else 0].split(" ; ")


def test_every_ranker_with_a_head_is_here() -> None:
    missing = {kind for stage, kind in MODELS if stage == "ranking"} - {"popularity"} - {settings.kind for settings in RANKERS.values()}
    assert not missing, f"{sorted(missing)}: expected a line in RANKERS and its equations in {Said.__name__}"


@torch.no_grad()
@pytest.mark.parametrize("settings", RANKERS.values(), ids=RANKERS.keys())
def test_logits_are_those_of_the_page(settings: Any) -> None:
    """What goes into the head, entry by entry and in the page's order, and what comes out; users without history, sets of one candidate."""
    torch.manual_seed(3)
    model, request = with_drawn_weights(build_model(settings, SIZES)).eval(), a_request()
    inputs: list[Any] = []
    handle = model.head.register_forward_pre_hook(lambda module, given: inputs.extend(given))
    logits_BC = model(*request)
    handle.remove()
    parts, item_BCF, user_BG, mask_BC = inputs
    assert torch.equal(mask_BC, torch.arange(3) < request[1].lengths_B.unsqueeze(1))
    *read, statistics = said_by_the_page(settings)
    assert statistics == "statistics"
    for b, C in enumerate(request[1].lengths_B.tolist()):
        said = Said(model, *request, b)
        expected_CX, statistics_CS = torch.cat([said.value(name) for name in read], dim=1), said.value(statistics)
        torch.testing.assert_close(torch.cat([part[b, :C] for part in parts], dim=1), expected_CX, **CLOSE)
        assert torch.equal(torch.cat([item_BCF[b, :C], user_BG[b].expand(C, -1)], dim=1).double(), statistics_CS)
        for c in range(C):
            expected = slow_logit(model.head, expected_CX[c].tolist(), statistics_CS[c].tolist())
            assert logits_BC[b, c].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@torch.no_grad()
def test_the_auxiliary_logits_of_a_soft_search_are_those_of_its_page() -> None:
    """head_a([q ; 1/n Σ_j r_j k_j ; statistics]), r_j = (q W_a) · (k_j W_b)."""
    torch.manual_seed(3)
    model, request = with_drawn_weights(build_model(RANKERS["sim soft"], SIZES)).eval(), a_request()
    own_BC, auxiliary_BC = model.training_logits(*request)
    assert torch.equal(own_BC, model(*request))
    for b, C in enumerate(request[1].lengths_B.tolist()):
        said = Said(model, *request, b)
        for c, q in enumerate(said.q):
            mean = sum((((q @ model.soft.query) @ (k @ model.soft.key)) * k for k in said.keys), torch.zeros_like(q)) / max(1, said.n)
            expected = slow_logit(model.soft.head, [*q.tolist(), *mean.tolist()], said.value("statistics")[c].tolist())
            assert auxiliary_BC[b, c].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert len(said.q) == C
