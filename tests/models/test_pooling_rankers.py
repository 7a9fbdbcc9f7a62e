"""Mean pooling, DIEN and SDIM against loops over behaviours."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from longtrail.config import DIENSettings, MeanPoolingSettings, SDIMSettings
from longtrail.models.masks import padding_mask
from longtrail.models.rankers.dien import DIEN, AttentionalGRU
from longtrail.models.rankers.mean_pooling import MeanPooling
from longtrail.models.rankers.sdim import SDIM
from tests.contracts.batches import SIZES, draws, make_request

CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-10}
SMALL: dict[str, Any] = {"width": 3, "hidden": (8,), "max_history": 12}


def caught_parts(model: Any, request: Any) -> list[Tensor]:
    """What the model gives its head, but for the newest actions (tests/models/test_parts.py)."""
    caught: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda module, inputs: caught.extend(inputs[0]))
    with torch.no_grad():
        model(*request)
    handle.remove()
    return caught[:-1]


def test_mean_pooling_is_the_mean() -> None:
    model, request = MeanPooling(MeanPoolingSettings(**SMALL), SIZES).double().eval(), make_request()
    query_BCD, mean_BCD, product_BCD = caught_parts(model, request)
    keys_BLD = model.embedding.keys(request[0], padding_mask(request[0].lengths_B, 9))
    for b, n in enumerate(request[0].lengths_B.tolist()):
        mean = keys_BLD[b, :n].mean(0) if n else torch.zeros(6, dtype=torch.float64)
        torch.testing.assert_close(mean_BCD[b], mean.expand(6, -1), **CLOSE)
    torch.testing.assert_close(product_BCD, query_BCD * mean_BCD, **CLOSE)


def slow_augru(cell: AttentionalGRU, states: Tensor, weights: Tensor) -> Tensor:
    """h_n of one candidate, gate by gate."""
    D = states.shape[1]
    W, b = cell.inputs.weight, cell.inputs.bias
    h = torch.zeros(D, dtype=states.dtype)
    for s, a in zip(states, weights, strict=True):
        r = torch.sigmoid(W[:D] @ s + b[:D] + h @ cell.gates[:, :D])
        z = torch.sigmoid(W[D : 2 * D] @ s + b[D : 2 * D] + h @ cell.gates[:, D:])
        c = torch.tanh(W[2 * D :] @ s + b[2 * D :] + (r * h) @ cell.candidate)
        h = (1 - a * z) * h + a * z * c
    return h


def test_dien_is_its_equations() -> None:
    """Each user alone, at the length of the history: GRU, softmax attention, AUGRU, and what goes into the head."""
    torch.manual_seed(2)
    model, request = DIEN(DIENSettings(**SMALL, attention_hidden=(5, 4)), SIZES).double().eval(), make_request()
    query_BCD, evolved_BCD, sum_BCD, product_BCD = caught_parts(model, request)
    keys_BLD = model.embedding.keys(request[0], padding_mask(request[0].lengths_B, 9))
    with torch.no_grad():
        for b, n in enumerate(request[0].lengths_B.tolist()):
            if not n:
                assert not evolved_BCD[b].any()
                continue
            keys = keys_BLD[b : b + 1, :n]
            states, _ = model.interest(keys)
            weights, _ = model.attention(states, torch.ones(1, n, dtype=torch.bool), query_BCD[b : b + 1])
            torch.testing.assert_close(weights.sum(-1), torch.ones(1, 6, dtype=torch.float64))
            for c in range(6):
                torch.testing.assert_close(evolved_BCD[b, c], slow_augru(model.evolution, states[0], weights[0, c]), **CLOSE)
            torch.testing.assert_close(sum_BCD[b], keys[0].sum(0).expand(6, -1), **CLOSE)
    torch.testing.assert_close(product_BCD, query_BCD * sum_BCD, **CLOSE)


def test_attention_opens_and_closes_the_gate() -> None:
    """Weights 0 leave the state at zero, whatever comes in; a state changes at the steps of weight 1 alone."""
    torch.manual_seed(0)
    cell = AttentionalGRU(4).double()
    states_BLD = torch.randn(1, 5, 4, dtype=torch.float64, generator=draws(0))
    weights_BCL = torch.tensor([[[0.0] * 5, [0, 1, 0, 1, 0], [1, 1, 1, 1, 1]]], dtype=torch.float64)
    with torch.no_grad():
        h_BCD = cell(states_BLD, weights_BCL)
        two = cell(states_BLD[:, [1, 3]], torch.ones(1, 1, 2, dtype=torch.float64))
    assert not h_BCD[0, 0].any()
    torch.testing.assert_close(h_BCD[0, 1], two[0, 0], **CLOSE)
    assert not torch.allclose(h_BCD[0, 1], h_BCD[0, 2])


def slow_sdim(model: SDIM, keys: Tensor, q: Tensor) -> Tensor:
    """u of one candidate, hash by hash."""
    planes, units = model.planes.view(-1, model.settings.hashes, model.settings.bits), []
    for m in range(model.settings.hashes):
        same = [k for k in keys if torch.equal(k @ planes[:, m] >= 0, q @ planes[:, m] >= 0)]
        units.append(functional.normalize(sum(same, torch.zeros_like(q)), dim=0, eps=1e-6))
    return torch.stack(units).mean(0)


@pytest.mark.parametrize(("hashes", "bits"), [(1, 1), (4, 2), (3, 5)])
def test_sdim_is_a_loop_over_what_collides(hashes: int, bits: int) -> None:
    torch.manual_seed(4)
    model, (history, candidates, _) = SDIM(SDIMSettings(**SMALL, hashes=hashes, bits=bits), SIZES).double().eval(), make_request()
    mask_BL = padding_mask(history.lengths_B, 9)
    with torch.no_grad():
        keys_BLD, query_BCD = model.embedding.keys(history, mask_BL), model.embedding.queries(candidates)
        read_BCD = model.read(keys_BLD, mask_BL, query_BCD)
        for b, n in enumerate(history.lengths_B.tolist()):
            for c in range(int(candidates.lengths_B[b])):
                torch.testing.assert_close(read_BCD[b, c], slow_sdim(model, keys_BLD[b, :n], query_BCD[b, c]), **CLOSE)


def test_sdims_collisions_are_the_angles() -> None:
    """P(two vectors share a signature of b bits) = (1 - angle / π)^b: over 4,000 hashes, within four standard errors."""
    torch.manual_seed(5)
    model = SDIM(SDIMSettings(**SMALL, hashes=4000, bits=2), SIZES).double()
    x = torch.randn(8, 6, dtype=torch.float64, generator=draws(6))
    signatures = model.signatures(x)
    for i in range(7):
        angle = torch.arccos(functional.cosine_similarity(x[i], x[i + 1], dim=0)) / torch.pi
        expected = float((1 - angle) ** 2)
        found = (signatures[i] == signatures[i + 1]).double().mean().item()
        assert abs(found - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5 + 1e-9
