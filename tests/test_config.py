"""params.yaml: what is in the repository loads; what is wrong is named by its dotted key."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import TypeAdapter

from longtrail.config import (
    EventLogDataset,
    Model,
    MovieLensDataset,
    OpenBanditDataset,
    SAMSettings,
    SASRecSettings,
    WorldDataset,
    load_config,
    parse_config,
)
from longtrail.config.judging import RANKING_METRICS
from longtrail.errors import ConfigError
from longtrail.metrics import ranking_contributions, retrieval_contributions
from longtrail.models.contracts import Sizes
from longtrail.models.registry import build_model

ROOT = Path(__file__).parents[1]


def values() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "params.yaml").read_text())


def changed(path: str, value: Any) -> dict[str, Any]:
    found = changing = values()
    *parents, last = path.split(".")
    for name in parents:
        changing = changing.setdefault(name, {})
    changing[last] = value
    return found


def test_the_repository_s_params_load() -> None:
    config = load_config(ROOT / "params.yaml")
    assert isinstance(config.dataset, MovieLensDataset)
    assert set(config.pipeline.models) <= set(config.models)
    assert parse_config(values()) == config


def test_settings_are_immutable() -> None:
    config = load_config(ROOT / "params.yaml")
    with pytest.raises(Exception, match="frozen"):
        config.ingest.threads = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("ingest.thread", 2, "params.yaml: ingest.thread: unknown key"),
        ("surprise", {}, "params.yaml: surprise: unknown key"),
        ("dataset.like_form", 4, "dataset.like_form: unknown key; did you mean like_from?"),
        ("models.sam.passes_", 3, "models.sam.passes_: unknown key; did you mean passes?"),
        ("training.gradient_clip", float("inf"), "training.gradient_clip: .*finite number, got inf"),
        ("selection.ranking.max_bytes", float("nan"), "selection.ranking.max_bytes: .*got nan"),
        ("evaluation.confidence", 1.0, "evaluation.confidence: .*less than 1, got 1.0"),
        ("ab_test.confidence", 0, "ab_test.confidence: .*greater than 0, got 0"),
        ("evaluation.k", [], "evaluation.k: .*at least 1 item"),
        ("retrieval", {"kind": "pqtopk", "list_bytes": 5}, "retrieval: list_bytes is 5, which changes nothing with kind: pqtopk"),
        ("ingest.threads", 0, "ingest.threads: .*greater than 0, got 0"),
        ("ingest.max_quarantined_share", 1.5, "ingest.max_quarantined_share: .*less than or equal to 1, got 1.5"),
        ("dataset.kind", "netflix", "dataset.kind: 'netflix' is no kind; expected one of movielens, open_bandit"),
        ("dataset", {"kind": "event_log", "source": "x.csv"}, "dataset.columns: missing"),
        ("dataset", {"kind": "event_log", "source": "x.csv", "columns": {"user": "u", "item": "i"}}, "dataset.columns.timestamp: missing"),
        ("dataset", {"kind": "open_bandit", "policy": "greedy"}, "dataset.policy: .*'greedy'"),
        ("split.valid_share", "much", "split.valid_share: .*'much'"),
        ("pipeline.models", ["sasrec", "popularity", "din", "none"], "pipeline.models names 'none'; models has popular_items, markov, sasrec"),
        ("pipeline.models", ["popularity", "din"], "pipeline.models has no retrieval model"),
        ("pipeline.models", ["sasrec", "popularity"], "no ranking model beside the incumbent 'popularity'"),
        ("selection.ranking.metric", "ndcg@10", "selection: ranking.metric is 'ndcg@10'; expected one of auc, gauc"),
        ("selection.retrieval.metric", "hits@10", "selection: retrieval.metric is 'hits@10'; expected mrr, ndcg@k"),
        ("selection.retrieval.metric", "recall@20", r"selection.retrieval.metric is 'recall@20'; evaluation.k is \[10, 50\]; expected 20 among them"),
        ("training.seed", -1, "training.seed: .*greater than or equal to 0, got -1"),
        ("training.seed", 2**32, "training.seed: .*less than 4294967296"),
        ("ab_test.seed", -1, "ab_test.seed: .*greater than or equal to 0, got -1"),
        ("models.din.learning_rate", 1.5, "models.din.learning_rate: .*less than or equal to 1, got 1.5"),
        ("models.din.max_history", 1_000_001, "models.din.max_history: .*less than or equal to 1000000"),
        ("models.bert4rec.max_history", 100_000_000, "models.bert4rec.max_history: .*less than or equal to 1000000"),
        ("models.sasrec.max_history", 100_000_000, "models.sasrec.max_history: .*less than or equal to 1000000"),
        ("selection.incumbent", "sasrec", "selection.incumbent is 'sasrec'; expected one of the ranking models"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(changed(path, value))


SASREC = {"stage": "retrieval", "kind": "sasrec"}
SAM, IFA, TWIN = ({"stage": "ranking", "kind": kind} for kind in ("sam", "ifa", "twin"))
BLOSSOM: dict[str, Any] = {"kind": "blossom"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (SASREC | {"attention": BLOSSOM | {"kv_heads": 3}}, "heads is 2, attention.kv_heads is 3; expected kv_heads that divide the heads"),
        (SASREC | {"attention": BLOSSOM, "width": 30}, "width is 30, heads is 2; expected heads of an even width"),
        (SASREC | {"width": 30}, "width is 30, heads is 2; expected heads of an even width: rotary positions turn pairs"),
        (SASREC | {"width": 30, "heads": 4}, "width is 30, heads is 4; expected a width that the heads divide"),
        (SASREC | {"negatives": 7}, "negatives is 7, which changes nothing with loss: softmax"),
        (SASREC | {"loss": "bce", "gbce_t": 0.1}, "gbce_t is 0.1, which changes nothing with loss: bce"),
        (SASREC | {"loss": "sampled_softmax", "gbce_prior": False}, "gbce_prior is False, which changes nothing with loss: sampled_softmax"),
        (SAM | {"attention_weights": "softmax_eps", "attention_init": "log_length"}, "attention_init is log_length, which changes nothing with"),
        (SAM | {"passes": 1, "feedback": False}, "feedback is False, which changes nothing with passes: 1"),
        (
            SAM | {"items": {"kind": "recjpq", "assignment": "random", "binary": True}},
            "binary is True, which changes nothing with assignment: random",
        ),
        (IFA | {"feature_map": "elu1", "prior_events": 2}, "prior_events is 2.0, which changes nothing with feature_map: elu1"),
        (IFA | {"feature_map": "softmax", "temperature": 2}, "temperature is 2.0, which changes nothing with feature_map: softmax"),
        (IFA | {"relation": "none", "relation_dropout": 0.5}, "relation_dropout is 0.5, which changes nothing with relation: none"),
        (IFA | {"relation": "none", "exact_heads": 2}, "exact_heads is 2, which changes nothing with"),
        (IFA | {"width": 5}, "width is 5, exact_heads is 4"),
        (TWIN | {"top_k": 51, "max_history": 40}, "top_k is 51, max_history is 40; expected top_k of at most max_history"),
        (SAM | {"sampled_candidates": 8}, "sampled_candidates is 8, which changes nothing with listwise: 0"),
        (IFA | {"relation": "none", "listwise": 0, "sampled_candidates": 8}, "sampled_candidates is 8, which changes nothing with listwise: 0"),
    ],
)
def test_a_model_that_could_not_be_built_or_a_setting_without_a_say_is_refused_at_once(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"params.yaml: models.mine.*{message}"):
        parse_config(changed("models.mine", model))


@pytest.mark.parametrize(
    "model",
    [
        SASREC | {"loss": "gbce", "negatives": 7, "gbce_t": 0.1, "gbce_prior": False},
        SASREC | {"negatives": 256, "gbce_t": 0.75},  # the defaults, written out
        SAM | {"attention_init": "log_length"},
        SAM | {"listwise": 0.1, "sampled_candidates": 8},
        IFA | {"listwise": 0, "sampled_candidates": 8},  # the relation looks at them
        IFA | {"relation": "none", "exact_heads": 2, "recent_events": 5},
        IFA | {"max_history": 20, "recent_events": 20},
        TWIN | {"max_history": 20},  # all of it, whatever the default of top_k
        TWIN | {"max_history": 20, "top_k": 50},  # the default, written out
        TWIN | {"max_history": 100, "top_k": 100},
        IFA | {"relation": "none", "width": 5},  # what does not divide it is not used
    ],
)
def test_settings_with_a_say_are_kept_and_may_be_written_out_whole(model: dict[str, Any]) -> None:
    config = parse_config(changed("models.mine", model))
    assert parse_config(config.model_dump(mode="json")) == config
    build_model(config.models["mine"], Sizes(items=3, categories=2, actions=1))


@pytest.mark.parametrize(("weights", "scale"), [("sigmoid", "norm"), ("scaled_sigmoid", "norm"), ("softmax", "none"), ("softmax_eps", "none")])
def test_sam_scales_a_sum_of_behaviours_and_not_a_mean(weights: str, scale: str) -> None:
    assert SAMSettings(attention_weights=weights).read_scale == scale  # type: ignore[arg-type]
    config = parse_config(changed("models.mine", SAM | {"attention_weights": weights, "read_scale": "mean"}))
    assert config.models["mine"].read_scale == "mean"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["../../../evil", "/tmp/evil", "..", ".hidden", "a/b", "a\\b", "a b", "din\n", "", "-din", "ü"])
def test_a_model_s_name_cannot_lead_out_of_a_folder(name: str) -> None:
    bad = changed("pipeline.models", ["popular_items", "popularity", name])
    bad["models"][name] = SAM
    with pytest.raises(ConfigError, match=r"models\.(.|\n)* is no name for a model; expected letters, digits") as error:
        parse_config(bad)
    assert repr(name) in str(error.value)


def test_names_of_models_may_have_dots_and_dashes() -> None:
    parse_config(changed("models", values()["models"] | {"SAM-3.1_b": SAM}))


def test_a_model_of_another_day_loads_with_settings_that_had_no_say() -> None:
    held = SASRecSettings(negatives=7)
    assert TypeAdapter[Any](Model).validate_python(held.model_dump(mode="json")) == held


def test_what_models_may_be_selected_by_is_what_is_measured() -> None:
    one = np.ones(1, np.int64)
    assert set(ranking_contributions(0 * one, 0 * one, one, 1.0 * one, 1)) == set(RANKING_METRICS)
    for metric in [*retrieval_contributions(0 * one, one, (5, 50), 1), "coverage@5"]:
        parse_config(changed("selection.retrieval.metric", metric) | {"evaluation": {"k": [5, 50]}})
    config = parse_config(changed("selection.retrieval.metric", "recall@20") | {"evaluation": {"k": [20]}})
    for section in ("evaluation", "selection"):  # all that a step of a cluster may be given
        assert getattr(parse_config(config.model_dump(mode="json", include={section, "models", "pipeline"})), section) == getattr(config, section)


def test_a_whole_file_is_held_against_the_defaults_of_what_it_leaves_out(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    for text, wrong in (
        ("evaluation: {k: [5, 20]}", r"selection.retrieval.metric is 'ndcg@10'; evaluation.k is \[5, 20\]; expected 10 among them"),
        ("selection: {retrieval: {metric: recall@7, max_latency_ms: 9, max_bytes: 9}}", r"'recall@7'; evaluation.k is \[10, 50\]; expected 7"),
    ):
        file.write_text(text)
        load_config(file)  # of a step, which is not given all of them
        with pytest.raises(ConfigError, match=f"params.yaml: .*{wrong}"):
            load_config(file, whole=True)
    file.write_text("evaluation: {k: [10]}")
    load_config(file, whole=True)


def test_every_bad_key_is_listed_at_once() -> None:
    bad = changed("ingest.thread", 2)
    bad["split"]["kind"] = "random"
    with pytest.raises(ConfigError) as error:
        parse_config(bad, name="mine.yaml")
    assert [line.split(": ")[:2] for line in str(error.value).splitlines()] == [["mine.yaml", "ingest.thread"], ["mine.yaml", "split.kind"]]


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    with pytest.raises(ConfigError, match=f"{path}: no such file"):
        load_config(path)
    for content, message in (
        (b"a: [1", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"", "top level"),
        (b"- 1", "top level"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load_config(path)


def test_a_file_may_hold_only_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("dataset: {source: ml-1m, kind: movielens}\n")
    config = load_config(path)
    assert config.dataset.source == "ml-1m"  # type: ignore[union-attr]
    assert config.ingest == load_config(ROOT / "params.yaml").ingest


@pytest.mark.parametrize(
    ("dataset", "kind"),
    [
        ({"kind": "movielens", "source": "../shared/data/ml-1m.zip"}, MovieLensDataset),
        ({"kind": "open_bandit", "policy": "bts", "campaign": "men"}, OpenBanditDataset),
        ({"kind": "event_log", "source": "*.csv", "columns": {"user": "u", "item": "i", "timestamp": "t"}}, EventLogDataset),
        ({"kind": "world", "users": 10}, WorldDataset),
    ],
)
def test_each_dataset_is_told_by_its_kind(dataset: dict[str, Any], kind: type) -> None:
    assert isinstance(parse_config(changed("dataset", dataset)).dataset, kind)


def test_the_yaml_of_the_documentation_loads() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```yaml\n")[1:]]
    assert len(blocks) >= 3
    for block in blocks:
        parse_config({**values(), **yaml.safe_load(block)})
