"""SASRec and BERT4Rec as their equations are written: one history, one head, one place at a time, with weights that are all drawn anew.

n events of one history, D width, d head width, N items, T training pairs.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longtrail.config import BERT4RecSettings, SASRecSettings
from longtrail.models.encoders.bert4rec import BERT4Rec
from longtrail.models.encoders.sasrec import SASRec
from tests.contracts.batches import SIZES, draws, make_history, make_windows
from tests.contracts.weights import with_drawn_weights

CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-10}
POSITIONS = ("rotary", "learned")
MASK = -1  # an event of the slow twin that is hidden
LENGTHS = (0, 1, 2, 7, 12)


def make_sasrec(positions: str, **changes: Any) -> SASRec:
    settings = {"width": 8, "blocks": 2, "heads": 2, "max_history": 12, "attention": {"kind": "full", "positions": positions}} | changes
    torch.manual_seed(7)
    return with_drawn_weights(SASRec(SASRecSettings(**settings), SIZES), std=0.5)


def make_bert4rec(positions: str, **changes: Any) -> BERT4Rec:
    settings = {"width": 8, "blocks": 2, "heads": 2, "max_history": 13, "attention": {"kind": "full", "positions": positions}} | changes
    torch.manual_seed(7)
    return with_drawn_weights(BERT4Rec(BERT4RecSettings(**settings), SIZES), std=0.5)


def slow_norm(norm: nn.LayerNorm, x_D: Tensor) -> Tensor:
    mean = sum(x_D.tolist()) / len(x_D)
    variance = sum((x - mean) ** 2 for x in x_D.tolist()) / len(x_D)
    return (x_D - mean) / math.sqrt(variance + 1e-5) * norm.weight + norm.bias


def turned(x_d: Tensor, place: int) -> Tensor:
    """Pair j by place · 10000^(-2j / d), counter-clockwise."""
    d, parts = len(x_d), []
    for j in range(d // 2):
        angle, (a, b) = place * 10_000.0 ** (-2 * j / d), x_d[2 * j : 2 * j + 2].tolist()
        parts += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return x_d.new_tensor(parts)


def slow_attention(layer: Any, x_nD: Tensor, *, heads: int, causal: bool, rotary: bool) -> Tensor:
    """Which places see each other is written down as a mask, of which a place reads what is true."""
    n, D = x_nD.shape
    d = D // heads
    sees_nn = torch.tensor([[j <= t or not causal for j in range(n)] for t in range(n)])
    mixed_nD = torch.zeros_like(x_nD)
    W, b = layer.inputs.weight, layer.inputs.bias
    for h in range(heads):
        q, k, v = ([W[rows] @ x_D + b[rows] for x_D in x_nD] for rows in (slice(i * D + h * d, i * D + (h + 1) * d) for i in range(3)))
        if rotary:
            q, k = ([turned(x_d, t) for t, x_d in enumerate(each)] for each in (q, k))
        for t in range(n):
            seen = [j for j in range(n) if sees_nn[t, j]]
            powers = [math.exp(float(q[t] @ k[j]) / math.sqrt(d)) for j in seen]
            mixed_nD[t, h * d : (h + 1) * d] = sum((p / sum(powers) * v[j] for p, j in zip(powers, seen, strict=True)), torch.zeros(d))
    return torch.stack([layer.output.weight @ x_D + layer.output.bias for x_D in mixed_nD])


def relu(x: float) -> float:
    return max(x, 0.0)


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def slow_blocks(model: Any, x_nD: Tensor, *, causal: bool, rotary: bool) -> Tensor:
    """x = x + A(LN x), x = x + FFN(LN x), block by block, and LN at the end. The FFN: ReLU and D units where causal (SASRec), else GELU and 4D."""
    activation, D = relu if causal else gelu, x_nD.shape[1]
    for block in model.blocks:
        normal_nD = torch.stack([slow_norm(block.attention_norm, x_D) for x_D in x_nD])
        x_nD = x_nD + slow_attention(block.attention, normal_nD, heads=2, causal=causal, rotary=rotary)
        widen, narrow = (layer for layer in block.feed if isinstance(layer, nn.Linear))
        assert widen.weight.shape == ((1 if causal else 4) * D, D)
        for t, x_D in enumerate(x_nD.clone()):
            inner = widen.weight @ slow_norm(block.feed_norm, x_D) + widen.bias
            x_nD[t] = x_D + narrow.weight @ x_nD.new_tensor([activation(x) for x in inner.tolist()]) + narrow.bias
    return torch.stack([slow_norm(model.norm, x_D) for x_D in x_nD])


def embedded(model: Any, items: list[int]) -> Tensor:
    """√D times an item's row; an item met after training reads zeros, and a masked place the mask."""
    rows = [model.mask if i == MASK else math.sqrt(8) * model.items.table[i if i <= SIZES.items else 0] for i in items]
    return torch.stack(rows)


def slow_sasrec(model: SASRec, items: list[int], positions: str) -> Tensor:
    """[n + 1, D]: the start vector and the state after each event."""
    if not items:
        return model.start.unsqueeze(0)
    x_nD = embedded(model, items)
    if positions == "learned":  # counted from the oldest event read
        x_nD = x_nD + torch.stack([model.positions[t] for t in range(len(items))])
    return torch.cat([model.start.unsqueeze(0), slow_blocks(model, x_nD, causal=True, rotary=positions == "rotary")])


