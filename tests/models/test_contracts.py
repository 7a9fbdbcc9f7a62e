"""Every model against every assertion of tests/contracts."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import nn

from longtrail.config import (
    BERT4RecSettings,
    BlossomSettings,
    DIENSettings,
    DINSettings,
    ETASettings,
    FullAttentionSettings,
    GRU4RecSettings,
    IFASettings,
    MarkovSettings,
    MeanPoolingSettings,
    PopularityRankerSettings,
    PopularityRetrieverSettings,
    RecJPQItemsSettings,
    SAMSettings,
    SASRecSettings,
    SDIMSettings,
    SIMSettings,
    TWINSettings,
)
from longtrail.models.contracts import Candidates, Context, Grows, History, Ranker, Retriever, RowRetriever
from longtrail.models.encoders.markov import Markov
from longtrail.models.masks import padding_mask
from longtrail.models.rankers.din import DIN
from longtrail.models.registry import MODELS, build_model
from tests.contracts import rankers, retrievers, saving
from tests.contracts.batches import SIZES, make_history, make_request
from tests.contracts.slots import ATTENTIONS, TABLES, slots_of

RECJPQ: dict[str, Any] = {"items": RecJPQItemsSettings(splits=2, codes=16)}
ADDED: dict[str, Any] = {"items": RecJPQItemsSettings(splits=3, codes=16, composition="sum")}
SMALL: dict[str, Any] = {"width": 4, "hidden": (12, 8), "max_history": 12}
FEW: dict[str, Any] = {"top_k": 3, "heads": 2}
BLOSSOM: dict[str, Any] = {"window": 2, "block": 2, "stride": 2, "compression": 3, "selected": 1}  # sparse within a few events
LEARNED: dict[str, Any] = {"attention": FullAttentionSettings(positions="learned")}
RANKERS: dict[str, Any] = {
    "din linear": DINSettings(**SMALL, attention_hidden=(6,)),
    "din sigmoid": DINSettings(**SMALL, attention_hidden=(6,), attention_weights="sigmoid"),
    "din softmax": DINSettings(**SMALL, attention_hidden=(6, 5), attention_weights="softmax"),
    "sam": SAMSettings(**SMALL, attention_hidden=5, compression=3),
    "sam one pass, short compression": SAMSettings(**{**SMALL, "max_history": 4}, passes=1, compression=8),
    "sam released": SAMSettings(**SMALL, feedback=False, compression=0, read_scale="sqrt"),
    "sam 3p+": SAMSettings(**SMALL, enhancement=3, attention_weights="scaled_sigmoid"),
    "sam softmax": SAMSettings(**SMALL, passes=2, attention_weights="softmax_eps", read_scale="norm"),
    "sam mean": SAMSettings(**SMALL, read_scale="mean", attention_init="log_length"),
    "mean pooling": MeanPoolingSettings(**SMALL),
    "dien": DIENSettings(**SMALL, attention_hidden=(6, 5)),
    "sim hard": SIMSettings(**SMALL, **FEW),
    "sim soft": SIMSettings(**SMALL, **FEW, search="soft"),
    "eta": ETASettings(**SMALL, **FEW, bits=5),
    "twin": TWINSettings(**SMALL, **FEW),
    "twin, top-k beyond the history": TWINSettings(**SMALL, top_k=50, heads=4),
    "sdim": SDIMSettings(**SMALL, hashes=4, bits=2),
    "ifa": IFASettings(**SMALL, features=3, relation_dropout=0.0),
    "ifa two layers": IFASettings(**SMALL, heads=2, layers=2, recent_events=3, half_life_days=0.001, relation="linear", relation_dropout=0.0),
    "ifa shares, alone": IFASettings(**SMALL, feature_map="shares", relation="none"),
    "ifa softmax": IFASettings(**SMALL, feature_map="softmax", relation="none"),
    "ifa recjpq": IFASettings(**SMALL, **RECJPQ, relation="none"),
    "mean pooling recjpq": MeanPoolingSettings(**SMALL, **RECJPQ),
    "mean pooling recjpq added": MeanPoolingSettings(**SMALL, **ADDED),
    "dien recjpq": DIENSettings(**SMALL, **RECJPQ, attention_hidden=(6,)),
    "sim hard recjpq": SIMSettings(**SMALL, **FEW, **RECJPQ),
    "sim soft recjpq": SIMSettings(**SMALL, **FEW, **RECJPQ, search="soft"),
    "eta recjpq": ETASettings(**SMALL, **FEW, **RECJPQ, bits=8),
    "twin recjpq": TWINSettings(**SMALL, **FEW, **RECJPQ),
    "sdim recjpq": SDIMSettings(**SMALL, **RECJPQ, hashes=4, bits=2),
    "din recjpq": DINSettings(**SMALL, **RECJPQ, attention_hidden=(6,)),
    "sam recjpq": SAMSettings(**SMALL, **RECJPQ, attention_hidden=5, compression=3),
}
RETRIEVERS: dict[str, Any] = {
    "sasrec": SASRecSettings(width=8, blocks=2, heads=2, max_history=20),
    "sasrec one head": SASRecSettings(width=8, blocks=1, heads=1, max_history=17, dropout=0.0),
    "sasrec recjpq": SASRecSettings(width=8, blocks=2, heads=2, max_history=20, **RECJPQ),
    "sasrec recjpq added": SASRecSettings(width=8, blocks=2, heads=2, max_history=20, **ADDED),
    "sasrec blossom": SASRecSettings(width=8, blocks=1, heads=2, attention=BlossomSettings(**BLOSSOM)),
    "sasrec blossom recjpq": SASRecSettings(width=8, blocks=1, heads=2, attention=BlossomSettings(**BLOSSOM, selector="straight_through"), **RECJPQ),
    "sasrec learned": SASRecSettings(width=8, blocks=1, heads=2, max_history=20, **LEARNED),
    "sasrec learned recjpq": SASRecSettings(width=8, blocks=2, heads=4, max_history=20, **LEARNED, **ADDED),
    "bert4rec": BERT4RecSettings(width=8, blocks=2, heads=2, max_history=20),
    "bert4rec recjpq": BERT4RecSettings(width=8, blocks=1, heads=1, max_history=20, max_masked=2, mask_share=1.0, **RECJPQ),
    "bert4rec blossom": BERT4RecSettings(width=8, blocks=1, heads=2, attention=BlossomSettings(**BLOSSOM, selector="compressed")),
    "bert4rec blossom recjpq": BERT4RecSettings(width=8, blocks=1, heads=2, attention=BlossomSettings(**{**BLOSSOM, "selected": 4}), **RECJPQ),
    "bert4rec learned": BERT4RecSettings(width=8, blocks=2, heads=2, max_history=20, **LEARNED),
    "bert4rec learned recjpq": BERT4RecSettings(width=8, blocks=1, heads=1, max_history=20, **LEARNED, **RECJPQ),
    "gru4rec": GRU4RecSettings(width=8),
    "gru4rec recjpq": GRU4RecSettings(width=8, layers=2, **RECJPQ),
}
COUNTED: dict[str, Any] = {
    "clicks": PopularityRankerSettings(by="clicks"),
    "click rate": PopularityRankerSettings(by="click_rate"),
    "popularity retriever": PopularityRetrieverSettings(),
    "markov": MarkovSettings(),
}


def built(settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(settings, SIZES)
    random = np.random.default_rng(0)
    if isinstance(model, Markov):
        counts_NN = csr_matrix(random.poisson(0.2, (SIZES.items + 1, SIZES.items + 1)) * (np.outer(*[np.arange(SIZES.items + 1)] * 2) > 0))
        model.count(transitions_NN=counts_NN, events=np.asarray(counts_NN.sum(0)).ravel())
    elif hasattr(model, "fit"):
        impressions = random.integers(0, 50, SIZES.items + 1)
        model.fit(events=impressions * 2, impressions=impressions, clicks=random.binomial(impressions, 0.3), prior_click_rate=0.3)
    return model


def names(settings: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("settings", settings.values(), ids=settings.keys())


def checks(functions: tuple[Callable[..., None], ...]) -> Any:
    return pytest.mark.parametrize("check", functions, ids=lambda f: f.__name__.removeprefix("assert_"))


@names(RANKERS)
@checks(rankers.UNTRAINED + rankers.TRAINED)
def test_trained_ranker(settings: Any, check: Callable[..., None]) -> None:
    check(built(settings))


@names({name: settings for name, settings in RANKERS.items() if not settings._looks_across()})
@checks(rankers.POINTWISE)
def test_point_wise_ranker(settings: Any, check: Callable[..., None]) -> None:
    check(built(settings))


@names({name: COUNTED[name] for name in ("clicks", "click rate")})
@checks(rankers.UNTRAINED + rankers.POINTWISE)
def test_counted_ranker(settings: Any, check: Callable[..., None]) -> None:
    check(built(settings))


@names(RETRIEVERS)
@checks(retrievers.UNTRAINED + retrievers.ENCODERS)
def test_trained_retriever(settings: Any, check: Callable[..., None]) -> None:
    check(built(settings))


@names({name: settings for name, settings in RETRIEVERS.items() if settings.kind != "bert4rec"})
@checks(retrievers.CAUSAL)
def test_causal_encoder(settings: Any, check: Callable[..., None]) -> None:
    check(built(settings))


@names({name: settings for name, settings in RETRIEVERS.items() if settings.kind == "bert4rec"})
@checks(retrievers.CLOZE)
def test_cloze_encoder(settings: Any, check: Callable[..., None]) -> None:
    check(built(settings))


@checks(retrievers.UNTRAINED)
def test_counted_retriever(check: Callable[..., None]) -> None:
    check(built(COUNTED["popularity retriever"]))


@checks(tuple(check for check in retrievers.UNTRAINED if check is not retrievers.assert_vectors_fit_each_other))
def test_markov(check: Callable[..., None]) -> None:
    check(built(COUNTED["markov"]))


@names(RANKERS | RETRIEVERS | COUNTED)
def test_every_model_on_disk(settings: Any, tmp_path: Path) -> None:
    saving.assert_settings_survive(settings)
    model = built(settings)
    loaded = saving.assert_saved_is_loaded(model, settings, tmp_path / "model")
    with torch.no_grad():
        if settings.stage == "ranking":
            assert isinstance(model, Ranker)
            assert torch.equal(model.eval()(*make_request()), loaded(*make_request()))
        else:
            assert isinstance(model, RowRetriever if settings.kind == "markov" else Retriever)
            assert torch.equal(model.eval().user_vectors(make_history()), loaded.user_vectors(make_history()))


@names(RANKERS | RETRIEVERS)
def test_what_grows_with_the_data_says_so(settings: Any) -> None:
    """A tensor with a row for each item, category or action is in its part's `axes`: training that goes on from newer data finds it there."""
    model = build_model(settings, SIZES)
    parts, before = dict(model.named_modules()), model.state_dict()
    for field in ("items", "categories", "actions"):
        larger = build_model(settings, replace(SIZES, **{field: getattr(SIZES, field) + 1})).state_dict()
        grown = {name for name in before if before[name].shape != larger[name].shape}
        declared = set()
        for name in before:
            owner, _, leaf = name.rpartition(".")
            part = parts[owner]
            if isinstance(part, Grows) and part.axes.get(leaf) == field:
                declared.add(name)
        assert grown == declared, field


