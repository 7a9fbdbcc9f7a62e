"""The expressions run on any engine: they compile for Spark as they do for DuckDB."""

from types import SimpleNamespace

import ibis
import ibis.expr.types as ir
import pytest
from ibis.backends.sql.compilers import pyspark

from longtrail.datasets import derive
from longtrail.datasets.checks import check, raw_text
from longtrail.datasets.raw import RAW_COLUMNS, RawEvents, Rules

RULES = {
    "ratings": (Rules(timestamp_unit="s", click_from="value", like_from=4, action_from_value="rated_", value_bounds=(0.5, 5)), RAW_COLUMNS[:6]),
    "impressions": (Rules(timestamp_unit="iso", click_from="column"), RAW_COLUMNS),
    "events": (Rules(timestamp_unit="ms", click_from="action", click_actions=("buy",)), RAW_COLUMNS[:5]),
}


def expressions(kind: str) -> dict[str, ir.Table]:
    """Every expression that ingest makes, over tables that need no engine."""
    rules, names = RULES[kind]
    raw = RawEvents(rows=ibis.table({"order": "int64", **dict.fromkeys(RAW_COLUMNS, "string")}, name="raw"), names={n: n for n in names}, rules=rules)
    typed, _ = check(raw)
    checked = ibis.table(typed.schema(), name="checked")
    user_codes, item_codes = derive.codes(checked, "user_key", "user_code"), derive.codes(checked, "item_key", "item_code")
    coded = ibis.table(derive.code(checked, user_codes, item_codes).schema(), name="coded")
    repeated = derive.duplicates(coded)
    events = coded.anti_join(repeated, "order")
    metadata = ibis.table({"order": "int64", "item": "string", "category": "string", "title": "string"}, name="metadata")
    candidates = ibis.table({"order": "int64", "request": "string", "item": "string"}, name="candidates")
    users = derive.users_table(events, user_codes)
    items = derive.with_category_id(derive.items_table(events, item_codes, metadata, candidates))
    return {
        "checked": typed,
        "raw": raw.rows.select(raw=raw_text(raw)),
        "users": users,
        "items": items,
        "interactions": derive.interactions(events, users, items),
        "impressions": derive.impressions(events, users, items),
        "candidates": derive.candidate_rows(candidates, events, items),
    }


@pytest.mark.parametrize("kind", RULES)
def test_expressions_compile_for_spark(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # ibis keeps this option where pyspark is installed; compiling needs only its value
    monkeypatch.setattr(pyspark, "options", SimpleNamespace(pyspark=SimpleNamespace(treat_nan_as_null=False)))
    for name, expression in expressions(kind).items():
        assert "SELECT" in pyspark.compiler.to_sqlglot(expression).sql("spark"), name
