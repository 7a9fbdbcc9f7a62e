"""What is sent to Kubeflow is what a dry run says, and what should not be sent is refused."""

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec

from longtrail.config import load_config, parse_config
from longtrail.errors import ConfigError
from pipelines.kubeflow import write
from pipelines.sending import SubmissionError, send
from pipelines.submit import Submission, checked_cron, checked_host, checked_token, overrides, submit
from tests.pipelines.kubeflow_api import Kubeflow, kubeflow_api

SECRET = "a-token-that-nobody-may-see"


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("params") / "params.yaml"
    path.write_text(yaml.safe_dump({"cluster": {"image": "registry.example/longtrail:1.4", "pipeline_root": "s3://longtrail/kubeflow"}}))
    return path


@pytest.fixture(scope="module")
def compiled(params: Path) -> Path:
    write(load_config(params), params.with_name("pipeline.yaml"))
    return params.with_name("pipeline.yaml")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kfp.Client._LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    monkeypatch.delenv("LONGTRAIL_KFP_TOKEN", raising=False)
    monkeypatch.setattr("kfp.client.client.time.sleep", lambda _: pytest.fail("the client waits for a server that does not answer"))


def pretend(params: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    submit(**options, params=params, dry_run=True)
    said = capsys.readouterr().out
    assert SECRET not in said
    return yaml.safe_load(said)


def once(host: str) -> Submission:
    return Submission(host=host, experiment="longtrail", run_name="once", namespace=None, pipeline_root=None, cron=None)


def spec_of(body: dict[str, Any]) -> dict[str, Any]:
    """The pipeline that was sent, alone or with a platform's part, checked."""
    spec = body["pipeline_spec"]
    spec = spec.get("pipeline_spec", spec)
    json_format.ParseDict(spec, PipelineSpec())
    return spec


def test_one_run_is_sent_as_the_dry_run_says(params: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGTRAIL_KFP_TOKEN", SECRET)
    options: dict[str, Any] = {"run_name": "tuesday", "param": ["train_settings.training.seed=3", "models=[popular_items, popularity, din]"]}
    with kubeflow_api() as kubeflow:
        dry = pretend(params, capsys, host=kubeflow.address, **options)
        assert not kubeflow.received  # a dry run speaks to nobody
        submit(host=kubeflow.address, params=params, **options)
        assert f"{kubeflow.address}/#/runs/details/run-1" in capsys.readouterr().out
        (sent,) = kubeflow.posted("/apis/v2beta1/runs")
        assert {authorization for *_, authorization in kubeflow.received} == {f"Bearer {SECRET}"}
        (experiment,) = kubeflow.posted("/apis/v2beta1/experiments")
        assert experiment["display_name"] == dry["experiment"] == "longtrail" and not experiment.get("namespace")
    assert sent["experiment_id"] == "experiment-0"
    assert {key: sent[key] for key in dry["body"]} == dry["body"]
    assert set(sent) == set(dry["body"]) | {"experiment_id", "pipeline_spec"}
    runtime = sent["runtime_config"]
    assert runtime["pipeline_root"] == "s3://longtrail/kubeflow" and runtime["parameters"]["models"] == ["popular_items", "popularity", "din"]
    assert runtime["parameters"]["train_settings"]["training"]["seed"] == 3 and set(runtime["parameters"]) == {"models", "train_settings"}
    spec = spec_of(sent)
    assert {executor["container"]["image"] for executor in spec["deploymentSpec"]["executors"].values()} == set(dry["pipeline"]["images"])
    assert SECRET not in str(sent)


def test_a_recurring_incremental_run(params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with kubeflow_api(multi_user=True, experiments={"daily": "known"}) as kubeflow:
        options: dict[str, Any] = {
            "host": f"{kubeflow.address}/",
            "experiment": "daily",
            "namespace": "shop",
            "recurring": "0 3 * * *",
            "previous": "s3://longtrail/models",
            "caching": False,
        }
        dry = pretend(params, capsys, **options)
        submit(params=params, **options)
        (sent,) = kubeflow.posted("/apis/v2beta1/recurringruns")
        assert not kubeflow.posted("/apis/v2beta1/runs") and not kubeflow.posted("/apis/v2beta1/experiments")
    assert {key: sent[key] for key in dry["body"]} == dry["body"]
    assert sent["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * *" and sent["max_concurrency"] == 1 and sent["no_catchup"] is True
    assert sent["experiment_id"] == "known" and sent["display_name"] == "longtrail-recurring"
    spec = spec_of(sent)
    assert "comp-publish" in spec["components"] and dry["pipeline"]["previous"] == "s3://longtrail/models"
    tasks = [task for component in spec["components"].values() if "dag" in component for task in component["dag"]["tasks"].values()]
    assert tasks and not any(task.get("cachingOptions", {}).get("enableCache") for task in tasks)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"multi_user": True}, "it has several users; expected --namespace"),
        ({"answers": {"/apis/v2beta1/healthz": (401, "{}")}}, "HTTP 401 Unauthorized; expected a token that may use it"),
        ({"answers": {"/apis/v2beta1/healthz": (200, "<html>Log in</html>")}}, "a login page, or another service"),
        (
            {"answers": {"/apis/v2beta1/runs": (400, '{"error": "the pipeline root is not there"}')}},
            "HTTP 400 Bad Request: the pipeline root is not there",
        ),
    ],
)
def test_a_cluster_that_does_not_take_it_is_told_plainly(settings: dict[str, Any], says: str, compiled: Path) -> None:
    with kubeflow_api(**settings) as kubeflow, pytest.raises(SubmissionError, match=says):
        send(once(kubeflow.address), compiled)


