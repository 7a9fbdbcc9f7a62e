"""What a wrong setting is answered: its path as it stands in the file, what was expected, and the nearest name."""

from typing import Any

import pytest
from pydantic import ValidationError

from longtrail.config import Config, Model, parse_config
from longtrail.config.messages import explain
from longtrail.config.shapes import shape_of
from longtrail.errors import ConfigError
from longtrail.models.registry import MODELS

RETRIEVAL, RANKING = {"stage": "retrieval"}, {"stage": "ranking"}
SASREC = RETRIEVAL | {"kind": "sasrec"}


def lines(values: Any) -> list[str]:
    with pytest.raises(ValidationError) as error:
        Config.model_validate(values)
    return explain(error.value, Config)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (RETRIEVAL | {"kind": "sam"}, "models.x.kind: sam is a ranker, not a retriever; expected stage: ranking beside it"),
        (RANKING | {"kind": "sasrec"}, "models.x.kind: sasrec is a retriever, not a ranker; expected stage: retrieval beside it"),
        ({"kind": "sam"}, "models.x.stage: missing; expected stage: ranking: sam is a ranker"),
        ({"kind": "popularity"}, "models.x.stage: missing; expected stage: retrieval or stage: ranking"),
        ({"kind": ["sam"]}, "models.x.stage: missing; expected stage: retrieval or stage: ranking"),
        ({"stage": "rank", "kind": "sam"}, "models.x.stage: 'rank' is no stage; expected one of ranking, retrieval"),
        (RETRIEVAL | {"kind": "gru"}, "models.x.kind: 'gru' is no retriever; expected one of gru4rec, popularity, markov, sasrec, bert4rec"),
        (RETRIEVAL | {"kind": "SASRec"}, "models.x.kind: 'SASRec' is no retriever; expected one of sasrec, popularity, markov, bert4rec, gru4rec"),
        (RETRIEVAL | {"kind": "x"}, "models.x.kind: 'x' is no retriever; expected one of popularity, markov, sasrec, bert4rec, gru4rec"),
        (RETRIEVAL | {"kind": "gsasrec"}, "models.x.kind: 'gsasrec' is no kind of its own; expected stage: retrieval, kind: sasrec, loss: gbce"),
        (RETRIEVAL, "models.x.kind: missing; expected one of popularity, markov, sasrec, bert4rec, gru4rec"),
        ("sasrec", "models.x: expected a mapping, e.g. {stage: retrieval, kind: sasrec}, got 'sasrec'"),
        (SASREC | {"dropuot": 0.1}, "models.x.dropuot: unknown key; did you mean dropout?"),
        (SASREC | {"dropout": 2}, "models.x.dropout: Input should be less than 1, got 2"),
        (SASREC | {"attention": "blossom"}, "models.x.attention: expected a mapping, e.g. {kind: blossom}, got 'blossom'"),
        (SASREC | {"items": "recjpq"}, "models.x.items: expected a mapping, e.g. {kind: recjpq}, got 'recjpq'"),
        (SASREC | {"items": 8}, "models.x.items: expected a mapping, e.g. {kind: dense}, got 8"),
        (SASREC | {"items": {"kind": "recjqp"}}, "models.x.items.kind: 'recjqp' is no kind; expected one of recjpq, dense"),
        (SASREC | {"attention": {"kind": "full", "postions": "learned"}}, "models.x.attention.postions: unknown key; did you mean positions?"),
        (SASREC | {"attention": {"kind": "full", "window": 8}}, "models.x.attention.window: unknown key; expected one of kind, positions"),
        (SASREC | {"attention": {"window": 8}}, "models.x.attention.kind: missing; expected kind: full or kind: blossom"),
    ],
    ids=str,
)
def test_of_a_model(model: Any, line: str) -> None:
    assert lines({"models": {"x": model}}) == [line]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"ingest": 3}, "ingest: expected a mapping of settings, got 3"),
        (None, "top level: expected a mapping of settings, got None"),
        ({"dataset": {"like_from": 3}}, "dataset.kind: missing; expected one of movielens, open_bandit, event_log, world"),
        ({"dataset": {"kind": "event_log", "source": "x"}}, "dataset.columns: missing"),
        ({"validation": {"click_rate": [0.1, 2]}}, "validation.click_rate.1: Input should be less than or equal to 1, got 2"),
        ({"cluster": {"tolerations": [{"keys": "a"}]}}, "cluster.tolerations.0.keys: unknown key; did you mean key?"),
        ({"cluster": {"steps": {"train": {"cpus": "1"}}}}, "cluster.steps.train.cpus: unknown key; did you mean cpu?"),
        (
            {"serving": {"experiment": {"arms": {"a": {"policy": "best"}}}}},
            "serving.experiment.arms.a.policy: expected a mapping, e.g. {kind: best}, got 'best'",
        ),
        (
            {"serving": {"experiment": {"arms": {"a": {"policy": {"kind": "best", "k": 1}}}}}},
            "serving.experiment.arms.a.policy.k: unknown key; expected one of kind",
        ),
    ],
    ids=str,
)
def test_of_any_section(values: Any, line: str) -> None:
    assert lines(values) == [line]


def test_a_key_that_may_not_stand_in_its_mapping_is_the_end_of_the_path() -> None:
    (line,) = lines({"cluster": {"steps": {"trian": {}}}})
    assert line.startswith("cluster.steps.trian: ") and line.endswith("got 'trian'")


def test_what_may_be_one_of_several_types_has_no_invented_level() -> None:
    assert {line.split(": ")[0] for line in lines({"serving": {"demo": "perhaps"}})} == {"serving.demo"}


def test_a_file_that_is_wrong_in_several_places_is_told_of_all() -> None:
    bad = {"models": {"x": SASREC | {"dropuot": 0.1, "width": 0}, "y": RETRIEVAL | {"kind": "sam"}}}
    with pytest.raises(ConfigError) as error:
        parse_config(bad, name="mine.yaml")
    assert {line.split(": ")[1] for line in str(error.value).splitlines()} == {"models.x.dropuot", "models.x.width", "models.y.kind"}


def test_every_kind_is_found_by_its_stage_and_its_name() -> None:
    told = [told for told, leaf in shape_of(Model).leaves() if leaf.fields]
    assert {"stage": "ranking", "kind": "popularity"} in told and {"stage": "retrieval", "kind": "popularity"} in told
    assert sorted((one["stage"], one["kind"]) for one in told) == sorted(MODELS)
