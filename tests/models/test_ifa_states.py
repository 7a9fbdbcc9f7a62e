"""IFA's user states: in pieces, added to and taken from, stored and restored, and free of candidates."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from longtrail.errors import StateError
from longtrail.models.attention.user_state import DAY, UserState
from longtrail.models.contracts import Candidates, Context, History
from longtrail.models.masks import padding_mask
from longtrail.models.order import between, newest
from longtrail.models.rankers.ifa import IFA
from tests.contracts import batches
from tests.contracts.batches import draws, make_candidates, make_context, with_garbage, with_padding
from tests.models.attention.test_linear import LENGTHS
from tests.models.test_ifa import make_ifa

NOW = 1_700_000_000_123_457  # µs: November 2023, beyond what float32 counts and with four digits of 2^16 that differ


def make_history(seed: int = 0, lengths: tuple[int, ...] = batches.HISTORY_LENGTHS) -> History:
    """Histories of today: within a quarter of an hour after NOW."""
    history = batches.make_history(seed, lengths)
    return replace(history, times_BL=history.times_BL + NOW * padding_mask(history.lengths_B, history.times_BL.shape[1]))


def make_request() -> tuple[History, Candidates, Context]:
    return make_history(), make_candidates(), make_context()


def assert_equal_states(left: UserState, right: UserState, tolerance: float = 1e-12) -> None:
    assert torch.equal(left.events_B, right.events_B)
    assert torch.equal(left.times_B, right.times_B)
    for one, other in ((left.sums_BGFE, right.sums_BGFE), (left.norms_BGF, right.norms_BGF)):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


STATES: list[dict[str, Any]] = [{}, {"feature_map": "elu1"}, {"half_life_days": 0.003}, {"feature_map": "efficient"}, {"feature_map": "linrec"}]


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
    assert_equal_states(model.state(replace(history, **{n: getattr(history, n).gather(1, order_BL) for n in linear_fields()})), whole)
    monkeypatch.setattr("longtrail.models.rankers.ifa.EVENTS", 5)
    assert_equal_states(model.state(history), whole)


@torch.no_grad()
@pytest.mark.parametrize("changes", STATES, ids=str)
def test_an_event_added_and_removed_leaves_the_start(changes: dict[str, Any]) -> None:
    """Its numbers, its time and all scores; whether the event is the newest of all or older than others."""
    model, history = make_ifa(**changes), make_history(4, LENGTHS)
    candidates, context = make_candidates(4, (3, 1, 4, 2, 5)), make_context(4, len(LENGTHS))
    start, event = model.state(history), make_history(6, (1,) * len(LENGTHS))
    expected = model(history, candidates, context, state=start)
    for times_B1 in (event.times_BL - 10**9, event.times_BL + 10**8):
        event = replace(event, times_BL=times_B1)
        assert not torch.equal(model(history, candidates, context, state=model.update(start, event)), expected)
        back = model.remove(model.update(start, event), event, start.times_B)
        assert_equal_states(back, start, 1e-9)
        assert not back.sums_BGFE[0].any() and not back.norms_BGF[0].any()  # who has no event left
        torch.testing.assert_close(model(history, candidates, context, state=back), expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("changes", STATES, ids=str)
def test_events_removed_leave_what_the_others_make(changes: dict[str, Any]) -> None:
    """The newest half of each history, or every other event: against a state built of the rest."""
    model, history = make_ifa(**changes), make_history(4, (2, 1, 6, 12, 8))
    candidates, context = make_candidates(4, (3, 1, 4, 2, 5)), make_context(4, 5)
    place_BL, halves_B1 = torch.arange(12).expand(5, 12), (history.lengths_B // 2).unsqueeze(1)
    for gone_BL in (place_BL >= halves_B1, place_BL % 2 == 1):
        taken, rest = (picked(history, chosen_BL) for chosen_BL in (gone_BL, ~gone_BL))
        rebuilt = model.state(rest)
        left = model.remove(model.state(history), taken, rebuilt.times_B)
        assert_equal_states(left, rebuilt, 1e-9)
        scores = [model(rest, candidates, context, state=state) for state in (left, rebuilt)]
        torch.testing.assert_close(*scores, rtol=0, atol=1e-9)


def picked(history: History, chosen_BL: torch.Tensor) -> History:
    """The chosen events of each history, in their order."""
    chosen_BL = chosen_BL & padding_mask(history.lengths_B, chosen_BL.shape[1])
    order_BL = (~chosen_BL).int().argsort(dim=1, stable=True)
    left = {name: getattr(history, name).masked_fill(~chosen_BL, 0).gather(1, order_BL) for name in linear_fields()}
    return History(**left, lengths_B=chosen_BL.sum(1))


def test_what_has_decayed_is_not_brought_back() -> None:
    """Rounding would be what is read: the user is named; in float64 more is left than in float32."""
    model, history = make_ifa(half_life_days=1.0, heads=1), make_history(4, (3, 3))
    late = replace(between(make_history(6, (1, 1)), 0, 1), times_BL=NOW + torch.tensor([[10**9], [14 * DAY]]))
    state = model.state(history)
    back = model.remove(model.update(state, late), late, state.times_B)
    assert_equal_states(back, state, 1e-9)
    model = model.float()
    state = model.state(history)
    with pytest.raises(StateError, match="row 1: too much has decayed"):
        model.remove(model.update(state, late), late, state.times_B)


@torch.no_grad()
def test_ten_thousand_events_in_shards() -> None:
    """Ten thousand events of one user: one at a time into eight shards that are then merged, in float64 and in float32."""
    n, shards = 10_000, 8
    model = make_ifa(layers=1, half_life_days=1.0, feature_map="shares")
    history = make_history(9, (n,))
    history = replace(history, times_BL=NOW + torch.randint(1, 30 * DAY, (1, n), generator=draws(3)))
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
def test_scoring_from_a_stored_state(half_life_days: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out through the flat float32 row and back, with the newest events alone for the exact branch and the head."""
    monkeypatch.setattr("longtrail.models.embedding.RECENT_EVENTS", 3)
    model = make_ifa(recent_events=3, half_life_days=half_life_days, relation="softmax").float()
    history, candidates, context = make_request()
    state, version = model.state(history), model.version()
    flat_BS = state.flat()
    assert flat_BS.dtype == torch.float32
    assert flat_BS.shape == (5, 5 + 4 * 3 * (4 + 1))  # G = 4 heads of F = 3 features and E = 4 values
    restored = model.restore(flat_BS, version, expected=version)
    assert torch.equal(restored.times_B, state.times_B) and torch.equal(restored.events_B, state.events_B)
    stored = model(newest(history, 3), candidates, context, state=restored)
    mask_BC = padding_mask(candidates.lengths_B, 6)
    torch.testing.assert_close(stored[mask_BC], model(history, candidates, context)[mask_BC], rtol=0, atol=1e-6)


