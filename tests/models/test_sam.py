"""SAM against slow twins written from the equations with the concatenated features and loops, and against weights set by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longtrail.config import SAMSettings
from longtrail.models.masks import padding_mask
from longtrail.models.rankers.sam import SAM, AttentionPass, MemoryCell
from tests.contracts.batches import SIZES, draws, make_candidates, make_history, make_request
from tests.contracts.largest import Largest
from tests.contracts.weights import with_drawn_weights

CLOSE = {"rtol": 0.0, "atol": 1e-10}
SHAPES = [(1, 1, 1), (1, 7, 3), (3, 1, 2), (2, 12, 1), (4, 9, 5)]


def make_sam(**changes: Any) -> SAM:
    torch.manual_seed(1)
    settings = {"width": 3, "hidden": (8, 4), "max_history": 12, "attention_hidden": 5, "compression": 4} | changes
    released = {"read_scale": "none", "attention_init": "zero"}
    return SAM(SAMSettings(**released | settings), SIZES).double().eval()


def attention(model: SAM, i: int) -> AttentionPass:
    layer = model.passes[i]
    assert isinstance(layer, AttentionPass)
    return layer


def random_inputs(model: SAM, shape: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """keys, mask, lengths, queries with the edges in them; zeros in padded keys, as the embedding makes them."""
    B, L, C = shape
    random = draws(seed)
    lengths_B = torch.randint(0, L + 1, (B,), generator=random)
    lengths_B[0] = L if seed % 2 else 0
    mask_BL = padding_mask(lengths_B, L)
    D = model.embedding.width
    keys_BLD = torch.randn(B, L, D, generator=random, dtype=torch.float64) * mask_BL.unsqueeze(-1)
    return keys_BLD, mask_BL, lengths_B, torch.randn(B, C, D, generator=random, dtype=torch.float64)


def slow_weights(layer: AttentionPass, k: Tensor, q: Tensor, m: Tensor) -> Tensor:
    """a [n] of one candidate over n real behaviours, with z concatenated as the equation has it."""
    first_ZH = torch.cat(list(layer.first), dim=0)
    bias = 0.0 if layer.second_bias is None else layer.second_bias
    scores = []
    for k_j in k:
        z = torch.cat([q - k_j, q * k_j, m - k_j, m * k_j])
        hidden = 1 / (1 + torch.exp(-(z @ first_ZH + layer.first_bias)))
        scores.append(hidden @ layer.second + bias)
    if not scores:
        return k.new_zeros(0)
    l = torch.stack(scores)  # noqa: E741
    powers = torch.exp(l - l.max())
    return {
        ("sigmoid", False): 1 / (1 + torch.exp(-l)),
        ("sigmoid", True): 1 / (1 + torch.exp(-l / math.sqrt(len(q)))),
        ("softmax", False): powers / powers.sum(),
        ("softmax_eps", False): powers / (powers.sum() + 0.01),
    }[layer.weights.kind, layer.weights.scaled]


def slow_cell(cell: MemoryCell, u: Tensor, m: Tensor) -> Tensor:
    """One state, gate by gate, number by number."""
    D, inputs = len(m), len(u) + len(m)
    x = [*u.tolist(), *m.tolist()]
    gates = [sum(x[i] * cell.gates[i, j].item() for i in range(inputs)) + cell.gates_bias[j].item() for j in range(2 * D)]
    reset, keep = ([1 / (1 + math.exp(-v)) for v in part] for part in (gates[:D], gates[D:]))
    y = [*u.tolist(), *(r * v for r, v in zip(reset, m.tolist(), strict=True))]
    candidate = [math.tanh(sum(y[i] * cell.candidate[i, j].item() for i in range(inputs)) + cell.candidate_bias[j].item()) for j in range(D)]
    return torch.tensor([g * old + (1 - g) * new for g, old, new in zip(keep, m.tolist(), candidate, strict=True)], dtype=m.dtype)


def slow_read(model: SAM, keys_BLD: Tensor, lengths_B: Tensor, query_BCD: Tensor) -> Tensor:
    """o, request by request and candidate by candidate; keys stand newest first."""
    settings, outputs = model.settings, []
    for keys, n, queries in zip(keys_BLD, lengths_B.tolist(), query_BCD, strict=True):
        k = keys[:n]
        for q in queries:
            m, parts = q, []
            for i in range(settings.passes):
                layer = attention(model, i)
                a = slow_weights(layer, k, q, m if settings.feedback else q)
                u = sum((weight * row for weight, row in zip(a, k, strict=True)), torch.zeros_like(q))
                if settings.read_scale == "norm":
                    u = (u - u.mean()) / torch.sqrt(u.var(unbiased=False) + 1e-5)
                else:
                    u = u / {"none": 1.0, "sqrt": math.sqrt(max(1, n)), "mean": 1 + a.sum()}[settings.read_scale]
                m = slow_cell(model.cell, u, m)
                if layer.compress is not None and layer.compress_bias is not None:
                    newest = a[: len(layer.compress)]
                    parts.append(torch.relu(newest @ layer.compress[: len(newest)] + layer.compress_bias))
                parts.append(m)
            if model.enhance is not None:
                for V, v in zip(model.enhance.steps, model.enhance.steps_bias, strict=True):
                    m = slow_cell(model.enhance.cell, torch.cat([m @ V + v, q]), m)
                parts = [*([parts[-2]] if settings.compression else []), m]
            outputs.append(torch.cat(parts))
    return torch.stack(outputs).view(*query_BCD.shape[:2], -1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feedback": False},
        {"passes": 1},
        {"compression": 0},
        {"read_scale": "sqrt"},
        {"read_scale": "mean"},
        {"read_scale": "norm"},
        {"max_history": 5},
        {"enhancement": 3},
        {"enhancement": 1, "compression": 0, "passes": 2},
        {"attention_weights": "scaled_sigmoid"},
        {"attention_weights": "softmax"},
        {"attention_weights": "softmax_eps"},
    ],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "paper",
)
def test_read_equals_the_slow_twin(changes: dict[str, Any], shape: tuple[int, int, int]) -> None:
    model = with_drawn_weights(make_sam(**changes))
    for seed in range(2):
        keys_BLD, mask_BL, lengths_B, query_BCD = random_inputs(model, shape, seed)
        with torch.no_grad():
            fast = torch.cat(model.read(keys_BLD, mask_BL, lengths_B, query_BCD), dim=-1)
            torch.testing.assert_close(fast, slow_read(model, keys_BLD, lengths_B, query_BCD), **CLOSE)


def test_factored_equals_concatenated_in_float32() -> None:
    """At the size the spec measures: L = 1,000, D = 32, C = 5."""
    model = make_sam(width=16, attention_hidden=8).float()
    layer = attention(model, 0)
    random = draws(3)
    keys_BLD, query_BCD, memory_BCD = (torch.randn(1, n, 32, generator=random) for n in (1000, 5, 5))
    with torch.no_grad():
        with Largest() as factored:
            fast_CL = layer(keys_BLD, torch.ones(1, 1000, dtype=torch.bool), query_BCD, memory_BCD)[0][0]
        k, q, m = keys_BLD[0].unsqueeze(0), query_BCD[0].unsqueeze(1), memory_BCD[0].unsqueeze(1)
        with Largest() as concatenated:
            z = torch.cat([q - k, q * k, m - k, m * k], dim=-1)
            slow_CL = torch.sigmoid(torch.sigmoid(z @ layer.first.flatten(0, 1) + layer.first_bias) @ layer.second + layer.second_bias)
    torch.testing.assert_close(fast_CL, slow_CL, rtol=0, atol=1e-4)
    assert concatenated.elements == 4 * 32 / 8 * factored.elements  # 4D numbers a pair against H


def test_blocks_of_candidates_equal_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, request = make_sam(), make_request()
    with torch.no_grad():
        whole = model(*request)
        monkeypatch.setattr("longtrail.models.attention.pointwise.CHUNK_BYTES", 1)
        torch.testing.assert_close(model(*request), whole, **CLOSE)


def test_cell_is_the_textbook_one_while_the_reset_gate_is_open() -> None:
    """torch.nn.GRUCell resets after the matrix product, TF1's before it: equal where the gate is 1, different elsewhere."""
    torch.manual_seed(0)
    D = 5
    cell, torchs = MemoryCell(D).double(), nn.GRUCell(D, D).double()
    assert torch.equal(cell.gates_bias, torch.ones(2 * D, dtype=torch.float64))
    assert not cell.candidate_bias.any()
    with torch.no_grad():
        torchs.weight_ih.copy_(torch.cat([cell.gates[:D].T, cell.candidate[:D].T]))
        torchs.weight_hh.copy_(torch.cat([cell.gates[D:].T, cell.candidate[D:].T]))
        torchs.bias_hh.zero_()
        u, m = torch.randn(7, D, dtype=torch.float64), torch.randn(7, D, dtype=torch.float64)
        for open_gate, equal in ((60.0, True), (1.0, False)):
            cell.gates_bias[:D] = open_gate
            torchs.bias_ih.copy_(torch.cat([cell.gates_bias, cell.candidate_bias]))
            difference = (cell(u, m) - torchs(u, m)).abs().max().item()
            assert (difference < 1e-12) if equal else (difference > 1e-2), difference


