"""attention_init: similarity. SAM and DIN begin with weights that follow q · k, against formulas of one pair at a time."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from longtrail.config import DINSettings, SAMSettings
from longtrail.metrics import auc
from longtrail.models.contracts import Candidates, Context, History
from longtrail.models.rankers.din import DIN
from longtrail.models.rankers.sam import SAM
from tests.contracts.batches import SIZES, draws, make_request
from tests.models.test_din import make_din
from tests.models.test_sam import attention, make_sam, random_inputs

ITEMS, CATEGORIES = torch.tensor([1, 2, 2, 7, 30, 40]), torch.tensor([1, 0, 0, 6, 2, 2])


def slow_similarity(model: SAM | DIN) -> tuple[float, float]:
    """Mean and standard deviation of q · k over all pairs, one by one."""
    vectors, categories = model.embedding.items.vectors(), model.embedding.categories.vectors()
    x = [torch.cat([vectors[i], categories[c]]) for i, c in zip(ITEMS.tolist(), CATEGORIES.tolist(), strict=True)]
    products = [float(q @ k) for q in x for k in x]
    mean = sum(products) / len(products)
    return mean, (sum((product - mean) ** 2 for product in products) / len(products)) ** 0.5


def scores(model: SAM | DIN, keys_BLD: Tensor, mask_BL: Tensor, query_BCD: Tensor) -> Iterator[Tensor]:
    """Weights [B, C, L] of each attention layer, with the units silent that do not start as a similarity."""
    layers: list[Any] = [attention(model, i) for i in range(model.settings.passes)] if isinstance(model, SAM) else [model.attention]
    for layer in layers:
        last = layer.second if isinstance(model, SAM) else layer.last
        assert last[3:].all() and layer.first[:, :, 3:].all()  # the others start as ever
        last[3:] = 0
        yield layer(keys_BLD, mask_BL, query_BCD, *([torch.randn_like(query_BCD)] if isinstance(model, SAM) else []))[0]  # whatever the memory is


FORMS = [
    ("sam", "sigmoid"),
    ("sam", "scaled_sigmoid"),
    ("sam", "softmax"),
    ("sam", "softmax_eps"),
    ("din", "sigmoid"),
    ("din", "linear"),
    ("din", "softmax"),
]


@pytest.mark.parametrize(("kind", "weights"), FORMS)
@torch.no_grad()
def test_weights_start_as_a_function_of_the_inner_product(kind: str, weights: str) -> None:
    changes: dict[str, Any] = {"attention_init": "similarity", "attention_weights": weights}
    model = make_sam(**changes, attention_hidden=6) if kind == "sam" else make_din(**changes, attention_hidden=(6,))
    model.embedding.items.table[1:, 0] += 2  # type: ignore[operator,index] # what all have in common says nothing of who are alike
    mean, spread = slow_similarity(model)
    assert model.embedding.similarity(ITEMS, CATEGORIES) == pytest.approx((mean, spread), rel=1e-9)
    model.start_attention(ITEMS, CATEGORIES)
    keys_BLD, mask_BL, _, query_BCD = random_inputs(model, (1, 9, 4), seed=1)  # type: ignore[arg-type]
    unit_BCL = (2 * (query_BCD @ keys_BLD.transpose(1, 2) - mean) / spread - 2).sigmoid()
    score_BCL = 6 * unit_BCL - 3
    powers_BCL = (score_BCL - score_BCL.amax(-1, keepdim=True)).exp()
    expected = {
        "linear": unit_BCL,
        "sigmoid": score_BCL.sigmoid(),
        "softmax": score_BCL.softmax(-1),
        "softmax_eps": powers_BCL / (powers_BCL.sum(-1, keepdim=True) + 0.01),
    }[weights.removeprefix("scaled_")]
    for found in scores(model, keys_BLD, mask_BL, query_BCD):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changes", [{"attention_weights": "softmax"}, {"attention_weights": "scaled_sigmoid"}, {"attention_hidden": 1}])
def test_every_form_can_start_so(changes: dict[str, Any]) -> None:
    for model in (make_sam(attention_init="similarity", **changes), make_din(attention_init="similarity", attention_hidden=(1,))):
        before = model(*make_request())
        model.start_attention(ITEMS, CATEGORIES)
        after = model(*make_request())
        assert torch.isfinite(after).all() and not torch.allclose(before, after)


def test_equal_items_have_no_spread_to_divide_by() -> None:
    model = make_sam(attention_init="similarity")
    model.start_attention(torch.full((5,), 3), torch.full((5,), 1))
    assert torch.isfinite(model(*make_request())).all()


def test_the_papers_starts_are_left_alone() -> None:
    for model in (make_sam(), make_sam(attention_init="log_length"), make_din()):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.start_attention(ITEMS, CATEGORIES)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_din_of_several_attention_layers_cannot_start_so() -> None:
    with pytest.raises(ValidationError, match="2 layers in attention_hidden; expected one"):
        DINSettings(attention_init="similarity", attention_hidden=(8, 4))


def make_world(seed: int, users: int = 64, events: int = 60, shown: int = 4) -> tuple[History, Candidates, Context, Tensor]:
    """Requests and clicks [B, C]: who likes or skips a category clicks on it, or not; nothing else tells."""
    random = draws(seed)
    likes_BK = torch.rand(users, SIZES.categories + 1, generator=random) < 0.5
    items_BL, items_BC = (torch.randint(1, SIZES.items + 1, (users, n), generator=random) for n in (events, shown))
    categories_BL, categories_BC = items_BL % SIZES.categories + 1, items_BC % SIZES.categories + 1
    actions_BL = 1 + likes_BK.gather(1, categories_BL).long()
    lengths_B = torch.full((users,), events)
    history = History(items_BL=items_BL, categories_BL=categories_BL, actions_BL=actions_BL, times_BL=items_BL, lengths_B=lengths_B)
    statistics_BCF = torch.zeros(users, shown, 3)
    candidates = Candidates(items_BC=items_BC, categories_BC=categories_BC, statistics_BCF=statistics_BCF, lengths_B=torch.full((users,), shown))
    context = Context(statistics_BG=torch.zeros(users, 3), times_B=lengths_B)
    return history, candidates, context, likes_BK.gather(1, categories_BC)


def learnt(init: str, steps: int = 60) -> float:
    """AUC on requests that were not trained on. Item vectors start near those of their category, as co-occurrence makes them."""
    torch.manual_seed(0)
    model = SAM(SAMSettings(width=8, attention_init=init, hidden=(16,), max_history=60, passes=2, read_scale="sqrt"), SIZES)  # type: ignore[arg-type]
    items = torch.arange(1, SIZES.items + 1)
    categories = items % SIZES.categories + 1
    model.embedding.start_items(functional.pad(torch.eye(8)[categories] + 0.1 * torch.randn(SIZES.items, 8), (0, 0, 1, 0)))
    model.start_attention(items, categories)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        *request, clicks_BC = make_world(step)
        loss = functional.binary_cross_entropy_with_logits(model(*request), clicks_BC.float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    *request, clicks_BC = make_world(10_000)
    with torch.no_grad():
        return auc(clicks_BC.long().numpy().ravel(), model.eval()(*request).numpy().ravel()) or 0.0


def test_it_learns_sooner_than_from_the_papers_start() -> None:
    """In 60 steps, from q · k: which events are of the candidate's category, and what was done to them; from random units: less of it."""
    found = {init: learnt(init) for init in ("similarity", "zero")}
    assert found["similarity"] > 0.95 and found["zero"] < found["similarity"] - 0.1, found