def slow_bert4rec(model: BERT4Rec, events: list[int], positions: str) -> Tensor:
    """[n, D]: the state of each place; MASK is where the mask stands."""
    x_nD = embedded(model, events)
    if positions == "learned":  # counted from the newest place back
        x_nD = x_nD + torch.stack([model.positions[len(events) - 1 - t] for t in range(len(events))])
    return slow_blocks(model, x_nD, causal=False, rotary=positions == "rotary")


@torch.no_grad()
@pytest.mark.parametrize("max_history", [12, 5])
@pytest.mark.parametrize("positions", POSITIONS)
def test_users_of_sasrec_equal_the_slow_twin(positions: str, max_history: int) -> None:
    """The state after the newest of the events that are read; every earlier state on the way. An empty history is the start vector."""
    model, history = make_sasrec(positions, max_history=max_history).eval(), make_history(2, LENGTHS)
    history.items_BL[3, 5] = SIZES.items + 1
    assert torch.equal(model.item_vectors(), model.items.table)  # √D is in front of what is read alone
    expected = [slow_sasrec(model, items[:n].tolist()[-max_history:], positions) for items, n in zip(history.items_BL, LENGTHS, strict=True)]
    torch.testing.assert_close(model.user_vectors(history), torch.stack([states[-1] for states in expected]), **CLOSE)
    if max_history == 12:
        states_BLD = model.states(history)
        for b, n in enumerate(LENGTHS):
            torch.testing.assert_close(states_BLD[b, :n], expected[b][1:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_training_states_of_sasrec_equal_the_slow_twin(positions: str) -> None:
    """Each target of each window with the state before it: the first event's is the start vector; what is only context is no target."""
    model, windows = make_sasrec(positions, dropout=0.0).train(), make_windows(1)
    pairs, t = model.training_pairs(windows), 0
    for b, n in enumerate(windows.lengths_B.tolist()):
        states_LD = slow_sasrec(model, windows.history.items_BL[b, :n].tolist(), positions)
        for place, target in enumerate([int(windows.first_targets_B[b]), *windows.targets_BL[b, :n].tolist()]):
            if target:
                torch.testing.assert_close(pairs.states_TD[t], states_LD[place], **CLOSE)
                assert (int(pairs.targets_T[t]), int(pairs.windows_T[t])) == (target, b)
                t += 1
    assert t == len(pairs.states_TD) == len(pairs.targets_T)


@torch.no_grad()
@pytest.mark.parametrize("max_history", [13, 6])
@pytest.mark.parametrize("positions", POSITIONS)
def test_users_of_bert4rec_equal_the_slow_twin(positions: str, max_history: int) -> None:
    """A mask behind the newest events, one fewer than max_history; alone where there are none."""
    model, history = make_bert4rec(positions, max_history=max_history).eval(), make_history(2, LENGTHS)
    history.items_BL[3, 5] = SIZES.items + 1
    assert torch.equal(model.item_vectors(), model.items.table)
    kept = [items[:n].tolist()[-(max_history - 1) :] for items, n in zip(history.items_BL, LENGTHS, strict=True)]
    expected = [slow_bert4rec(model, [*events, MASK], positions)[-1] for events in kept]
    torch.testing.assert_close(model.user_vectors(history), torch.stack(expected), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_masked_places_of_bert4rec_equal_the_slow_twin(positions: str) -> None:
    """Any places masked, all, or none of a row: each sees all that is not padding, other masks too, and nothing of what it hides."""
    model, lengths_B = make_bert4rec(positions, dropout=0.0).train(), torch.tensor([1, 3, 5, 12, 4, 0])
    items_BL = torch.randint(1, SIZES.items + 1, (6, 12), generator=draws(3))  # garbage in padded places too
    real_BL = torch.arange(12) < lengths_B.unsqueeze(1)
    masked_BL = (torch.rand(6, 12, generator=draws(4)) < 0.4) & real_BL
    masked_BL[0, 0] = masked_BL[2, :5] = True
    masked_BL[4] = False
    expected = []
    for items, masked, n in zip(items_BL.tolist(), masked_BL.tolist(), lengths_B.tolist(), strict=True):
        if any(masked):
            states_LD = slow_bert4rec(model, [MASK if hidden else item for item, hidden in zip(items[:n], masked, strict=False)], positions)
            expected += [states_LD[t] for t in range(n) if masked[t]]
    torch.testing.assert_close(model.states(items_BL, lengths_B, masked_BL), torch.stack(expected), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("max_history", [20, 6])
@pytest.mark.parametrize("positions", POSITIONS)
def test_training_states_of_bert4rec_equal_the_slow_twin(positions: str, max_history: int) -> None:
    """With every target masked, so that nothing is by chance: context stays as it is, and the newest max_history events of a window are read."""
    model = make_bert4rec(positions, dropout=0.0, mask_share=1.0, max_history=max_history).train()
    windows = make_windows(1)
    states, targets, owners = [], [], []
    for b, n in enumerate(windows.lengths_B.tolist()):
        asked = [int(windows.first_targets_B[b]), *windows.targets_BL[b, :n].tolist()]  # 0: context alone
        events = [*windows.history.items_BL[b, :n].tolist(), asked[-1]]
        asked, events = asked[-max_history:], events[-max_history:]
        states_LD = slow_bert4rec(model, [MASK if target else event for event, target in zip(events, asked, strict=True)], positions)
        places = [t for t, target in enumerate(asked) if target]
        states, targets, owners = [*states, *states_LD[places]], [*targets, *(asked[t] for t in places)], [*owners, *[b] * len(places)]
    pairs = model.training_pairs(windows)
    torch.testing.assert_close(pairs.states_TD, torch.stack(states), **CLOSE)
    assert pairs.targets_T.tolist() == targets and pairs.windows_T.tolist() == owners
