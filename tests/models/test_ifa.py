"""IFA: linear attention against the explicit one, user states in pieces, candidates that see each other or do not."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longtrail.config import IFASettings
from longtrail.errors import StateError
from longtrail.models.attention import linear
from longtrail.models.attention.linear import FEATURE_MAPS, LinearAttention
from longtrail.models.attention.user_state import DAY, UserState
from longtrail.models.contracts import Candidates, History
from longtrail.models.masks import padding_mask
from longtrail.models.order import newest
from longtrail.models.rankers.ifa import IFA, between
from tests.contracts.batches import SIZES, draws, make_candidates, make_context, make_history, make_request, with_garbage, with_padding
from tests.models.attention.test_cross import slow_cross
from tests.models.test_sam import Largest

EXACT = {"rtol": 0.0, "atol": 1e-12}
LENGTHS = (0, 1, 5, 12, 7)


def make_ifa(**changes: Any) -> IFA:
    torch.manual_seed(1)
    settings = {"width": 4, "heads": 2, "features": 3, "layers": 2, "hidden": (8, 4), "max_history": 12, "relation": "none"} | changes
    return IFA(IFASettings(**settings), SIZES).double().eval()


def make_attention(feature_map: str, half_life_days: float | None = None, **changes: Any) -> LinearAttention:
    torch.manual_seed(2)
    sizes = {"heads": 2, "features": 3, "layers": 2} | changes
    return LinearAttention(8, feature_map=feature_map, half_life_days=half_life_days, **sizes).double()


def random_inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys (zeros on padding), mask, times over some days, queries."""
    random, lengths_B = draws(seed), torch.tensor(LENGTHS)
    mask_BL = padding_mask(lengths_B, max(LENGTHS))
    keys_BLD = torch.randn(*mask_BL.shape, 8, generator=random, dtype=torch.float64) * mask_BL.unsqueeze(-1)
    times_BL = torch.randint(1, 9 * DAY, mask_BL.shape, generator=random) * mask_BL
    return keys_BLD, mask_BL, times_BL, torch.randn(len(LENGTHS), 4, 8, generator=random, dtype=torch.float64)


def slow_read(attention: LinearAttention, inputs: tuple[Tensor, Tensor, Tensor, Tensor], layer: int) -> Tensor:
    """Pair by pair, head by head: Σ_l w(c, l) v_l with the weights written out."""
    H, F, outputs = attention.heads, attention.shape["features"], []
    for keys, mask, times, queries in zip(*inputs, strict=True):
        k, t = keys[mask], times[mask]
        rows = []
        for q in queries:
            parts = []
            for h in range(H):
                g = layer * H + h
                phi_q = attention.map.queries((q @ attention.queries[layer][:, h * F : (h + 1) * F]) * attention.temperature[g])
                phi_k = attention.map.keys((k @ attention.keys[:, g * F : (g + 1) * F]) * attention.temperature[g])
                if attention.log_rates is not None and len(t):
                    phi_k = phi_k * torch.exp(-attention.log_rates[g].exp() * (t.max() - t).double() / DAY).unsqueeze(-1)
                if attention.map.divide == "feature":
                    phi_k = phi_k / phi_k.sum(0)
                w = phi_k @ phi_q
                if attention.map.divide == "sum":
                    w = w / w.sum()
                elif attention.map.divide == "none":
                    w = w / F**0.5
                parts.append(w @ (k @ attention.values[g]))
            rows.append(torch.cat(parts))
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