def test_nobody_there(compiled: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SubmissionError, match="Connection refused; expected Kubeflow Pipelines, or a port forwarded"):
        send(once(f"http://127.0.0.1:{port}"), compiled)


@pytest.mark.parametrize(
    ("host", "says"),
    [("kubeflow.example.com", "begins with http"), ("ftp://x", "begins with http"), ("https://me:word@kubeflow.example.com", "carries a user")],
)
def test_an_address_that_is_none(host: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        checked_host(host)
    assert "me:word" not in str(refused.value)


def test_where_the_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far, near = "https://kubeflow.example.com", ("http://localhost:8888", "http://ml-pipeline.kubeflow.svc.cluster.local:8888")
    assert checked_token(far, None) is None
    monkeypatch.setenv("LONGTRAIL_KFP_TOKEN", SECRET)
    assert {checked_token(host, None) for host in (far, *near)} == {SECRET}
    with pytest.raises(ConfigError, match="not sent over http") as refused:
        checked_token("http://kubeflow.example.com", None)
    assert SECRET not in str(refused.value)
    file = tmp_path / "token"
    file.write_text("another\n")
    assert checked_token(far, file) == "another"
    file.write_text(" \n")
    with pytest.raises(ConfigError, match="it is empty"):
        checked_token(far, file)
    with pytest.raises(ConfigError, match="No such file"):
        checked_token(far, tmp_path / "nothing")


def test_schedules() -> None:
    assert checked_cron("0 3 * * *") == "0 0 3 * * *"
    assert checked_cron("30 */15 6-22 ? * MON-FRI,SUN") == "30 */15 6-22 ? * MON-FRI,SUN"
    for bad, says in (("0 3 * *", "4 fields"), ("@daily", "1 fields"), ("0 3 * * x;y", "day of week is 'x;y'"), ("0 -3 * * *", "hour is '-3'")):
        with pytest.raises(ConfigError, match=says):
            checked_cron(bad)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("seed=3", "expected NAME=VALUE, NAME one of models, ingest_settings"),
        ("models", "expected NAME=VALUE"),
        ("models=[din, bert]", "expected a list of some of"),
        ("models=[din]", "pipeline.models has no retrieval model"),
        ("models=din", "expected a list"),
        ("train_settings.training.seeds=3", "training.seeds: unknown key"),
        ("train_settings.evaluation.k=[5]", "evaluation: unknown; expected models, pipeline, training, selection"),
        ("train_settings.training.seed.deep=3", "something that has no names"),
        ("ab_test_settings={", "is not YAML"),
        ("ab_test_settings=7", "int: unknown"),
        ("ingest_settings.ingest.engine=spark", "images are chosen when the pipeline is compiled"),
        ("build_features_settings.features.offline_store=spark", "images are chosen when the pipeline is compiled"),
    ],
)
def test_parameters_are_checked_before_they_are_sent(entry: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        overrides([entry], parse_config({}))


def test_two_values_of_one_parameter_are_both_changed() -> None:
    changed = overrides(["train_settings.training.seed=3", "train_settings.training.threads=1"], parse_config({}))
    assert changed["train_settings"]["training"]["seed"] == 3 and changed["train_settings"]["training"]["threads"] == 1


@pytest.mark.parametrize(
    ("first", "second", "path"),
    [
        ("train_settings.training.seed=3", "train_settings.training.seed=4", "train_settings.training.seed"),
        ("models=[din]", "models=[sam]", "models"),
        ("train_settings={training: {seed: 3}}", "train_settings.training.seed=4", "train_settings.training.seed"),
        ("train_settings.training.seed=4", "train_settings.training={seed: 3}", "train_settings.training.seed"),
    ],
)
def test_a_value_given_twice_is_refused_with_both(first: str, second: str, path: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--param {first} and --param {second} both set {path}; expected it once")):
        overrides([first, second], parse_config({}))


def test_the_server_of_these_tests_says_what_it_does_not_know() -> None:
    assert Kubeflow().answer("GET", "/apis/v2beta1/elsewhere", {}, None)[0] == 404
