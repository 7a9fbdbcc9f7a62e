"""The step on a simulated world's log, whose truth is known: from raw files through ingest and features to the report."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from components import ab_report, ab_requests, open_bandit
from components.ab_test import ab_test, choose_mode, compare
from components.build_features import build_features
from components.report_page import Section, page, table_html
from longtrail.config import ABTestSettings, PopularityRankerSettings, load_config
from longtrail.errors import EvaluationError
from longtrail.examples import FeatureSet
from longtrail.examples.features import column
from longtrail.files import read_json, write_json
from longtrail.ingest import ingest
from longtrail.models.registry import build_model
from longtrail.models.store import LoadedModel, ModelCard
from longtrail.offpolicy.verdict import OUTCOMES
from longtrail.schema import IMPRESSIONS, ITEM_STATISTICS, PROPENSITY_METADATA, USER_STATISTICS
from tests.models_of_toy import save_toy_model, toy_model

PARAMS = Path(__file__).parents[2] / "params.yaml"
UNBIASED = ("ips", "snips", "dr", "sndr")
WORLD = {"kind": "world", "users": 150, "items": 40, "categories": 5, "events_per_user": 12, "requests_per_user": 24, "candidates": 6, "slate": 2}


def _params(path: Path, **ab_settings: object) -> Path:
    values = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    values["dataset"], values["split"]["test_share"] = WORLD, 0.4
    values["ab_test"] = {"temperature": 1.0, "replicates": 400, "rounds": 5, "max_candidates": 6, **ab_settings}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tables/, features/, champion/ (B ranks by click rate, A by clicks) and params.yaml. Read only."""
    root = tmp_path_factory.mktemp("world")
    params = _params(root / "params.yaml")
    ingest(load_config(params).dataset, load_config(params).ingest, root / "tables")
    write_json(root / "validation" / "result.json", {"success": True, "critical_failures": 0, "warnings": 0, "expectations": []})
    build_features(root / "tables", root / "validation", params, root / "features")
    features = FeatureSet.open(root / "features")
    settings = PopularityRankerSettings(by="click_rate")
    module, catalogue = build_model(settings, features.sizes), features.catalogue
    module.fit(
        events=catalogue.train_events,
        impressions=catalogue.train_impressions,
        clicks=catalogue.train_clicks,
        prior_click_rate=features.prior_click_rate,
    )
    card = ModelCard(name="rate", settings=settings, sizes=features.sizes, actions=features.actions, prior_click_rate=features.prior_click_rate)
    save_toy_model(root / "champion" / "ranker", LoadedModel(module=module.eval(), card=card))
    save_toy_model(root / "champion" / "incumbent", toy_model(features, "popularity"))
    write_json(root / "champion" / "selection.json", {"incumbent": "clicks", "ranker": {"name": "rate"}})
    return root


def _folders(built: Path) -> dict[str, Path]:
    return {name: built / name for name in ("tables", "features", "champion")}


def test_logged_lists_give_the_worlds_truth(built: Path, tmp_path: Path) -> None:
    ab_test(**_folders(built), params=built / "params.yaml", report=tmp_path / "ab")
    result = read_json(tmp_path / "ab" / "report.json")
    assert result["source"] == "log" and result["rows"] == 2 * result["requests"] and result["requests"] > 1_000
    assert result["verdict"] in OUTCOMES and result["a"]["name"] == "clicks" and result["b"]["name"] == "rate"
    for side in ("a", "b"):
        for estimate in (result[side]["estimates"][name] for name in UNBIASED):  # within 4 standard errors of the truth: half a 95 % interval is 2
            assert abs(estimate["value"] - result["truth"][side]) < estimate["high"] - estimate["low"]
    for difference in (result["difference"][name] for name in UNBIASED):
        assert abs(difference["value"] - result["truth"]["difference"]) < difference["high"] - difference["low"]
    assert abs(result["diagnostics"]["b"]["mean_weight"] - 1) < 0.2
    metrics = read_json(tmp_path / "ab" / "metrics.json")
    assert metrics["ctr_b"] == result["b"]["estimates"]["dr"]["value"] and metrics["truth_a"] == result["truth"]["a"]
    _check_page((tmp_path / "ab" / "report.html").read_text(encoding="utf-8"), result)


def _check_page(html: str, result: dict) -> None:
    assert result["sentence"].replace("'", "&#39;") in html and html.count("<svg") in (4, 5, 6) and "viewport" in html
    fetched = re.findall(r'(?:src|href)="(?!#)[^"]*"|url\((?!#)[^)]*\)|@import', html)  # a page that fetches nothing
    assert not [reference for reference in fetched if not reference.startswith('xlink:href="#')], fetched[:3]
    assert "<script" not in html