@pytest.mark.parametrize("feedback", [True, False])
def test_feedback_is_a_gradient_from_the_second_pass_to_the_first(feedback: bool) -> None:
    """d a_2 / d (pass 1's parameters): not zero with feedback, not even an edge of the graph without."""
    model = make_sam(feedback=feedback, passes=2)
    _, a_2 = model.attention_weights(*make_request())
    gradients = torch.autograd.grad(a_2.sum(), [attention(model, 0).first, attention(model, 0).second], allow_unused=True)
    if feedback:
        assert all(g is not None and g.abs().max() > 1e-8 for g in gradients)
    else:
        assert all(g is None for g in gradients)


def pointer_model(feedback: bool) -> SAM:
    """Hand-set: vectors are [own code ; code pointed to]. Pass 1 finds the item q names, the memory becomes what it points to, pass 2 finds that."""
    model = make_sam(width=4, attention_hidden=1, compression=0, passes=2, feedback=feedback)
    D, half = 8, 4
    with torch.no_grad():
        for parameter in (*model.passes.parameters(), *model.cell.parameters()):
            parameter.zero_()
        for i, product in ((0, 1), (1, 3)):  # q * k in pass 1, m * k in pass 2: an inner product, 1 where the codes match
            layer = attention(model, i)
            layer.first[product, :half] = 20.0
            layer.first_bias.fill_(-10.0)
            layer.second.fill_(40.0)
            layer.second_bias.fill_(-20.0)
        model.cell.gates_bias[D:] = -50.0  # keep nothing of the old memory
        model.cell.candidate[half:D, :half] = 10.0 * torch.eye(half)  # what the read item points to becomes what is asked for
        model.cell.candidate[half:D, half:] = 0.0
    return model