def one_number(dtype: torch.dtype, times: list[int], rates: list[float] | None = None, events: int = 2) -> UserState:
    """A state of these users, each with a 3 and a 5 in every head."""
    users, heads = len(times), len(rates or [0])
    return UserState(
        sums_BGFE=torch.full((users, heads, 1, 1), 3.0, dtype=dtype),
        norms_BGF=torch.full((users, heads, 1), 5.0, dtype=dtype),
        events_B=torch.full((users,), events),
        times_B=torch.tensor(times),
        rates_G=None if rates is None else torch.tensor(rates, dtype=dtype),
    )


def test_a_stored_row_by_hand() -> None:
    """The number of events, the time in digits of base 2^16 from the lowest, the sums and the norms; exact for every time there is."""
    digits = [8769, 6176, 2596, 6]
    assert sum(digit << 16 * place for place, digit in enumerate(digits)) == NOW
    times = [NOW, 0, 1, NOW + 1, 4_102_444_800_000_000, 2**63 - 1]
    state = one_number(torch.float32, times)
    flat_BS = state.flat()
    assert flat_BS[0].tolist() == [2.0, *digits, 3.0, 5.0]
    for dtype in (torch.float32, torch.float64):
        back = UserState.from_flat(state.flat(dtype), heads=1, features=1, values=1, rates_G=None)
        assert back.times_B.tolist() == times and back.events_B.tolist() == [2] * len(times)
        assert back.sums_BGFE.unique().tolist() == [3.0] and back.norms_BGF.unique().tolist() == [5.0]


