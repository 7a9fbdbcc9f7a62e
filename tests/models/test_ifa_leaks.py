"""Leak detectors: where nothing tells which candidate was clicked, a trained IFA does not know either; and where something does, they see it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from longtrail.config import IFASettings
from longtrail.examples import FeatureSet, RankingBatch, RankingBatches
from longtrail.examples.features import column
from longtrail.history import HistoryArrays
from longtrail.losses import ranking_loss
from longtrail.metrics import auc, gauc
from longtrail.models.rankers.ifa import IFA
from tests.contracts.batches import SIZES, make_candidates, make_context, make_history
from tests.toy import toy_features, toy_tables


class Placed(nn.Module):
    """A relation that knows each candidate's place in the set."""

    def __init__(self, relation: nn.Module, places: int, width: int) -> None:
        super().__init__()
        self.relation, self.places = relation, nn.Parameter(torch.zeros(places, width))

    def forward(self, x_BCD: Tensor, mask_BC: Tensor) -> Tensor:
        return self.relation(x_BCD + self.places[: x_BCD.shape[1]], mask_BC)


@pytest.mark.parametrize("leaks", [False, True], ids=["honest", "knows places"])
def test_the_place_of_a_candidate_says_nothing(leaks: bool) -> None:
    """One positive, always the first, among i.i.d. others, trained with the whole loss: on fresh sets its rank is that of chance."""
    torch.manual_seed(0)
    places, requests = 8, 1500
    model = IFA(IFASettings(width=4, hidden=(16,), max_history=3, features=4, relation_dropout=0.0), SIZES).train()
    if leaks:
        assert model.relation is not None
        model.relation = Placed(model.relation, places, 8)  # type: ignore[assignment]
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)

    def logits(count: int, seed: int) -> tuple[Tensor, Tensor]:
        candidates = make_candidates(seed, (places,) * count)
        return model(make_history(seed, (3,) * count), candidates, make_context(seed, count)), candidates.lengths_B

    for step in range(80):
        logits_BC, lengths_B = logits(64, 1000 + step)
        labels_BC = torch.zeros_like(logits_BC)
        labels_BC[:, 0] = 1
        loss = ranking_loss(logits_BC, labels_BC, lengths_B, listwise=0.5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        logits_BC = logits(requests, 7)[0]
    found = ((logits_BC[:, :1] > logits_BC).sum() / (requests * (places - 1))).item()
    if leaks:
        assert found > 0.9
    else:
        assert abs(found - 0.5) < 4 * (1 / 12 / requests) ** 0.5  # a rank is uniform over the places: σ² is about 1/12


class NoSeenItems(FeatureSet):
    """A log that never shows what its user had to do with before, as serving does not."""

    def examples(self, split: str) -> pa.Table:
        table = super().examples(split)
        users_E, lengths_E, items_E = (column(table, name) for name in ("user_id", "history_length", "item_id"))
        held = self.history.flat(users_E, lengths_E)
        rows_n = np.repeat(np.arange(len(items_E)), np.diff(held.offsets_B1))
        fresh_E = np.ones(len(items_E), bool)
        fresh_E[rows_n[held.items == items_E[rows_n]]] = False
        return table.filter(pa.array(fresh_E))


class TooLong:
    """Histories that go on for a few events after the request, among them what was clicked."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def gather(self, users_B: np.ndarray, lengths_B: np.ndarray, max_length: int) -> HistoryArrays:
        return self.store.gather(users_B, np.minimum(lengths_B + 2, self.store.lengths(users_B)), max_length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def without_counts(batches: RankingBatches, rows_BC: np.ndarray, drawn_BC: np.ndarray, starts_B: np.ndarray) -> dict[str, np.ndarray]:
    """Item statistics that sampled candidates do not have."""
    return {name: np.where((rows_BC >= 0) & ~drawn_BC, values_E[rows_BC], 0) for name, values_E in batches._statistics_E.items()}


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    """Nothing that came before tells which item of a request was clicked."""
    place = tmp_path_factory.mktemp("shuffled")
    features = FeatureSet.open(toy_features(toy_tables(place / "tables", users=150, seed=1, shuffled=True), place / "features"))
    return NoSeenItems(**{name: getattr(features, name) for name in features.__dataclass_fields__})


def scored(features: FeatureSet) -> Iterator[tuple[RankingBatch, Tensor]]:
    """Held-out batches with sampled candidates, and the logits of an IFA that was trained on sampled sets with the whole loss."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"max_history": 20, "batch_size": 64, "seed": 0, "sampled": 4}
    model = IFA(IFASettings(width=4, hidden=(16,), max_history=20, features=8), features.sizes).train()
    optimiser, batches = torch.optim.Adam(model.parameters(), lr=1e-2), RankingBatches(features, "train", **settings)
    for epoch in range(4):
        batches.set_epoch(epoch)
        for batch in batches:
            logits_BC = model(batch.history, batch.candidates, batch.context)
            loss = ranking_loss(logits_BC, batch.clicks_BC, batch.candidates.lengths_B, exposed_BC=batch.exposed, listwise=0.5)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval()
    for split in ("valid", "test"):
        for batch in RankingBatches(features, split, **settings):
            with torch.no_grad():
                yield batch, model(batch.history, batch.candidates, batch.context)


@pytest.mark.parametrize("leak", ["none", "history reads on", "sampled have no counts"])
def test_clicks_that_were_shuffled_within_their_request_are_not_found(leak: str, shuffled: FeatureSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """GAUC of held-out requests, and AUC of what was logged against what was sampled beside it: chance."""
    features = replace(shuffled, history=TooLong(shuffled.history)) if leak == "history reads on" else shuffled  # type: ignore[arg-type]
    if leak == "sampled have no counts":
        monkeypatch.setattr(RankingBatches, "_statistics", without_counts)
    requests, clicks, logits, logged, all_logits = [], [], [], [], []
    for i, (batch, logits_BC) in enumerate(scored(features)):
        own_BC, real_BC = batch.exposed, torch.arange(logits_BC.shape[1]) < batch.candidates.lengths_B.unsqueeze(1)
        requests.append((batch.requests_B.unsqueeze(1) + 10**6 * i).expand_as(own_BC)[own_BC].numpy())
        clicks.append(batch.clicks_BC[own_BC].numpy().astype(np.int64))
        logits.append(logits_BC[own_BC].numpy())
        logged.append(own_BC[real_BC].numpy().astype(np.int64))
        all_logits.append(logits_BC[real_BC].numpy())
    by_request = gauc(*(np.concatenate(x) for x in (requests, clicks, logits)))
    of_logged = auc(np.concatenate(logged), np.concatenate(all_logits))
    assert by_request > 0.6 if leak == "history reads on" else abs(by_request - 0.5) < 0.08
    assert of_logged > 0.6 if leak == "sampled have no counts" else abs(of_logged - 0.5) < 0.06