def test_bandit_conversion_of_the_same_log(built: Path, tmp_path: Path) -> None:
    config = load_config(_params(tmp_path / "params.yaml", source="bandit"))
    result = compare(config, **_folders(built))
    assert result["source"] == "bandit" and result["requests"] == 5 * result["bandit"]["requests"]
    for side in ("a", "b"):
        estimate = result[side]["estimates"]["dr"]
        assert estimate["low"] < result[side]["truth"] < estimate["high"]
    assert compare(config, **_folders(built)) == result  # a function of its inputs
    page = ab_report.html(result)
    assert "bandit problem" in page and "not your site&#39;s click rates" in page and "a drawn log. That log itself got" in page


def test_point_in_time_features_equal_those_of_training(built: Path) -> None:
    features = FeatureSet.open(built / "features")
    requests, shown = ab_requests.logged_requests(built / "tables", features, whole_catalogue=False)
    known = ab_requests.request_features(built / "features" / "feast", requests)
    table = features.examples("test").sort_by([("request_id", "ascending"), ("position", "ascending")])
    assert shown.shown_RK.size == table.num_rows and (shown.shown_RK >= 0).all()
    np.testing.assert_array_equal(shown.clicks_RK.ravel(), table["click"].to_numpy())
    np.testing.assert_array_equal(np.take_along_axis(requests.items_RC, shown.shown_RK, axis=1).ravel(), table["item_id"].to_numpy())
    for name in ITEM_STATISTICS:
        np.testing.assert_array_equal(np.take_along_axis(known.item[name], shown.shown_RK, axis=1).ravel(), column(table, name))
    for name in USER_STATISTICS:
        np.testing.assert_array_equal(known.user[name], column(table, name)[::2])
    np.testing.assert_array_equal(known.history_length_R, column(table, "history_length")[::2])


def test_scores_do_not_depend_on_the_batch(built: Path, tmp_path: Path) -> None:
    features = FeatureSet.open(built / "features")
    requests, _ = ab_requests.logged_requests(built / "tables", features, whole_catalogue=False)
    some = ab_requests.RequestSet(
        users_R=requests.users_R[:20], times_R=requests.times_R[:20], items_RC=requests.items_RC[:20], lengths_R=requests.lengths_R[:20]
    )
    known = ab_requests.request_features(built / "features" / "feast", some)
    model = save_toy_model(tmp_path / "din", toy_model(features, "din"))
    together = ab_requests.score(model, features, some, known)
    for r in range(0, 20, 7):
        one = ab_requests.RequestSet(users_R=some.users_R[[r]], times_R=some.times_R[[r]], items_RC=some.items_RC[[r]], lengths_R=some.lengths_R[[r]])
        alone = ab_requests.score(model, features, one, ab_requests.request_features(built / "features" / "feast", one))
        np.testing.assert_allclose(alone[0], together[r], atol=1e-5)
    assert np.std(together) > 0


def test_a_champion_that_is_the_incumbent_is_said_to_be(built: Path, tmp_path: Path) -> None:
    champion = tmp_path / "champion"
    shutil.copytree(built / "champion" / "incumbent", champion / "incumbent")
    shutil.copytree(built / "champion" / "incumbent", champion / "ranker")
    write_json(champion / "selection.json", {"incumbent": "clicks", "ranker": {"name": "clicks"}})
    result = compare(load_config(built / "params.yaml"), **{**_folders(built), "champion": champion})
    assert result["verdict"] == "equivalent" and "nothing to decide" in result["sentence"]
    assert result["difference"]["dr"]["value"] == 0