@pytest.mark.parametrize("days", [1.0, 1 / 86_400], ids=["a day", "a second"])
def test_a_state_seen_later_by_hand(days: float) -> None:
    """Half of a head with this half-life is left, a sixteenth of one that forgets four times as fast; earlier it was as much more."""
    rate, span = math.log(2) / days, round(days * DAY)
    state = one_number(torch.float64, [NOW, NOW], [rate, 4 * rate])
    seen = state.at(torch.tensor([NOW + span, NOW - span]))
    expected_BG = torch.tensor([[1 / 2, 1 / 16], [2.0, 16.0]], dtype=torch.float64)
    torch.testing.assert_close(seen.sums_BGFE[:, :, 0, 0], 3 * expected_BG, rtol=1e-14, atol=0)
    torch.testing.assert_close(seen.norms_BGF[:, :, 0], 5 * expected_BG, rtol=1e-14, atol=0)
    assert seen.times_B.tolist() == [NOW + span, NOW - span]


@pytest.mark.parametrize(("dtype", "half_lives"), [(torch.float32, 11.5), (torch.float64, 26.0)])
def test_how_much_may_have_decayed(dtype: torch.dtype, half_lives: float) -> None:
    """Half of a number's digits (24 bits less one, 53 less one) of the head that forgets fastest, here in six hours; then the user is named."""
    rates = [math.log(2), 4 * math.log(2)]
    limit = round(half_lives * DAY / 4)

    def remove(age: int) -> UserState:
        """All but one event, whose time is `age` before the newest of all; the first user keeps the newest, the third nothing."""
        state, part = one_number(dtype, [NOW] * 3, rates), one_number(dtype, [NOW] * 3, rates, events=1)
        part = replace(part, sums_BGFE=part.sums_BGFE / 3, norms_BGF=part.norms_BGF / 5, events_B=torch.tensor([1, 1, 2]))
        return state.remove(part, torch.tensor([NOW, NOW - age, NOW - 100 * DAY]))

    left = remove(limit - 10**6)
    assert left.times_B.tolist() == [NOW, NOW - limit + 10**6, 0] and left.events_B.tolist() == [1, 1, 0]
    torch.testing.assert_close(left.sums_BGFE[:2, 1, 0, 0], torch.tensor([2.0, 2 * 2**half_lives], dtype=dtype), rtol=1e-4, atol=0)
    torch.testing.assert_close(left.norms_BGF[:2, 0, 0], torch.tensor([4.0, 4 * 2 ** (half_lives / 4)], dtype=dtype), rtol=1e-4, atol=0)
    assert not left.sums_BGFE[2].any() and not left.norms_BGF[2].any()
    with pytest.raises(StateError, match="row 1: too much has decayed"):
        remove(limit + 10**6)


READING = ("attention.queries", "attention.query_bias", "attention.log_priors")