@pytest.mark.parametrize("half_life_days", [None, 2.0])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_linear_equals_explicit(feature_map: str, half_life_days: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All users at once, and in blocks of two; with the read of an empty history exactly zero."""
    attention, inputs = make_attention(feature_map, half_life_days), random_inputs()
    for block in (1 << 14, 2 * max(LENGTHS)):
        monkeypatch.setattr(linear, "BLOCK", block)
        for layer in (0, 1):
            with torch.no_grad():
                read = attention.read(inputs[3], attention.state(*inputs[:3]), layer)
                torch.testing.assert_close(read, slow_read(attention, inputs, layer), rtol=0, atol=1e-10)
            assert not read[0].any()


def test_linear_equals_explicit_in_float32() -> None:
    attention, inputs = make_attention("elu1"), random_inputs()
    with torch.no_grad():
        exact = slow_read(attention, inputs, 0)
        attention, inputs = attention.float(), tuple(x.float() if x.is_floating_point() else x for x in inputs)  # type: ignore[assignment]
        torch.testing.assert_close(attention.read(inputs[3], attention.state(*inputs[:3]), 0).double(), exact, rtol=0, atol=1e-4)


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
    ],
    ids=str,
)
def test_what_the_head_is_given_is_the_equations(changes: dict[str, Any]) -> None:
    """[q ; X ; Y], layer by layer: X = X + W O + b, + the exact branch, + FFN(LN X); Y = X + attention of LN X among the real candidates."""
    model, (history, candidates, context) = make_ifa(**changes), make_request()
    caught: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, inputs: caught.extend(inputs[0]))
    model(history, candidates, context)
    lengths, sizes = history.lengths_B.tolist(), candidates.lengths_B.tolist()
    keys_BLD, mask_BL = model._keys(history)
    query_BCD = model.embedding.queries(candidates)
    x = query_BCD
    for i, layer in enumerate(model.layers):
        normal = slow_norm(layer.norm, x)
        whole = slow_cross(layer.whole, normal, keys_BLD, lengths)[0] if layer.whole is not None else None
        read = slow_read(model.attention, (keys_BLD, mask_BL, history.times_BL, normal), i) if whole is None else whole
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
    assert len(caught) == 3
    for found, expected in zip(caught, (query_BCD, x, y), strict=True):
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


@pytest.mark.parametrize(("feature_map", "half_life_days"), [("elu1", None), ("squared_relu", 2.0), ("shares", 2.0), ("linrec", None)])
def test_gradients_are_those_of_the_explicit_read(feature_map: str, half_life_days: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the keys, the queries and every parameter; blocks of two users."""
    monkeypatch.setattr(linear, "BLOCK", 2 * max(LENGTHS))
    attention, inputs = make_attention(feature_map, half_life_days), random_inputs()
    asked = [inputs[0].requires_grad_(), inputs[3].requires_grad_(), *attention.parameters()]
    inputs = (inputs[0] * inputs[1].unsqueeze(-1), *inputs[1:])  # padded keys are constants
    weights = torch.randn(len(LENGTHS), 4, 8, generator=draws(5), dtype=torch.float64)
    state = attention.state(*inputs[:3])
    fast = torch.autograd.grad(sum((attention.read(inputs[3], state, i) * weights).sum() for i in (0, 1)), asked, retain_graph=True)
    slow = torch.autograd.grad(sum((slow_read(attention, inputs, i) * weights).sum() for i in (0, 1)), asked)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("feature_map", [*FEATURE_MAPS, "softmax"])
def test_weights_are_what_reading_does(feature_map: str) -> None:
    """Not negative and adding up to 1 (all but linrec), zero on padding; over values they give the read."""
    model, (history, candidates, _) = make_ifa(feature_map=feature_map), make_request()
    weights_BCL = model.behaviour_weights(history, candidates)
    mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
    assert weights_BCL.shape == (*candidates.items_BC.shape, history.items_BL.shape[1])
    assert not weights_BCL.masked_select(~mask_BL.unsqueeze(1)).any()
    if feature_map != "linrec":
        assert (weights_BCL >= 0).all()
        torch.testing.assert_close(weights_BCL.sum(-1), (history.lengths_B > 0).double().unsqueeze(1).expand(weights_BCL.shape[:2]), **EXACT)
    if feature_map != "softmax":
        attention, inputs = make_attention(feature_map, heads=1, features=8), random_inputs()
        weights_BCL = attention.weights(inputs[3], *inputs[:3])
        read_BCD = attention.read(inputs[3], attention.state(*inputs[:3]), 0)
        torch.testing.assert_close(weights_BCL @ inputs[0] @ attention.values[0], read_BCD, rtol=0, atol=1e-12)


def test_equal_keys_read_the_mean() -> None:
    attention, (keys_BLD, mask_BL, times_BL, query_BCD) = make_attention("elu1"), random_inputs()
    with torch.no_grad():
        attention.keys.zero_()
        means_BGE = torch.einsum("bld,gde->bge", keys_BLD, attention.values) / mask_BL.sum(1).clamp(min=1).view(-1, 1, 1)
        read_BCD = attention.read(query_BCD, attention.state(keys_BLD, mask_BL, times_BL), 0)
    torch.testing.assert_close(read_BCD, means_BGE[:, :2].flatten(1).unsqueeze(1).expand_as(read_BCD), **EXACT)


def assert_equal_states(left: UserState, right: UserState, tolerance: float = 1e-12) -> None:
    assert torch.equal(left.events_B, right.events_B)
    assert torch.equal(left.times_B, right.times_B)
    for one, other in ((left.sums_BGFE, right.sums_BGFE), (left.norms_BGF, right.norms_BGF)):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


STATES = [{}, {"half_life_days": 0.003}, {"feature_map": "efficient"}, {"feature_map": "linrec"}]


@torch.no_grad()
@pytest.mark.parametrize("changes", STATES, ids=str)
def test_states_in_pieces_equal_the_whole(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Event by event, in two shards merged either way, in blocks; padding and its content mean nothing; the order of events neither."""
    model, history = make_ifa(**changes), make_history(4, LENGTHS)
    whole, L = model.state(history), max(LENGTHS)
    streamed = model.state(between(history, 0, 1))
    for place in range(1, L):
        streamed = model.update(streamed, between(history, place, place + 1))
    assert_equal_states(streamed, whole)
    left, right = model.state(between(history, 0, 4)), model.state(between(history, 4, L))
    assert_equal_states(left.merge(right), whole)
    assert_equal_states(right.merge(left), whole)
    mask_BL = padding_mask(history.lengths_B, L)
    garbage = model.state(with_garbage(history, mask_BL))
    assert torch.equal(garbage.sums_BGFE, whole.sums_BGFE) and torch.equal(garbage.norms_BGF, whole.norms_BGF)
    assert_equal_states(model.state(with_padding(history, 9)), whole)
    order_BL = (torch.rand(mask_BL.shape, generator=draws(1)) - 2.0 * mask_BL).argsort(1)
    names = ("items_BL", "categories_BL", "actions_BL", "times_BL")
    assert_equal_states(model.state(replace(history, **{n: getattr(history, n).gather(1, order_BL) for n in names})), whole)
    monkeypatch.setattr("longtrail.models.rankers.ifa.EVENTS", 5)
    assert_equal_states(model.state(history), whole)


@torch.no_grad()
@pytest.mark.parametrize("changes", STATES, ids=str)
def test_an_event_added_and_removed_leaves_the_start(changes: dict[str, Any]) -> None:
    model, history = make_ifa(**changes), make_history(4, LENGTHS)
    candidates, context = make_candidates(4, (3, 1, 4, 2, 5)), make_context(4, len(LENGTHS))
    event = between(make_history(6, (1,) * len(LENGTHS)), 0, 1)
    start = model.state(history)
    back = model.remove(model.update(start, event), event)
    assert torch.equal(back.events_B, start.events_B)
    assert_equal_states(back, start.at(back.times_B))
    read = [model(history, candidates, context, state=state) for state in (start, back)]
    torch.testing.assert_close(read[1], read[0], rtol=0, atol=1e-9)  # the emptied one too, where only rounding is left of the sums


@torch.no_grad()
def test_ten_thousand_events_in_shards() -> None:
    """Ten thousand events of one user: one at a time into eight shards that are then merged, in float64 and in float32."""
    n, shards = 10_000, 8
    model = make_ifa(layers=1, half_life_days=1.0, feature_map="shares")
    history = make_history(9, (n,))
    history = replace(history, times_BL=torch.randint(1, 30 * DAY, (1, n), generator=draws(3)))
    whole = model.state(history)
    each = model.state(History(**{name: getattr(history, name).T for name in linear_fields()}, lengths_B=torch.ones(n, dtype=torch.int64)))
    parts = [UserState(**rows_of(each, slice(i, i + shards))) for i in range(0, n, shards)]  # event i + s goes to shard s
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    merged = UserState(**rows_of(total, slice(0, 1)))
    for shard in range(1, shards):
        merged = merged.merge(UserState(**rows_of(total, slice(shard, shard + 1))))
    assert merged.events_B.item() == n
    assert_equal_states(merged, whole, 1e-10)
    single = model.float().state(history)
    assert single.sums_BGFE.dtype == torch.float32
    torch.testing.assert_close(single.sums_BGFE.double(), whole.sums_BGFE, rtol=1e-4, atol=1e-3)


def linear_fields() -> tuple[str, ...]:
    return ("items_BL", "categories_BL", "actions_BL", "times_BL")


def rows_of(state: UserState, rows: slice) -> dict[str, Any]:
    tensors = {name: getattr(state, name)[rows] for name in ("sums_BGFE", "norms_BGF", "events_B", "times_B")}
    return tensors | {"rates_G": state.rates_G}


@torch.no_grad()
@pytest.mark.parametrize("half_life_days", [None, 0.003])
def test_scoring_from_a_stored_state(half_life_days: float | None) -> None:
    """Out through the flat float32 row and back, with the newest events alone for the exact branch."""
    model = make_ifa(recent_events=3, half_life_days=half_life_days, relation="softmax").float()
    history, candidates, context = make_request()
    history = replace(history, times_BL=history.times_BL + (1 << 50))  # 2005: beyond what float32 counts in µs
    state, version = model.state(history), model.version()
    flat_BS = state.flat()
    assert flat_BS.dtype == torch.float32
    assert flat_BS.shape == (5, 5 + 4 * 3 * (4 + 1))  # G = 4 heads of F = 3 features and E = 4 values
    restored = model.restore(flat_BS, version, expected=version)
    assert torch.equal(restored.times_B, state.times_B) and torch.equal(restored.events_B, state.events_B)
    stored = model(newest(history, 3), candidates, context, state=restored)
    mask_BC = padding_mask(candidates.lengths_B, 6)
    torch.testing.assert_close(stored[mask_BC], model(history, candidates, context)[mask_BC], rtol=0, atol=1e-6)


def test_states_of_other_weights_are_refused() -> None:
    model = make_ifa()
    flat_BS, version = model.state(make_history()).flat(), model.version()
    assert make_ifa().version() == version
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in ("embedding", "attention") and name != "attention.queries":
            with torch.no_grad():
                parameter.add_(1e-3)
            assert model.version() != version, name
            with torch.no_grad():
                parameter.sub_(1e-3)
            model.load_state_dict(make_ifa().state_dict())
    with pytest.raises(StateError, match="made by weights 0123; expected"):
        model.restore(flat_BS, "0123", expected=version)
    with pytest.raises(StateError, match=r"shape \(5, 64\); expected \[users, 65\]"):
        model.restore(flat_BS[:, 1:], version, expected=version)
    flat_BS[2, 9] = torch.nan
    with pytest.raises(StateError, match="row 2"):
        model.restore(flat_BS, version, expected=version)
    with pytest.raises(StateError, match="softmax"):
        make_ifa(feature_map="softmax").state(make_history())


def test_states_hold_no_candidate() -> None:
    """The gradient of a state with respect to the candidates' own vectors is none at all; histories share the tables, so they are left unread."""
    model, (history, candidates, _) = make_ifa(), make_request()
    query_BCD = model.embedding.queries(candidates).detach().requires_grad_()
    state = model.state(history)
    model.read(history, query_BCD, state).sum().backward(retain_graph=True)
    gradients = torch.autograd.grad(state.sums_BGFE.sum() + state.norms_BGF.sum(), [query_BCD], allow_unused=True)
    assert query_BCD.grad is not None and query_BCD.grad.abs().sum() > 0
    assert gradients == (None,)


def test_states_stay_in_float32_under_autocast() -> None:
    model, history = make_ifa().float(), make_history(2, (400, 300))
    exact = model.state(history)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = model.state(history)
        assert model(history, make_candidates(2, (4, 4)), make_context(2, 2)).isfinite().all()
    assert state.sums_BGFE.dtype == state.norms_BGF.dtype == torch.float32
    torch.testing.assert_close(state.sums_BGFE, exact.sums_BGFE, rtol=0.01, atol=0.01)


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
    model = make_ifa(relation="softmax", relation_dropout=0.5)
    x_BCD = torch.ones(4000, 2, 1)
    assert torch.equal(model._kept(x_BCD), x_BCD)
    model.train()
    kept = model._kept(x_BCD)
    assert torch.equal(kept[:, 0], kept[:, 1])
    assert 0.45 < kept.mean().item() < 0.55


@pytest.mark.parametrize(("length", "candidates"), [(256, 48), (512, 48), (256, 96)])
def test_nothing_of_candidates_times_history_is_made(length: int, candidates: int) -> None:
    """Forward and backward: the largest tensor is of features [B, L, X] or candidates [B, C, 4D], and the state does not grow with L."""
    torch.manual_seed(0)
    model = IFA(IFASettings(width=8, max_history=length, hidden=(8,), relation="linear"), SIZES)
    history, set_ = make_history(0, (length, length - 3)), make_candidates(0, (candidates, 7))
    with Largest() as largest:
        model(history, set_, make_context(0, 2)).sum().backward()
    assert largest.elements <= 2 * max(length * 32, candidates * 4 * 16)
    assert largest.elements < 2 * length * candidates
    assert model.state(history).flat().shape == (2, 5 + 4 * 8 * (4 + 1))


def test_newest_events() -> None:
    history = make_history(0, LENGTHS)
    cut = newest(history, 4)
    assert cut.lengths_B.tolist() == [0, 1, 4, 4, 4]
    for b, n in enumerate(LENGTHS):
        assert torch.equal(cut.items_BL[b, : min(n, 4)], history.items_BL[b, max(0, n - 4) : n])
    assert newest(history, 12) is history


def random_sets(requests: int, places: int, seed: int) -> tuple[History, Candidates, Tensor]:
    """Sets of i.i.d. items of which one, at a random place, is labelled: nothing tells which."""
    history = make_history(seed, (3,) * requests)
    candidates = make_candidates(seed, (places,) * requests)
    labels_BC = torch.zeros(requests, places).scatter_(1, torch.randint(places, (requests, 1), generator=draws(seed)), 1.0)
    return history, candidates, labels_BC


def test_the_relation_finds_no_label_that_is_not_there() -> None:
    """Leak detector: one positive among i.i.d. others, trained with the whole loss; on fresh sets the positive's rank is that of chance."""
    from longtrail.losses import ranking_loss

    torch.manual_seed(0)
    model = IFA(IFASettings(width=4, hidden=(16,), max_history=3, features=4), SIZES).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(80):
        history, candidates, labels_BC = random_sets(64, 8, 1000 + step)
        loss = ranking_loss(model(history, candidates, make_context(step, 64)), labels_BC, candidates.lengths_B, listwise=0.5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    history, candidates, labels_BC = random_sets(1500, 8, 7)
    with torch.no_grad():
        logits_BC = model.eval()(history, candidates, make_context(7, 1500))
    positive_B1 = logits_BC[labels_BC > 0].unsqueeze(1)
    auc = ((positive_B1 > logits_BC).sum() / (1500 * 7)).item()
    assert abs(auc - 0.5) < 4 * (1 / 12 / 1500) ** 0.5  # a rank is uniform over eight places: σ² is about 1/12