def test_hand_set_weights_follow_a_pointer_only_with_feedback() -> None:
    code = torch.eye(4, dtype=torch.float64)
    points_to = {0: 2, 1: 3, 2: 1, 3: 0}
    keys_BLD = torch.stack([torch.cat([code[i], code[j]]) for i, j in points_to.items()]).unsqueeze(0)
    query_BCD = torch.cat([code, torch.zeros_like(code)], dim=1).unsqueeze(0)  # four candidates, one for each code
    lengths_B = torch.tensor([4])
    for feedback in (True, False):
        model = pointer_model(feedback)
        with torch.no_grad():
            (a_1, m_1), (a_2, m_2) = model._passes(keys_BLD, padding_mask(lengths_B, 4), lengths_B, query_BCD)
        assert a_1[0].argmax(-1).tolist() == [0, 1, 2, 3]
        assert m_1[0, :, :4].argmax(-1).tolist() == [points_to[i] for i in range(4)]
        two_hops = [points_to[points_to[i]] for i in range(4)]
        if feedback:  # the second pass's weight peaks at the item that the first one's named
            assert a_2[0].argmax(-1).tolist() == [points_to[i] for i in range(4)]
            assert a_2[0, torch.arange(4), [points_to[i] for i in range(4)]].min() > 0.99
            assert a_2[0].sum() < 4.01
            assert m_2[0, :, :4].argmax(-1).tolist() == two_hops
            assert m_2[0, torch.arange(4), two_hops].min() > 0.99
        else:  # it reads what the first one read
            assert a_2[0].argmax(-1).tolist() == [0, 1, 2, 3]
            assert a_2[0, torch.arange(4), [points_to[i] for i in range(4)]].max() < 1e-6
            assert m_2[0, torch.arange(4), two_hops].max() < 0.5


@pytest.mark.parametrize(("bias", "weight"), [(1e4, 1.0), (-1e4, 0.0)])
def test_forced_weights(bias: float, weight: float) -> None:
    """All weights 1: u is sum pooling; all 0: u is zero and the memory depends on q only."""
    model = make_sam(passes=1, compression=0)
    keys_BLD, mask_BL, lengths_B, query_BCD = random_inputs(model, (3, 9, 2), seed=1)
    with torch.no_grad():
        attention(model, 0).second_bias.fill_(bias)
        weights_BCL, read_BCD = attention(model, 0)(keys_BLD, mask_BL, query_BCD, query_BCD)
        torch.testing.assert_close(read_BCD, weight * keys_BLD.sum(1, keepdim=True).expand_as(read_BCD), **CLOSE)
        assert torch.equal(weights_BCL, (weight * mask_BL.double()).unsqueeze(1).expand_as(weights_BCL))
        (memory_BCD,) = model.read(keys_BLD, mask_BL, lengths_B, query_BCD)
        torch.testing.assert_close(memory_BCD, model.cell(weight * keys_BLD.sum(1, keepdim=True).expand_as(query_BCD), query_BCD), **CLOSE)