def test_states_of_other_weights_are_refused() -> None:
    model = make_ifa()
    flat_BS, version = model.state(make_history()).flat(), model.version()
    assert make_ifa().version() == version
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in ("embedding", "attention") and name not in READING:
            with torch.no_grad():
                parameter.add_(1e-3)
            assert model.version() != version, name
            with torch.no_grad():
                parameter.sub_(1e-3)
            model.load_state_dict(make_ifa().state_dict())
    alike = [make_ifa(feature_map=feature_map) for feature_map in ("elu1", "relu")]  # the same weights, of other features
    assert all(torch.equal(one, other) for one, other in zip(*(part.state_dict().values() for part in alike), strict=True))
    assert alike[0].version() != alike[1].version()
    with pytest.raises(StateError, match="made by weights 0123; expected"):
        model.restore(flat_BS, "0123", expected=version)
    with pytest.raises(StateError, match=r"shape \(5, 64\); expected \[users, 65\]"):
        model.restore(flat_BS[:, 1:], version, expected=version)
    flat_BS[2, 9] = torch.nan
    with pytest.raises(StateError, match="row 2"):
        model.restore(flat_BS, version, expected=version)
    with pytest.raises(StateError, match="softmax"):
        make_ifa(feature_map="softmax").state(make_history())


def state_made(
    model: IFA, request: tuple[History, Candidates, Context], monkeypatch: pytest.MonkeyPatch
) -> tuple[UserState, torch.Tensor, torch.Tensor]:
    """The state that a forward pass makes, its candidates' vectors as a leaf of the graph, and its logits."""
    assert model.attention is not None
    made, asked, make, ask = [], [], model.attention.state, model.embedding.queries

    def leaf(candidates: Candidates) -> torch.Tensor:
        asked.append(ask(candidates).detach().requires_grad_())
        return asked[-1]

    monkeypatch.setattr(model.attention, "state", lambda *given: made.append(make(*given)) or made[-1])
    monkeypatch.setattr(model.embedding, "queries", leaf)
    logits_BC = model(*request)
    monkeypatch.undo()
    assert len(made) == len(asked) == 1
    return made[0], asked[0], logits_BC


@pytest.mark.parametrize("changes", [{}, {"recent_events": 3, "relation": "softmax"}, {"feature_map": "elu1", "half_life_days": 0.003}], ids=str)
def test_states_hold_no_candidate(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Made within a forward pass, a state has no gradient by the candidates, and others leave its bits alone. One that heard them is found."""
    model, (history, candidates, context) = make_ifa(**changes), make_request()
    other = replace(candidates, items_BC=candidates.items_BC % 40 + 1, categories_BC=candidates.categories_BC % 6 + 1)

    def gradient_and_difference() -> tuple[torch.Tensor | None, bool]:
        state, query_BCD, logits_BC = state_made(model, (history, candidates, context), monkeypatch)
        (by_logits,) = torch.autograd.grad(logits_BC.sum(), [query_BCD], retain_graph=True)
        assert by_logits.abs().sum() > 0
        (found,) = torch.autograd.grad(state.sums_BGFE.sum() + state.norms_BGF.sum(), [query_BCD], allow_unused=True)
        after, _, other_logits_BC = state_made(model, (history, other, context), monkeypatch)
        assert not torch.equal(logits_BC, other_logits_BC)
        return found, torch.equal(state.flat(torch.float64), after.flat(torch.float64))

    assert gradient_and_difference() == (None, True)
    keys, read, heard = model._keys, model.read, []

    def listening(history: History, query_BCD: torch.Tensor, state: UserState | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        heard[:] = [query_BCD]
        return read(history, query_BCD, state)

    def told(history: History) -> tuple[torch.Tensor, torch.Tensor]:
        keys_BLD, mask_BL = keys(history)
        return (keys_BLD + heard[0].mean(1, keepdim=True)) * mask_BL.unsqueeze(-1), mask_BL

    model.read, model._keys = listening, told  # type: ignore[method-assign]
    gradient, same = gradient_and_difference()
    assert gradient is not None and gradient.abs().sum() > 0 and not same


def test_states_stay_in_float32_under_autocast() -> None:
    model, history = make_ifa().float(), make_history(2, (400, 300))
    exact = model.state(history)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = model.state(history)
        assert model(history, make_candidates(2, (4, 4)), make_context(2, 2)).isfinite().all()
    assert state.sums_BGFE.dtype == state.norms_BGF.dtype == torch.float32
    torch.testing.assert_close(state.sums_BGFE, exact.sums_BGFE, rtol=0.01, atol=0.01)
