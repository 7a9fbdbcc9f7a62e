"""Evaluation of models on the toy log against loops over single requests; slices, costs and edges."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from longtrail import slices
from longtrail.config import EvaluationSettings, TrainingSettings
from longtrail.costs import measure_cost, model_bytes, peak_memory
from longtrail.errors import HistoryError, ModelError
from longtrail.evaluation import evaluate, predict_ranking, predict_retrieval
from longtrail.examples import FeatureSet, candidate_tensors, context_tensors, history_tensors
from longtrail.metrics import row_ndcg
from longtrail.schema import ITEM_STATISTICS, USER_STATISTICS
from longtrail.training import train
from tests.models_of_toy import save_toy_model, toy_model
from tests.toy import toy_features, toy_tables

SETTINGS = EvaluationSettings(k=(5, 10), replicates=100, latency_requests=5, latency_candidates=20, latency_threads=2, threads=1)


@pytest.fixture(scope="module")
def features(toy_features_folder):
    return FeatureSet.open(toy_features_folder)


def history_before(features, row, most):
    """The slow way: one user's events, sliced."""
    return features.history.gather(np.array([row["user_id"]]), np.array([row["history_length"]]), most)


def seen(features, row):
    arrays = history_before(features, row, 10**6)
    return set(arrays.items_BL[0, : arrays.lengths_B[0]].tolist())


def microseconds(row):
    return int(row["timestamp"].timestamp() * 1_000_000)


def slow_logit(module, features, row, most):
    one = {name: np.array([[row[name]]]) for name in ITEM_STATISTICS}
    candidates = candidate_tensors(np.array([[row["item_id"]]]), np.array([1]), one, features.catalogue, features.prior_click_rate)
    user = {name: np.array([row[name]]) for name in USER_STATISTICS}
    context = context_tensors(np.array([row["history_length"]]), user, np.array([microseconds(row)]), features.prior_click_rate)
    with torch.no_grad():
        return float(module(history_tensors(history_before(features, row, most), features.catalogue), candidates, context)[0, 0])


@pytest.mark.parametrize(("name", "most"), [("popularity", 1), ("din", 12)])
def test_every_shown_item_gets_the_score_it_would_get_alone(features, name, most):
    model = toy_model(features, name)
    rows = predict_ranking(model.module, features, "test", batch_size=7)
    examples = features.examples("test").to_pylist()
    assert len(rows.logits_n) == len(examples) > 100
    for place in range(0, len(examples), 9):
        assert rows.logits_n[place] == pytest.approx(slow_logit(model.module, features, examples[place], most), abs=1e-5)
    assert rows.clicks_n.tolist() == [e["click"] for e in examples]
    assert rows.items_n.tolist() == [e["item_id"] for e in examples]
    assert rows.requests == len({(e["request_id"], e["user_id"], e["timestamp"]) for e in examples})


def test_ranking_metrics_of_a_split_equal_scikit_learns(features):
    model = toy_model(features, "popularity")
    result = evaluate(model, features, "test", SETTINGS)
    examples = features.examples("test").to_pandas()
    scores = model.module.logits.numpy()[examples.item_id]
    assert result.metrics["auc"].value == pytest.approx(roc_auc_score(examples.click, scores))
    users = [g for _, g in examples.assign(score=scores).groupby("user_id") if 0 < g.click.mean() < 1]
    expected = np.average([roc_auc_score(g.click, g.score) for g in users], weights=[len(g) for g in users])
    assert result.metrics["gauc"].value == pytest.approx(expected)
    assert all(e.low <= e.value <= e.high for e in result.metrics.values())
    assert result.counts == {
        "rows": len(examples),
        "requests": result.counts["requests"],
        "users": examples.user_id.nunique(),
        "clicks": examples.click.sum(),
    }


