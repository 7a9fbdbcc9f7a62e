"""What the demo tells of a list, against the model asked directly; whom it suggests; when it is shown."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from features.online import OnlineFeatures
from longtrail.config import IFASettings
from longtrail.examples import candidate_tensors, context_tensors, history_tensors
from longtrail.history import HistoryArrays
from longtrail.models.registry import build_model
from longtrail.schema import ITEM_STATISTICS
from serving import explain
from serving.arms import load_arms
from serving.artifacts import ARTIFACTS, Artifacts
from serving.demo.people import FOUND, People
from serving.demo.schemas import ExplainRequest
from serving.demo.switch import DEMO_VARIABLE, own_machine, shown
from serving.errors import RequestError, Unavailable
from serving.explain import Explainer
from serving.lists import FALLBACK_ARM, PopularLists
from serving.scoring import newest
from serving.weights import weights_of
from tests.serving.bento import Outputs


@pytest.fixture(scope="module")
def artifacts(packaged: Outputs) -> Artifacts:
    return Artifacts.open(packaged.bento / "src" / ARTIFACTS)


@pytest.fixture(scope="module")
def online(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> OnlineFeatures:
    return OnlineFeatures(artifacts.snapshot, state=tmp_path_factory.mktemp("online"))


def explainer(artifacts: Artifacts, online: Any, **more: Any) -> Explainer:
    parts = {
        "arms": load_arms(artifacts).all,
        "users": artifacts.users,
        "popular": PopularLists(artifacts.catalogue, artifacts.manifest.prior_click_rate),
        "catalogue": artifacts.catalogue,
        "retrieve": artifacts.settings.retrieve,
    }
    return Explainer(online=online, **(parts | more))


def asked(user: str, *arms: str, k: int = 5) -> ExplainRequest:
    return ExplainRequest(user_id=user, arms=list(arms or ("sam", FALLBACK_ARM)), k=k)


def decoded(told: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(told["bytes"]), np.int8) * told["largest"] / 127


def test_a_list_is_the_arms_best_and_its_weights_are_the_models(artifacts: Artifacts, online: OnlineFeatures) -> None:
    answer = explainer(artifacts, online).explain(asked("u0007"))
    scorer, catalogue = load_arms(artifacts).all[0].scorer, artifacts.catalogue
    user = online.read([artifacts.users["u0007"]], 10**6)
    length = user.history.lengths_B[0]
    assert answer["known"] and answer["total"] == user.totals_B[0] and len(answer["history"]["items"]) == length
    keys = [key for key, _ in answer["items"]]
    assert [keys[item] for item in answer["history"]["items"]] == [catalogue.keys[item] for item in user.history.items_BL[0, :length]]
    assert answer["history"]["times"] == (user.history.times_BL[0, :length] // 10**6).tolist()
    assert answer["history"]["actions"] == user.history.actions_BL[0, :length].tolist()

    candidates, _ = scorer.retrieve(user.history, artifacts.settings.retrieve, user.history.items_BL[0, :length])
    items_1C = candidates[None, :]
    logits = scorer.logits(user.history, user.totals_B, user.statistics, items_1C, scorer.item_statistics(items_1C), np.array([0]))[0]
    best = np.argsort(-logits, kind="stable")
    sam, popular = answer["arms"]
    explained = [catalogue.id_of(keys[item]) for item in answer["explained"]]
    assert [keys[item] for item in sam["list"]] == [catalogue.keys[item] for item in candidates[best[:5]]]
    assert sam["candidates"] == len(candidates) and sam["personal"] and sam["fallback"] is None and not popular["personal"]
    for item, place, score in zip(explained, sam["places"], sam["scores"], strict=True):
        found = np.flatnonzero(candidates == item)
        assert (place is None) == (len(found) == 0)
        if place is not None:
            assert candidates[best[place - 1]] == item and score == pytest.approx(1 / (1 + np.exp(-logits[found[0]])), abs=2e-6)

    read = newest(user.history, scorer.ranker_history)
    statistics = scorer.item_statistics(np.array([explained]))
    tensors = (
        history_tensors(read, catalogue),
        candidate_tensors(np.array([explained]), np.array([len(explained)]), statistics, catalogue, artifacts.manifest.prior_click_rate),
        context_tensors(user.totals_B, user.statistics, np.array([1]), artifacts.manifest.prior_click_rate),
    )
    with torch.inference_mode():
        passes = scorer.ranker.attention_weights(*tensors)  # type: ignore[attr-defined]
    assert sam["reads"] == read.lengths_B[0] == 16 and len(sam["passes"]) == len(passes) == 3
    for told_U, weights_UL in zip(sam["passes"], passes, strict=True):
        for told, weights in zip(told_U, weights_UL[0].double().numpy(), strict=True):
            assert told["largest"] == pytest.approx(np.abs(weights).max(), rel=1e-5) and told["mean"] == pytest.approx(weights.mean(), rel=1e-5)
            np.testing.assert_allclose(decoded(told), weights, atol=told["largest"] / 254 + 1e-6)
            assert [weight for _, weight in told["strongest"]] == pytest.approx(sorted(weights, key=lambda w: -abs(w))[: explain.STRONGEST], rel=1e-5)
            assert all(weights[place] == pytest.approx(weight, rel=1e-5) for place, weight in told["strongest"])


def test_a_long_history_is_told_in_part(artifacts: Artifacts, online: OnlineFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "EVENTS", 6)
    answer = explainer(artifacts, online).explain(asked("u0007"))
    assert answer["total"] == 40 and len(answer["history"]["items"]) == 6
    sam = answer["arms"][0]
    assert sam["reads"] == 6 and {len(decoded(told)) for told_U in sam["passes"] for told in told_U} == {6}
    assert len(sam["list"]) == 5, "candidates still leave out all that was seen"


def test_strangers_get_the_popular_list(artifacts: Artifacts, online: OnlineFeatures) -> None:
    answer = explainer(artifacts, online).explain(asked("nobody", "sam", "sam", k=3))
    popular = 1 + np.argsort(-artifacts.catalogue.item_events[1:], kind="stable")[:3]
    assert not answer["known"] and answer["total"] == 0 and answer["history"] == {"items": [], "actions": [], "times": []}
    for arm in answer["arms"]:
        assert arm["fallback"] == "unknown user" and not arm["personal"] and arm["passes"] == [] and arm["model"] is None
        assert [answer["items"][item][0] for item in arm["list"]] == [artifacts.catalogue.keys[item] for item in popular]


def test_someone_known_without_events_has_lists_and_nothing_to_weigh(artifacts: Artifacts, online: OnlineFeatures) -> None:
    answer = explainer(artifacts, online, users={"fresh": 10_000}).explain(asked("fresh"))
    sam = answer["arms"][0]
    assert answer["known"] and answer["total"] == 0 and len(sam["list"]) == 5 and sam["personal"] and sam["passes"] == [] and sam["reads"] == 0


def test_a_silent_store_is_said(artifacts: Artifacts) -> None:
    class Silent:
        def __getattr__(self, name: str) -> Any:
            def read(*_: Any, **__: Any) -> Any:
                raise Unavailable("store down")

            return read

    answer = explainer(artifacts, Silent()).explain(asked("u0007"))
    assert answer["unavailable"] == "store down" and answer["arms"][0]["fallback"] == "store down" and len(answer["arms"][0]["list"]) == 5


def test_an_arm_that_is_not_there_is_named(artifacts: Artifacts, online: OnlineFeatures) -> None:
    with pytest.raises(RequestError, match=r"arms\[1\]: unknown arm 'x'; expected one of sam, popularity_fallback"):
        explainer(artifacts, online).explain(asked("u0007", "sam", "x"))


@pytest.mark.parametrize("feature_map", ["elu1", "softmax"])
def test_a_sum_over_the_history_tells_its_nearest_behaviours(artifacts: Artifacts, feature_map: str) -> None:
    torch.manual_seed(1)
    ifa = build_model(IFASettings(width=8, feature_map=feature_map, recent_events=0), artifacts.manifest.sizes).eval()  # type: ignore[arg-type]
    rng = np.random.default_rng(2)
    columns = [rng.integers(1, 5, (1, 9)), np.ones((1, 9), np.int64), np.arange(9)[None, :] * 10**9]
    history = HistoryArrays(items_BL=columns[0], actions_BL=columns[1], times_BL=columns[2], lengths_B=np.array([9]))
    items = np.array([3, 50, 7])
    found = weights_of(ifa, history, items, artifacts.catalogue, 10**12)
    zeros = dict.fromkeys(ITEM_STATISTICS, np.zeros((1, 3), np.int64))
    candidates = candidate_tensors(items[None, :], np.array([3]), zeros, artifacts.catalogue, 0.3)
    expected = ifa.behaviour_weights(history_tensors(history, artifacts.catalogue), candidates)  # type: ignore[operator]
    assert found.kind == "behaviours" and len(found.passes) == 1
    np.testing.assert_allclose(found.passes[0], expected[0].numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.passes[0].sum(-1), 1, rtol=1e-5)


def test_a_ranker_that_cannot_tell_is_left_alone(artifacts: Artifacts) -> None:
    history = HistoryArrays(
        items_BL=np.ones((1, 1), np.int64), actions_BL=np.ones((1, 1), np.int64), times_BL=np.ones((1, 1), np.int64), lengths_B=np.ones(1, np.int64)
    )
    assert weights_of(torch.nn.Identity(), history, np.array([1]), artifacts.catalogue, 0).kind is None


def people(path: Path, users: dict[str, int]) -> People:
    pq.write_table(pa.table({"user_key": list(users), "events": list(users.values())}), path)
    return People(path)


def test_users_are_found_by_the_beginning_of_their_key(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    users = {f"{'ab'[number % 2]}{number}ä": int(rng.integers(0, 99)) for number in range(300)} | {"z": 5, "é": 6, "𝕫": 7, "Ω/<b>": 8}
    found = people(tmp_path / "users.parquet", users)
    for text in ("", "a", "a1", "a10", "b29", "z", "zz", "é", "𝕫", "Ω", "~"):
        expected = sorted(key for key in users if key.startswith(text))[:FOUND]
        assert [(one["user_id"], one["events"]) for one in found.starting_with(text)] == [(key, users[key]) for key in expected], text


def test_suggestions_span_the_lengths(tmp_path: Path) -> None:
    users = {f"u{number:03d}": number * number for number in range(101)}
    found = people(tmp_path / "users.parquet", users).suggestions()
    assert [(one["user_id"], one["why"]) for one in found] == [
        ("u100", "longest"), ("u099", "longest"), ("u090", "long"), ("u050", "typical"), ("u000", "shortest")
    ]  # fmt: skip
    assert people(tmp_path / "none.parquet", {}).suggestions() == []
    assert [one["user_id"] for one in people(tmp_path / "one.parquet", {"only": 3}).suggestions()] == ["only"]


def test_nobody_finds_it_on_by_accident() -> None:
    here, there = ({DEMO_VARIABLE: own_machine(host)} for host in ("127.0.0.1", "0.0.0.0"))
    assert shown("auto", here, tokens=False) and not shown("auto", here, tokens=True)
    assert not shown("auto", there, tokens=False) and not shown("auto", {}, tokens=False)
    assert shown(True, there, tokens=True) and not shown(False, here, tokens=False)
