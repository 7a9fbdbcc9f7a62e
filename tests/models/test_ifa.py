"""IFA: linear attention against the explicit one, user states in pieces, candidates that see each other or do not."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models import peak_bytes
from longtrail.config import IFASettings
from longtrail.models.attention.feature_maps import FEATURE_MAPS
from longtrail.models.attention.user_state import DAY
from longtrail.models.masks import padding_mask
from longtrail.models.order import newest
from longtrail.models.rankers.ifa import IFA
from tests.contracts.batches import SIZES, draws, make_candidates, make_context, make_history, make_request
from tests.contracts.largest import Largest
from tests.models.attention.test_cross import slow_cross
from tests.models.attention.test_linear import EXACT, LENGTHS, make_attention, random_inputs, slow_read


def make_ifa(**changes: Any) -> IFA:
    torch.manual_seed(1)
    settings = {"width": 4, "heads": 2, "features": 3, "layers": 2, "exact_heads": 2, "hidden": (8, 4), "max_history": 12, "relation": "none"}
    return IFA(IFASettings(**(settings | changes)), SIZES).double().eval()


def slow_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * norm.weight + norm.bias


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"relation": "none"},
        {"relation": "softmax", "half_life_days": 1e-4},
        {"relation": "linear", "layers": 1, "recent_events": 3},
        {"feature_map": "softmax", "relation": "softmax", "recent_events": 2},
        {"feature_map": "elu1", "relation": "softmax", "half_life_days": 1e-4},
    ],
    ids=str,
)
def test_what_the_head_is_given_is_the_equations(changes: dict[str, Any]) -> None:
    """[q ; q * O ; X ; Y], layer by layer: X = X + W O + b, + the exact branch, + FFN(LN X); Y = X + attention of LN X among the real candidates."""
    model, (history, candidates, context) = make_ifa(**changes), make_request()
    caught: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, inputs: caught.extend(inputs[0]))
    model(history, candidates, context)
    lengths, sizes = history.lengths_B.tolist(), candidates.lengths_B.tolist()
    keys_BLD, mask_BL = model._keys(history)
    query_BCD = model.embedding.queries(candidates)
    x = first = query_BCD
    for i, layer in enumerate(model.layers):
        normal = slow_norm(layer.norm, x) if layer.norm is not None else x
        asked = x if model.settings.feature_map == "clusters" else normal
        whole = slow_cross(layer.whole, normal, keys_BLD, lengths)[0] if layer.whole is not None else None
        read = slow_read(model.attention, (keys_BLD, mask_BL, history.times_BL, asked), i) if whole is None else whole
        first = read if i == 0 else first
        x = x + read @ layer.output.weight.T + layer.output.bias
        if layer.recent is not None:
            few = model.settings.recent_events
            newest_BRD = torch.stack(
                [nn.functional.pad(keys[max(0, n - few) : n], (0, 0, 0, few - min(n, few))) for keys, n in zip(keys_BLD, lengths, strict=True)]
            )
            x = x + slow_cross(layer.recent, normal, newest_BRD, [min(n, few) for n in lengths])[0] @ layer.recent_output.weight.T
        norm, widen, _, _, narrow = layer.feed
        inner = slow_norm(norm, x) @ widen.weight.T + widen.bias
        x = x + (inner * 0.5 * (1 + torch.erf(inner / 2**0.5))) @ narrow.weight.T + narrow.bias
    y = x
    if model.relation is not None:
        mask_BC = padding_mask(candidates.lengths_B, 6)
        normal = slow_norm(model.relation.norm, x).masked_fill(~mask_BC.unsqueeze(-1), 0)
        if model.relation.softmax is not None:
            among = slow_cross(model.relation.softmax, normal, normal, sizes)[0]
        else:
            among = slow_read(model.relation.linear, (normal, mask_BC, torch.zeros(5, 6, dtype=torch.int64), normal), 0)
        y = x + among @ model.relation.output.weight.T + model.relation.output.bias
    real = padding_mask(candidates.lengths_B, 6)
    for found, expected in zip(caught[:-1], (query_BCD, query_BCD * first, x, y), strict=True):
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-10)


@torch.no_grad()
def test_every_head_forgets_at_its_own_rate() -> None:
    """The first head's half-life is the one asked for, each next head's a quarter of the one before, in every layer; and a half-life halves."""
    model = make_ifa(half_life_days=8.0, heads=2, layers=2)
    assert model.attention is not None
    rates = model.attention.rates()
    assert rates is not None
    torch.testing.assert_close(0.6931471805599453 / rates, torch.tensor([8.0, 2.0, 8.0, 2.0], dtype=torch.float64), rtol=1e-5, atol=0)
    state = model.state(make_history(1, (1,)))
    later = state.at(state.times_B + 8 * DAY)
    torch.testing.assert_close(later.norms_BGF, state.norms_BGF * torch.tensor([0.5, 0.0625, 0.5, 0.0625]).double().view(1, 4, 1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("feature_map", "half_life_days"),
    [*((name, None) for name in (*FEATURE_MAPS, "softmax")), *((name, 1e-3) for name in ("elu1", "relu", "shares", "clusters"))],
)
def test_weights_are_what_reading_does(feature_map: str, half_life_days: float | None) -> None:
    """Not negative and adding up to 1 (clusters: to less; linrec is neither), zero on padding; over values they give the read."""
    model, (history, candidates, _) = make_ifa(feature_map=feature_map, half_life_days=half_life_days), make_request()
    weights_BCL = model.behaviour_weights(history, candidates)
    mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
    assert weights_BCL.shape == (*candidates.items_BC.shape, history.items_BL.shape[1])
    assert not weights_BCL.masked_select(~mask_BL.unsqueeze(1)).any()
    if feature_map != "linrec":
        assert (weights_BCL >= 0).all()
    if feature_map == "clusters":
        assert (weights_BCL.sum(-1) < 1).all() and (weights_BCL.sum(-1)[history.lengths_B > 0] > 0).all()
    elif feature_map != "linrec":
        torch.testing.assert_close(weights_BCL.sum(-1), (history.lengths_B > 0).double().unsqueeze(1).expand(weights_BCL.shape[:2]), **EXACT)
    if feature_map != "softmax":
        attention, inputs = make_attention(feature_map, None if half_life_days is None else 1.0, heads=1, features=8), random_inputs()
        weights_BCL = attention.weights(inputs[3], *inputs[:3])
        read_BCD = attention.read(inputs[3], attention.state(*inputs[:3]), 0)
        torch.testing.assert_close(weights_BCL @ inputs[0] @ attention.values[0], read_BCD, rtol=0, atol=1e-12)


@pytest.mark.parametrize("relation", ["softmax", "linear"])
def test_the_relation_looks_at_real_candidates_alone(relation: str) -> None:
    """Changing another candidate changes a logit; changing what stands in padding, or asking without the relation, does not."""
    model, (history, candidates, context) = make_ifa(relation=relation), make_request()
    other = replace(candidates, items_BC=candidates.items_BC.clone())
    other.items_BC[:, -1] = other.items_BC[:, -1] % SIZES.items + 1  # a real candidate of requests 0 and 3, padding of the others
    with torch.no_grad():
        before_BC, after_BC = model(history, candidates, context), model(history, other, context)
        assert (before_BC[[0, 3], 0] != after_BC[[0, 3], 0]).all()
        assert torch.equal(before_BC[[1, 2, 4], 0], after_BC[[1, 2, 4], 0])
        alone = [model(history, c, context, relation=False)[:, :-1] for c in (candidates, other)]
        assert torch.equal(alone[0][[0, 3]], alone[1][[0, 3]])


def test_linear_relation_equals_explicit() -> None:
    model, (_, candidates, _) = make_ifa(relation="linear"), make_request()
    assert model.relation is not None and model.relation.linear is not None
    mask_BC = padding_mask(candidates.lengths_B, 6)
    x_BCD = torch.randn(5, 6, 8, generator=draws(1), dtype=torch.float64)
    normal_BCD = model.relation.norm(x_BCD).masked_fill(~mask_BC.unsqueeze(-1), 0)
    slow = slow_read(model.relation.linear, (normal_BCD, mask_BC, torch.zeros(5, 6, dtype=torch.int64), normal_BCD), 0)
    torch.testing.assert_close(model.relation(x_BCD, mask_BC), model.relation.output(slow), rtol=0, atol=1e-12)


def test_relation_dropout_is_by_request_and_only_in_training() -> None:
    """The share that is set is the share of requests without the relation, not of those with it."""
    model = make_ifa(relation="softmax", relation_dropout=0.2)
    x_BCD = torch.ones(4000, 2, 1)
    assert torch.equal(model._kept(x_BCD), x_BCD)
    model.train()
    kept = model._kept(x_BCD)
    assert torch.equal(kept[:, 0], kept[:, 1])
    assert kept.unique().tolist() == [0.0, 1.0]
    assert 0.77 < kept.mean().item() < 0.83


@torch.no_grad()
def test_dropout_is_of_the_feed_forward_net_too() -> None:
    """In training X is another each time, and so it is not without dropout, nor in eval mode."""
    for dropout, training, same in ((0.5, True, False), (0.5, False, True), (0.0, True, True)):
        model, (history, candidates, _) = make_ifa(dropout=dropout).train(training), make_request()
        (_, one_BCD), (_, other_BCD) = (model.read(history, model.embedding.queries(candidates)) for _ in range(2))
        assert torch.equal(one_BCD, other_BCD) == same


@torch.no_grad()
def test_features_start_as_clusters_of_what_it_is_told_of() -> None:
    """Of vectors item ‖ category, without an action, as many of each as it was named; maps without clusters are left as they are."""
    items, categories = torch.tensor([1, 2, 2, 7, 30, 40, 40, 40]), torch.tensor([1, 0, 0, 6, 2, 2, 2, 2])
    for feature_map, clusters in (("clusters", True), ("elu1", False), ("softmax", False)):
        model = make_ifa(feature_map=feature_map)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.start_attention(items, categories)
        after = model.state_dict()
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed == ({f"attention.{name}" for name in ("keys", "queries", "key_bias", "query_bias")} if clusters else set())
        if clusters:
            other = make_ifa().attention
            assert other is not None
            other.start_clusters(torch.cat([model.embedding.items.table[items], model.embedding.categories.table[categories]], dim=1))  # type: ignore[union-attr,index]
            assert all(torch.equal(after[f"attention.{name}"], value) for name, value in other.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("feature_map", ["clusters", "elu1", "softmax"])
def test_a_read_starts_in_the_candidates_terms(feature_map: str) -> None:
    """Where all events are asked alike, O is their mean (of clusters, less by p = 1), in every layer, and W_O adds it to the candidate as it is."""
    model, (history, candidates, _) = make_ifa(feature_map=feature_map), make_request()
    for name, parameter in model.named_parameters():
        if name in ("attention.keys", "attention.key_bias") or name.endswith("whole.queries.weight"):
            parameter.zero_()
    keys_BLD, mask_BL = model._keys(history)
    n_B1, query_BCD = mask_BL.sum(1, keepdim=True), model.embedding.queries(candidates)
    mean_B1D = (keys_BLD.sum(1) / n_B1.clamp(min=1)).unsqueeze(1).expand_as(query_BCD)
    if feature_map == "clusters":  # φ(k) is 1 / F for each feature, and so is φ(q)ᵀ φ(k)
        share_B1 = n_B1 / model.settings.features
        mean_B1D = mean_B1D * (share_B1 / (share_B1 + 1)).unsqueeze(1)
    for layer in model.layers:
        layer.feed[-1].weight.zero_()  # type: ignore[index,union-attr]
        layer.feed[-1].bias.zero_()  # type: ignore[index,union-attr]
        layer.output.bias.zero_()  # type: ignore[union-attr]
    read_BCD, x_BCD = model.read(history, query_BCD)
    torch.testing.assert_close(read_BCD, mean_B1D, rtol=0, atol=1e-7)  # p was made in float32
    torch.testing.assert_close(x_BCD, query_BCD + 2 * mean_B1D, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("length", "candidates"), [(256, 48), (512, 48), (256, 96)])
def test_nothing_of_candidates_times_history_is_made(length: int, candidates: int) -> None:
    """Forward and backward: the largest tensor is of features [B, L, X] or of the head [B, C, 7D + 6], and the state does not grow with L."""
    torch.manual_seed(0)
    model = IFA(IFASettings(width=8, max_history=length, hidden=(8,), relation="linear"), SIZES)
    history, set_ = make_history(0, (length, length - 3)), make_candidates(0, (candidates, 7))
    with Largest() as largest:
        model(history, set_, make_context(0, 2)).sum().backward()
    assert largest.elements <= 2 * max(length * 32, candidates * (7 * 16 + 6))
    assert largest.elements < 2 * length * candidates
    assert model.state(history).flat().shape == (2, 5 + 32 * (16 + 1))


@pytest.mark.parametrize("relation", ["none", "linear"])
def test_memory_doubles_with_the_history_and_grows_by_what_a_candidate_takes(relation: str) -> None:
    """What a training step holds at most, measured: twice the history, twice the memory; twice the candidates, as much more whatever L."""
    model = IFA(IFASettings(width=8, max_history=8192, hidden=(8,), relation=relation), SIZES)  # type: ignore[arg-type]

    def held(length: int, candidates: int) -> int:
        history, set_, context = make_history(0, (length,)), make_candidates(0, (candidates,)), make_context(0, 1)
        return peak_bytes(lambda: model(history, set_, context).sum().backward())

    held(64, 8)
    short, long, short_wide, long_wide = held(2048, 48), held(4096, 48), held(2048, 96), held(4096, 96)
    assert 1.8 < long / short < 2.1
    assert short_wide - short < 48 * 40 * 16 * 4 and long_wide - long < 48 * 40 * 16 * 4  # bytes: forty times the width a candidate, whatever L


def test_newest_events() -> None:
    history = make_history(0, LENGTHS)
    cut = newest(history, 4)
    assert cut.lengths_B.tolist() == [0, 1, 4, 4, 4]
    for b, n in enumerate(LENGTHS):
        assert torch.equal(cut.items_BL[b, : min(n, 4)], history.items_BL[b, max(0, n - 4) : n])
    assert newest(history, 12) is history