def slow_ranks(model, features, most, k, targets, *, exclude_seen=True):
    """(rank, list) of each target by a Python sort of the whole catalogue; None where the user had seen it and that is left out."""
    with torch.no_grad():
        items = model.module.item_vectors().numpy()
        answers = []
        for row in targets:
            user = model.module.user_vectors(history_tensors(history_before(features, row, most), features.catalogue)).numpy()[0]
            hidden = seen(features, row) if exclude_seen else set()
            if row["item_id"] in hidden:
                answers.append(None)
                continue
            order = sorted((i for i in range(1, len(items)) if i not in hidden), key=lambda i: (-float(items[i] @ user), i))
            answers.append((order.index(row["item_id"]) + 1 if row["item_id"] in order else 0, order[:k]))
    return answers


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize(("name", "most"), [("popular_items", 1), ("sasrec", 12)])
def test_ranks_equal_a_sort_of_the_whole_catalogue(features, name, most, exclude_seen):
    model = toy_model(features, name)
    if name == "sasrec":  # scores far enough apart that rounding cannot swap two
        with torch.no_grad():
            model.module.items.table[1:].normal_(generator=torch.Generator().manual_seed(1))
    rows = predict_retrieval(model.module, features, "test", k=10, batch_size=16, exclude_seen=exclude_seen)
    targets = features.targets("test").to_pylist()
    expected = slow_ranks(model, features, most, 10, targets, exclude_seen=exclude_seen)
    new = [(t, a) for t, a in zip(targets, expected, strict=True) if a is not None]
    assert rows.seen_before == len(targets) - len(new) and (rows.seen_before > 0) == exclude_seen
    assert sorted(rows.seen_n) == sorted(len(seen(features, t)) if exclude_seen else 0 for t, _ in new)
    found = sorted(zip(rows.users_n, rows.times_n, rows.items_n, rows.ranks_n, strict=True))
    wanted = sorted((t["user_id"], microseconds(t), t["item_id"], a[0]) for t, a in new)
    assert [tuple(map(int, f)) for f in found] == wanted
    assert all(not (set(ids.tolist()) & {0}) for ids in rows.lists_nK)


def test_retrieval_metrics_of_a_split(features):
    result = evaluate(toy_model(features, "popular_items"), features, "test", SETTINGS)
    ranks = np.array([a[0] for a in slow_ranks(toy_model(features, "popular_items"), features, 1, 10, features.targets("test").to_pylist()) if a])
    assert result.metrics["recall@5"].value == pytest.approx(np.mean(ranks <= 5))
    assert result.metrics["ndcg@10"].value == pytest.approx(np.mean(np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0)))
    assert result.metrics["mrr"].value == pytest.approx(np.mean(1 / ranks))
    assert set(result.metrics) == {"ndcg@5", "recall@5", "ndcg@10", "recall@10", "mrr", "coverage@5", "coverage@10"}
    assert all(0 <= e.low <= e.value <= e.high <= 1 for e in result.metrics.values())
    assert result.curve[-1]["k"] <= features.catalogue.items


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("name", ["sasrec", "popular_items"])
def test_training_judges_as_evaluation_does(features, name, exclude_seen):
    """The figure that stops training is that of the search as it will be."""
    settings = toy_model(features, name).card.settings
    settings = settings.model_copy(update={"max_epochs": 1}) if name == "sasrec" else settings
    trained = train(features, settings, name, TrainingSettings(threads=1), data="x", exclude_seen=exclude_seen)
    rows = predict_retrieval(trained.module, features, "valid", k=10, exclude_seen=exclude_seen, max_per_user=20)
    values = row_ndcg(rows.ranks_n, 10)
    expected = values.sum() / (len(values) + rows.seen_before)  # in training a target that was seen is a miss, not left out
    assert trained.value == pytest.approx(expected, abs=1e-6)


def test_batches_do_not_change_the_figures(features):
    model = toy_model(features, "sasrec")
    one, many = (evaluate(model, features, "valid", SETTINGS, batch_size=size).json() for size in (1, 64))
    assert one["metrics"]["mrr"]["value"] == pytest.approx(many["metrics"]["mrr"]["value"], abs=1e-6)
    assert [s["rows"] for s in one["slices"]] == [s["rows"] for s in many["slices"]]


def test_items_newer_than_the_model_are_misses(features):
    older = toy_model(features, "popular_items", items=40)
    rows = predict_retrieval(older.module, features, "test", k=5)
    assert (rows.ranks_n[rows.items_n > 40] == 0).all() and (rows.items_n > 40).any()
    assert (rows.ranks_n[rows.items_n <= 40] > 0).all()
    assert rows.lists_nK.max() <= 40
    whole = predict_retrieval(toy_model(features, "popular_items").module, features, "test", k=5)
    assert rows.seen_before == whole.seen_before


@pytest.mark.parametrize("name", ["popularity", "sasrec"])
def test_slices_part_the_rows_and_json_holds_no_nan(features, name):
    result = evaluate(toy_model(features, name), features, "test", SETTINGS)
    for cut in {s["slice"] for s in result.slices}:
        assert sum(s["rows"] for s in result.slices if s["slice"] == cut) == result.counts["rows"]
    assert {s["slice"] for s in result.slices} >= {"history length", "item age", "user", "item"}
    text = json.dumps(result.json(), allow_nan=False, default=int)
    assert "bucket" in text