class UnmaskedDecay(DIN):
    """As one may write it first: a memory of a month over all places, those of padding too."""

    def forward(self, history: History, candidates: Candidates, context: Context) -> torch.Tensor:
        months_BL = (context.times_B.unsqueeze(1) - history.times_BL).float() / (30 * 86_400_000_000)
        return super().forward(history, candidates, context) + 0.01 * (-months_BL).softmax(1).square().sum(1, keepdim=True)


def test_the_contracts_see_times_that_are_read_of_padding() -> None:
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        rankers.assert_padding_content_changes_nothing(UnmaskedDecay(DINSettings(**SMALL), SIZES))


def test_every_kind_of_the_registry_is_held_to_the_contracts() -> None:
    """Every kind, with every item table it can have and every attention it can have."""
    tried, wanted = set(), set()
    for settings in (RANKERS | RETRIEVERS | COUNTED).values():
        tried.add((settings.stage, settings.kind, *slots_of(settings)))
        tables = TABLES if hasattr(settings, "items") else (None,)
        attentions = ATTENTIONS if hasattr(settings, "attention") else (None,)
        for table, attention in itertools.product(tables, attentions):
            wanted.add((settings.stage, settings.kind, *((n, k) for n, k in (("items", table), ("attention", attention)) if k)))
    untried = set(MODELS) - {(stage, kind) for stage, kind, *_ in tried}
    assert not untried, f"{sorted(untried)}: expected a line in RANKERS, RETRIEVERS or COUNTED of this file"
    assert tried == wanted, f"expected a line for each: {sorted(wanted - tried)}; not known to tests/contracts/slots.py: {sorted(tried - wanted)}"


@names(RANKERS | RETRIEVERS)
def test_half_precision_trains(settings: Any) -> None:
    """Forward and backward under bf16 autocast, as training on a GPU does: finite, and near float32."""
    model = built(settings).eval()
    request = make_request()
    mask = padding_mask(request[1].lengths_B, 6)

    def output() -> torch.Tensor:
        return model(*request)[mask] if settings.stage == "ranking" else model.user_vectors(request[0])

    exact = output().detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = output()
    half.float().sum().backward()
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
