"""Metrics that say what happened, bounded; and a dashboard and alert rules that ask only for what the service exports."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from longtrail.drift import Calibration
from serving.drift_window import Drift, FeatureDrift
from serving.engine import ARM_FAILED
from serving.guard import AVOIDED, DOWN, SLOW
from serving.lists import UNKNOWN_USER
from serving.metrics import BREAKER_STATES, MAX_VALUES, OTHER, Metrics
from serving.trace import Trace, begin, current
from tests.serving.conftest import Running

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "serving" / "grafana" / "longtrail.json"
ALERTS = ROOT / "serving" / "prometheus" / "alerts.yaml"
Exported = dict[str, dict[str, set[str]]]  # sample name -> label -> values

# ---------------------------------------------------------------- PromQL, as much as our files use: names, labels, matchers

FUNCTIONS = {
    "rate", "increase", "histogram_quantile", "scalar", "time", "absent", "deriv",
    "sum", "max", "min", "by", "on", "and", "or", "unless", "ignoring", "without", "group_left",
}  # fmt: skip
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[A-Za-z_:][A-Za-z0-9_:]*|\$__\w+|\d[\d.e]*[smhdw]?|[=!]~|[!=<>]=|[-+*/(){}\[\],=<>]|\s+')


def tokens(expression: str) -> list[str]:
    found, end = [], 0
    for match in TOKEN.finditer(expression):
        assert match.start() == end, f"{expression}: not understood at {expression[end:][:20]!r}"
        found.append(match.group())
        end = match.end()
    assert end == len(expression), expression
    return [token for token in found if not token.isspace()]


def asked(expression: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """(metric, matchers) of each selector; a matcher is (label, operator, value)."""
    words, place = tokens(expression), 0
    for opening, closing in ("()", "{}", "[]"):
        assert words.count(opening) == words.count(closing), expression
    while place < len(words):
        word = words[place]
        if word in ("by", "on"):
            place = words.index(")", place) + 1
            continue
        if re.fullmatch(r"[A-Za-z_:]\w*", word):
            if word in FUNCTIONS:
                assert words[place + 1] in ("(", "by") or word in ("or", "and"), f"{expression}: {word}"
            else:
                matchers = []
                if words[place + 1 : place + 2] == ["{"]:
                    end = words.index("}", place)
                    inner = words[place + 2 : end]
                    for start in range(0, len(inner), 4):
                        label, operator, value = inner[start : start + 3]
                        matchers.append((label, operator, json.loads(value)))
                    place = end
                yield word, matchers
        place += 1


def grouped(expression: str) -> set[str]:
    """Labels of every `by (…)` and `on (…)`."""
    return {label.strip() for inner in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression) for label in inner.split(",")}


def check(expression: str, exported: Exported) -> None:
    labels = set()
    selectors = list(asked(expression))
    assert selectors or "time()" in expression, expression
    for metric, matchers in selectors:
        assert metric in exported, f"{expression}: no metric {metric}"
        labels |= exported[metric].keys()
        for label, operator, value in matchers:
            assert label in exported[metric], f"{expression}: {metric} has no label {label}; it has {sorted(exported[metric])}"
            met = [each for each in exported[metric][label] if _meets(each, operator, value)]
            assert met, f"{expression}: no value of {label} meets {operator}{value!r}; there are {sorted(exported[metric][label])}"
    assert grouped(expression) <= labels | {"instance"}, f"{expression}: groups by {sorted(grouped(expression) - labels)}"


def _meets(value: str, operator: str, wanted: str) -> bool:
    same = re.fullmatch(wanted, value) is not None if "~" in operator else value == wanted
    return same != operator.startswith("!")


def expressions() -> list[tuple[str, str]]:
    """(where, PromQL) of both files."""
    dashboard = json.loads(DASHBOARD.read_text())
    found = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", [])]
    found += [(each["name"], each["expr"]) for each in dashboard["annotations"]["list"]]
    found += [(rule["alert"], rule["expr"]) for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    return found


def samples(text: str) -> Exported:
    exported: Exported = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for label, value in sample.labels.items():
                exported.setdefault(sample.name, {}).setdefault(label, set()).add(value)
            exported.setdefault(sample.name, {})
    return exported


def everything() -> Exported:
    """What an object of ours exports after everything has happened once."""
    from prometheus_client import generate_latest

    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for reason in (None, UNKNOWN_USER, SLOW, DOWN, AVOIDED, ARM_FAILED):
        metrics.answered("rank", "sam", reason)
    for endpoint, status, reason in (("rank", 503, "busy"), ("recommend", 503, "timeout"), ("events", 500, ""), ("other", 404, "")):
        metrics.arrived()
        metrics.left(endpoint, status, 0.1, arm="sam", reason=reason)
    metrics.staged("rank", 0.1)
    for outcome in ("accepted", "duplicate", "rejected"):
        metrics.events(outcome)
    for outcome in ("started", "stepped", "rolled_back"):
        metrics.changed("canary", outcome)
    for outcome in ("ok", "slow", "down", "avoided"):
        metrics.store_read(outcome)
    metrics.breaker("open")
    metrics.canary("challenger", 0.05)
    metrics.backlog("events", 3)
    metrics.serves(version="v", arm="sam", ranker="sam", retriever="sasrec", features="f", code=None)
    metrics.process(1, 2)
    metrics.logged("error")
    feature = FeatureDrift(psi=0.1, psi_training=0.2, limit=0.3, counts=[1], observations=1.0)
    measures = {"alarms": 0.0, "new_user_share": 0.0, "new_item_share": 0.0, "calibration_ratio": 1.0}
    metrics.drift(
        Drift(
            features={"history_length": feature}, measures=measures, calibration=Calibration(shown=0, predicted=0, variance=0, clicked=0), alarms=[]
        )
    )
    return samples(generate_latest(registry).decode())


@pytest.mark.parametrize(("where", "expression"), expressions(), ids=[where for where, _ in expressions()])
def test_dashboard_and_alerts_ask_only_for_what_there_is(where: str, expression: str) -> None:
    check(expression, everything())


# An experiment's, those of rare events, and drift's, which come with the first look at the window.
NOT_AT_ONCE = ("longtrail_canary", "longtrail_changes", "longtrail_drift")


def test_what_the_object_exports_is_what_the_server_exports(running: Running) -> None:
    """Names and labels of a real scrape: all that everything() has, but for what takes its time."""
    running.client.post("/rank", json={"user_id": "u0001", "candidates": ["i0001", "i0002"]})
    running.client.post("/events", json={"events": [{"user_id": "u0001", "item_id": "i0001", "action": "view"}]})
    running.client.post("/rank", json={})
    scraped = samples(running.client.get("/metrics").text)
    for name, labels in everything().items():
        if name.startswith("longtrail_") and not name.endswith("_created") and not name.startswith(NOT_AT_ONCE):
            assert name in scraped, name
            assert scraped[name].keys() == labels.keys(), name
    assert not [name for name in scraped if name.startswith("longtrail_") and name not in everything()]
    (build,) = [
        sample
        for family in text_string_to_metric_families(running.client.get("/metrics").text)
        for sample in family.samples
        if sample.name == "longtrail_build_info"
    ]
    assert build.value == 1 and build.labels["ranker"] == "sam" and len(build.labels["features"]) == 12


@pytest.mark.parametrize(
    "expression",
    [
        "rate(longtrail_nothing_total[5m])",
        "sum by (user) (longtrail_ready)",
        'longtrail_events_total{kind="x"}',
        'longtrail_events_total{outcome="eaten"}',
        "sum(longtrail_ready",
        "longtrail_ready ?",
    ],
)
def test_an_expression_that_asks_for_more_is_found(expression: str) -> None:
    with pytest.raises(AssertionError):
        check(expression, everything())


def test_every_alert_has_its_section_in_the_runbook() -> None:
    sections = set(re.findall(r'<a id="([a-z-]+)"></a>', (ROOT / "docs" / "serving" / "runbook.md").read_text()))
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    assert len(rules) > 10 and {rule["annotations"]["runbook"] for rule in rules} <= sections
    assert all(rule["labels"]["severity"] in ("page", "ticket") and rule["annotations"]["summary"] for rule in rules)


def test_panels_do_not_overlap() -> None:
    taken = np.zeros((200, 24), int)
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        taken[place["y"] : place["y"] + place["h"], place["x"] : place["x"] + place["w"]] += 1
        assert place["x"] + place["w"] <= 24
    assert taken.max() == 1


# ---------------------------------------------------------------- the object


def value(registry: CollectorRegistry, name: str, **labels: str) -> Any:
    return registry.get_sample_value(name, labels)


def test_no_label_grows_without_bound() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for number in range(10 * MAX_VALUES):
        metrics.answered("rank", "sam", f"error number {number}")
        metrics.staged(f"stage {number}", 0.1)
    text = {name: labels for name, labels in samples(_text(registry)).items() if name in ("longtrail_answers_total", "longtrail_stage_seconds_count")}
    for labels in text.values():
        assert all(len(values) <= MAX_VALUES + 1 for values in labels.values())
    assert value(registry, "longtrail_stage_seconds_count", stage=OTHER) == 9 * MAX_VALUES


def _text(registry: CollectorRegistry) -> str:
    from prometheus_client import generate_latest

    return generate_latest(registry).decode()


def refused(registry: CollectorRegistry) -> float:
    return registry.get_sample_value("longtrail_refusals_total", {"endpoint": "rank", "status": "503", "reason": "busy"}) or 0.0


def counted(registry: CollectorRegistry) -> float:
    return registry.get_sample_value("longtrail_request_seconds_count", {"endpoint": "rank", "arm": "sam"}) or 0.0


def test_a_request_waits_then_works_then_is_gone() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    trace = Trace("r", "rank")
    begin(trace)
    # Prometheus' files, where another test has switched them on, are shared by all registries of a process: a series starts at what stands there.
    for status, more in ((200, {"arm": "sam"}), (503, {"reason": "busy"})):
        metrics.arrived()
        metrics.left("rank", status, 0.1, **more)
    before = refused(registry), counted(registry)

    def flight() -> tuple[float, float]:
        return value(registry, "longtrail_requests_in_flight", state="waiting"), value(registry, "longtrail_requests_in_flight", state="working")

    metrics.arrived()
    assert flight()[0] == 1
    metrics.taken()
    metrics.taken()  # a second call changes nothing
    assert flight() == (0, 1) and current() is trace and trace.stages["queue"] > 0
    with metrics.stage("rank"), metrics.stage("log"):
        pass
    metrics.answered("rank", "sam", None, answer="a", items=2)
    metrics.left("rank", 200, 0.2, arm=trace.arm, worked=trace.working)
    assert flight() == (0, 0)
    metrics.arrived()
    metrics.left("rank", 503, 0.1, reason="busy")  # refused before a thread took it
    assert flight() == (0, 0)
    assert (refused(registry), counted(registry)) == (before[0] + 1, before[1] + 1)
    assert trace.stages.keys() == {"queue", "rank", "log"} and trace.items == 2


def test_gauges_of_states_are_one_hot_and_the_old_build_goes() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for state in BREAKER_STATES:
        metrics.breaker(state)
        assert [value(registry, "longtrail_breaker_state", breaker="online_store", state=each) for each in BREAKER_STATES] == [
            float(each == state) for each in BREAKER_STATES
        ]
    old = {"version": "1", "arm": "a", "ranker": "a", "retriever": "r", "features": "f", "code": ""}
    metrics.serves(**{**old, "code": None})
    metrics.serves(**{**old, "version": "2"})
    assert (value(registry, "longtrail_build_info", **old), value(registry, "longtrail_build_info", **{**old, "version": "2"})) == (0, 1)