def test_max_targets_per_user(features):
    result = evaluate(toy_model(features, "popular_items"), features, "test", SETTINGS.model_copy(update={"max_targets_per_user": 1}))
    assert result.counts["rows"] + result.counts["targets_seen_before"] == len(set(features.targets("test")["user_id"].to_pylist()))


def test_a_model_of_other_data_is_refused(features):
    model = toy_model(features, "popularity")
    other = replace(model, card=replace(model.card, sizes=replace(features.sizes, items=features.sizes.items + 1)))
    with pytest.raises(ModelError, match="trained on other data"):
        evaluate(other, features, "test", SETTINGS)


def test_scores_that_are_not_numbers_are_refused(features):
    model = toy_model(features, "popularity")
    model.module.logits[features.examples("test")["item_id"][3].as_py()] = torch.nan
    with pytest.raises(ModelError, match=r"scores of the test split are not finite, first at row"):
        evaluate(model, features, "test", SETTINGS)


def test_a_log_without_impressions_cannot_be_ranked(tmp_path):
    tables = toy_tables(tmp_path / "tables", users=20, items=30, events_per_user=12, impressions=False)
    without = FeatureSet.open(toy_features(tables, tmp_path / "features"))
    with pytest.raises(HistoryError, match="no rows"):
        evaluate(toy_model(without, "popularity"), without, "test", SETTINGS)
    assert evaluate(toy_model(without, "popular_items"), without, "test", SETTINGS).metrics["mrr"].value > 0


# ---------------------------------------------------------------- slices


def buckets(cut):
    return [cut.labels[b] for b in cut.buckets_n]


def test_bucket_edges():
    assert buckets(slices.by_history_length(np.array([0, 1, 9, 10, 49, 50, 199, 200, 999, 1000]))) == [
        "0", "1–9", "1–9", "10–49", "10–49", "50–199", "50–199", "200–999", "200–999", "1000+",
    ]  # fmt: skip
    day = slices.DAY
    ages = np.array([-5, 0, 1, day - 1, day, 7 * day, 30 * day, 180 * day])
    assert buckets(slices.by_item_age(ages + 10**15, np.full(8, 10**15))) == [
        "new", "new", "under 1 day", "under 1 day", "1–7 days", "7–30 days", "30–180 days", "180+ days",
    ]  # fmt: skip
    assert buckets(slices.by_train_events("user", np.array([0, 1]))) == ["cold", "warm"]
    assert buckets(slices.by_position(np.array([1, 2, 3, 4, 10, 11]))) == ["1", "2–3", "2–3", "4–10", "4–10", "11+"]


# ---------------------------------------------------------------- costs


@pytest.mark.parametrize("name", ["sasrec", "din"])
def test_cost_is_that_of_a_process_of_its_own(features, tmp_path, name):
    folder = save_toy_model(tmp_path / name, toy_model(features, name))
    ballast = np.ones(80_000_000)  # 640 MB that must not be counted
    cost = measure_cost(folder, SETTINGS)
    assert 0 < cost.latency_ms_p50 <= cost.latency_ms_p99 < 5_000
    assert 0 < cost.processor_ms_p50 <= cost.processor_ms_p99
    assert 50e6 < cost.base_memory_bytes <= cost.peak_memory_bytes < peak_memory()
    assert cost.peak_memory_bytes < ballast.nbytes
    assert (cost.history, cost.candidates, cost.requests, cost.threads) == (12, 20, 5, 2)
    assert cost.model_bytes == model_bytes(folder) == sum((folder / f).stat().st_size for f in ("model.safetensors", "model.json"))


def test_a_damaged_model_is_named(features, tmp_path):
    folder = save_toy_model(tmp_path / "m", toy_model(features, "popularity"))
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="1 bytes"):
        measure_cost(folder, SETTINGS)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        model_bytes(tmp_path)


def test_what_is_asked_of_a_model_of_the_other_stage_is_refused(features):
    with pytest.raises(ModelError, match="SASRec is a retriever; expected a ranker, or predict_retrieval"):
        predict_ranking(toy_model(features, "sasrec").module, features, "test")
    with pytest.raises(ModelError, match="DIN is no retriever; expected a model with user_vectors and item_vectors"):
        predict_retrieval(toy_model(features, "din").module, features, "test", k=5)


def test_what_was_trained_is_judged_with_no_file_between(features):
    settings = toy_model(features, "din").card.settings.model_copy(update={"max_epochs": 1})
    trained = train(features, settings, "din", TrainingSettings(accelerator="cpu", threads=1), data="d")
    model = trained.loaded(features, "din")
    assert model.module is trained.module and model.card == replace(toy_model(features, "din").card, settings=settings, name="din")
    assert evaluate(model, features, "valid", SETTINGS).metrics["auc"].value == pytest.approx(trained.value)