def test_an_empty_history_reads_nothing() -> None:
    model = make_sam(passes=1, compression=0)
    query_BCD = torch.randn(2, 3, model.embedding.width, dtype=torch.float64, generator=draws(0))
    lengths_B = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        (memory_BCD,) = model.read(torch.zeros(2, 4, model.embedding.width).double(), padding_mask(lengths_B, 4), lengths_B, query_BCD)
        torch.testing.assert_close(memory_BCD, model.cell(torch.zeros_like(query_BCD), query_BCD), **CLOSE)


def test_order_matters_only_to_the_compression() -> None:
    model = make_sam()
    keys_BLD, mask_BL, lengths_B, query_BCD = random_inputs(model, (1, 9, 3), seed=1)
    assert lengths_B.tolist() == [9]
    order = torch.randperm(9, generator=draws(4))
    with torch.no_grad():
        straight = model.read(keys_BLD, mask_BL, lengths_B, query_BCD)
        shuffled = model.read(keys_BLD[:, order], mask_BL, lengths_B, query_BCD)
    for m, other in zip(straight[1::2], shuffled[1::2], strict=True):
        torch.testing.assert_close(m, other, **CLOSE)
    assert any((s - other).abs().max() > 1e-4 for s, other in zip(straight[::2], shuffled[::2], strict=True))


def test_compression_counts_from_the_newest() -> None:
    """Events older than Wc has rows for change s_1 no more; newer ones do. Wc may be longer or shorter than L."""
    history, candidates = make_history(4, (9,)), make_candidates(4, (3,))

    def first_s(model: SAM, changed: int) -> Tensor:
        items_BL = history.items_BL.clone()
        items_BL[0, changed] = items_BL[0, changed] % SIZES.items + 1
        keys_BLD, mask_BL, query_BCD = model._embedded(replace(history, items_BL=items_BL), candidates)
        return model.read(keys_BLD, mask_BL, history.lengths_B, query_BCD)[0]

    with torch.no_grad():
        short, long = make_sam(max_history=4), make_sam(max_history=20)
        same = first_s(short, 0)
        for place in range(5):
            assert torch.equal(first_s(short, place), same), place
        for place in range(5, 9):
            assert not torch.equal(first_s(short, place), same), place
        assert not torch.equal(first_s(long, 0), first_s(long, 1))


def test_users_with_the_same_newest_events_have_the_same_s() -> None:
    layer = attention(make_sam(max_history=2), 0)
    with torch.no_grad():
        short = layer.compressed(torch.tensor([[[0.8, 0.3]]]).double())
        long = layer.compressed(torch.tensor([[[0.8, 0.3, 0.9, 0.9, 0.0]]]).double())
    torch.testing.assert_close(short, long, **CLOSE)


def test_more_rows_for_the_compression_change_nothing() -> None:
    """A model trained for longer histories, whose extra rows of Wc are anything, gives the same on these."""
    short, long = make_sam(max_history=9), make_sam(max_history=20)
    state = short.state_dict()
    for i in range(3):
        state[f"passes.{i}.compress"] = torch.cat([state[f"passes.{i}.compress"], torch.full((11, 4), 1e6).double()])
    long.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(short(*make_request()), long(*make_request()), **CLOSE)


def test_without_actions_it_is_the_papers_model() -> None:
    """With the action table at zero, what was done to an item makes no difference; else it does."""
    history, candidates, context = make_request()
    other = replace(history, actions_BL=history.actions_BL % SIZES.actions + 1)
    model = make_sam()
    with torch.no_grad():
        assert not torch.allclose(model(history, candidates, context), model(other, candidates, context))
        model.embedding.actions.zero_()
        assert torch.equal(model(history, candidates, context), model(other, candidates, context))


@pytest.mark.parametrize("weights", ["sigmoid", "scaled_sigmoid"])
def test_few_weights_at_first(weights: str) -> None:
    """attention_init: log_length starts with weights that sum to about 8 at max_history, instead of about half of it."""
    for init, low, high in (("zero", 0.2, 0.8), ("log_length", 0.002, 0.03)):
        model = make_sam(attention_init=init, attention_weights=weights, max_history=1000)
        keys_BLD, mask_BL, _, query_BCD = random_inputs(model, (1, 50, 4), seed=1)
        with torch.no_grad():
            mean = attention(model, 0)(keys_BLD, mask_BL, query_BCD, query_BCD)[0].mean().item()
        assert low < mean < high