def test_modes_follow_what_the_log_holds(built: Path, tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    shutil.copytree(built / "tables", tables)
    settings = load_config(built / "params.yaml").ab_test
    assert choose_mode(settings, tables)[0] == "log"
    (tables / "candidates.parquet").unlink()
    assert choose_mode(settings, tables)[0] == "bandit"
    features = FeatureSet.open(built / "features")
    with pytest.raises(EvaluationError, match=r"candidates\.parquet: no such file"):
        ab_requests.logged_requests(tables, features, whole_catalogue=False)
    rows = pq.read_table(tables / "impressions.parquet")
    pq.write_table(rows.replace_schema_metadata({PROPENSITY_METADATA: "none"}), tables / "impressions.parquet")
    assert choose_mode(settings, tables)[0] == "bandit"
    with pytest.raises(EvaluationError, match="no propensities"):
        choose_mode(ABTestSettings(source="log"), tables)


@pytest.mark.parametrize(("column_name", "value", "message"), [("propensity", 0.0, "propensity is 0.0"), ("propensity", None, "propensity is nan")])
def test_damaged_logs_are_refused_by_request(built: Path, tmp_path: Path, column_name: str, value: object, message: str) -> None:
    tables = tmp_path / "tables"
    shutil.copytree(built / "tables", tables)
    rows = pq.read_table(tables / "impressions.parquet")
    last = rows["timestamp"].to_numpy().argmax()
    values = rows[column_name].to_pylist()
    values[last] = value
    index = rows.schema.get_field_index(column_name)
    pq.write_table(rows.set_column(index, rows.schema.field(index), pa.array(values, pa.float64())), tables / "impressions.parquet")
    with pytest.raises(EvaluationError, match=f"request {rows['request_id'][int(last)].as_py()}: {message}"):
        ab_requests.logged_requests(tables, FeatureSet.open(built / "features"), whole_catalogue=False)


def test_an_item_that_was_no_candidate_is_refused(built: Path, tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    shutil.copytree(built / "tables", tables)
    pool = pq.read_table(tables / "candidates.parquet")
    shown = pq.read_table(tables / "impressions.parquet", columns=IMPRESSIONS.names)
    last = int(shown["timestamp"].to_numpy().argmax())
    request, item = shown["request_id"][last].as_py(), shown["item_id"][last].as_py()
    keep = [not (r == request and i == item) for r, i in zip(pool["request_id"].to_pylist(), pool["item_id"].to_pylist(), strict=True)]
    pq.write_table(pool.filter(pa.array(keep)), tables / "candidates.parquet")
    with pytest.raises(EvaluationError, match=f"request {request} shows item {item}"):
        ab_requests.logged_requests(tables, FeatureSet.open(built / "features"), whole_catalogue=False)


def test_the_whole_catalogue_as_candidates(built: Path) -> None:
    features = FeatureSet.open(built / "features")
    requests, shown = ab_requests.logged_requests(built / "tables", features, whole_catalogue=True)
    few, _ = ab_requests.logged_requests(built / "tables", features, whole_catalogue=False)
    assert requests.items_RC.shape[1] == features.catalogue.items and (requests.times_R == few.times_R).all()
    assert (shown.shown_RK + 1 == np.take_along_axis(requests.items_RC, shown.shown_RK, axis=1)).all()


def test_missing_champion_names_the_file(built: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"selection\.json: no such file"):
        compare(load_config(built / "params.yaml"), **{**_folders(built), "champion": tmp_path})


# ---------------------------------------------------------------- Open Bandit's own policies


def _open_bandit_file(path: Path, policy: str, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = np.full(4, 0.25) if policy == "random" else np.array([0.1, 0.2, 0.3, 0.4])
    item, position = rng.choice(4, rows, p=p), rng.integers(1, 4, rows)
    click = (rng.random(rows) < np.array([0.05, 0.1, 0.2, 0.3])[item]).astype(int)
    user = rng.integers(0, 100, rows)
    head = ",timestamp,item_id,position,click,propensity_score,user_feature_0,user_feature_1,user_feature_2,user_feature_3"
    lines = [
        f"{n},2019-11-24 00:{n // 60 % 60:02d}:{n % 60:02d}.{n:06d}+00:00,{item[n]},{position[n]},{click[n]},{p[item[n]]},u{user[n]},x,y,z"
        for n in range(rows)
    ]
    path.parent.mkdir(parents=True)
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    (path.parent / "item_context.csv").write_text("item_id,item_feature_0,item_feature_1\n" + "".join(f"{i},0.1,c{i % 2}\n" for i in range(4)))


def test_open_bandit_policies_are_judged_from_each_others_log(tmp_path: Path) -> None:
    for seed, policy in enumerate(("random", "bts")):
        for campaign in ("all", "men", "women"):
            _open_bandit_file(tmp_path / "obd" / policy / campaign / f"{campaign}.csv", policy, 2_000, seed)
    open_bandit.open_bandit(source=str(tmp_path / "obd"), out=tmp_path / "out")
    results = read_json(tmp_path / "out" / "report.json")["results"]
    assert len(results) == 6 and all(r["rows"] == 2_000 and r["propensities"].startswith("exact") for r in results)
    truth = {"random": 0.1625, "bts": 0.205}
    for r in results:
        assert abs(r["estimates"]["dr"]["value"] - truth[r["target"]]) < 0.04 and abs(r["real"]["value"] - truth[r["target"]]) < 0.04
        assert r["gap"]["dr"]["low"] < r["gap"]["dr"]["high"] and abs(r["mean_weight"] - 1) < 0.1
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "of 6 estimates agree" in html and "<svg" in html


# ---------------------------------------------------------------- the page itself


def test_page_escapes_what_it_is_given() -> None:
    html = page("<b>", [Section("<i>", table_html(["<u>"], [["<script>"], ["x"]]), "<s>")], lead="<em>")
    assert "<script>" not in html and "&lt;script&gt;" in html and "<em>" not in html and "<i>" not in html and "<s>" not in html
    with pytest.raises(ValueError, match="tone"):
        page("t", [], tone="loud")
