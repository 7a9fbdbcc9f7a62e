"""Step `validate`: do the tables keep their schema, and does the log look sane? Great Expectations; JSON result and Data Docs."""

import logging
from pathlib import Path
from typing import Annotated, Any

import duckdb
import typer

from components.command import run
from components.expectations import CHECKED, SUMMARY, Expectation, Severity, all_expectations
from components.validation_page import validation_page
from longtrail.config import SplitSettings, load_config
from longtrail.errors import DatasetError, ValidationError
from longtrail.files import atomic_directory, write_json
from longtrail.schema import IMPRESSIONS

log = logging.getLogger("validate")
EXAMPLES = 5


def validate(
    tables: Annotated[Path, typer.Option(help="folder of the four tables, from ingest")] = Path("build/tables"),
    params: Annotated[Path, typer.Option(help="settings")] = Path("params.yaml"),
    validation: Annotated[Path, typer.Option(help="output: result.json, summary.html and data_docs/")] = Path("build/validation"),
) -> None:
    """Check the tables against their schema and the log against its expected distributions.

    Raises ValidationError, after the result was written, if a critical expectation failed: it names expectation, column and examples.
    """
    config = load_config(params)
    for table in CHECKED:
        if not (tables / f"{table.name}.parquet").is_file():
            raise DatasetError(f"{tables / table.name}.parquet: no such file; expected the output of components.ingest")
    with duckdb.connect() as db, atomic_directory(validation) as out:
        db.execute("SET TimeZone='UTC'")
        has_impressions = _count(db, tables / "impressions.parquet") > 0
        summary, broken = _summarise(db, tables, config.split, has_impressions)
        expectations = all_expectations(config.validation, has_impressions=has_impressions)
        outcomes = evaluate_expectations(expectations, tables, summary, out / "data_docs") + broken
        failures = [o for o in outcomes if not o["success"]]
        critical = [o for o in failures if o["severity"] == Severity.CRITICAL.value]
        result = {
            "success": not critical,
            "critical_failures": len(critical),
            "warnings": len(failures) - len(critical),
            "expectations": outcomes,
            "summary": summary,
        }
        write_json(out / "result.json", result)
        (out / "summary.html").write_text(validation_page(db, result), encoding="utf-8")
    for outcome in failures:
        log.warning("%s: %s", outcome["severity"], describe(outcome))
    if critical:
        listed = "\n".join(f"  - {describe(o)}" for o in critical)
        raise ValidationError(f"{tables}: {len(critical)} critical expectation(s) failed (all results: {validation}):\n{listed}")
    log.info("%d expectations hold, %d warnings: %s", len(outcomes) - len(failures), len(failures), validation)


def describe(outcome: dict[str, Any]) -> str:
    """One line: expectation, column, what was expected, what was seen, examples."""
    column = f" (column {outcome['column']})" if outcome["column"] else ""
    seen = f"; seen {outcome['observed']}" if outcome["observed"] is not None else ""
    examples = f"; e.g. {', '.join(map(str, outcome['examples']))}" if outcome["examples"] else ""
    return f"{outcome['name']}{column}: expected: {outcome['expected']}{seen}{examples}"


def _count(db: duckdb.DuckDBPyConnection, parquet: Path) -> int:
    row = db.execute("SELECT count(*) FROM read_parquet(?)", [str(parquet)]).fetchone()
    assert row is not None
    return int(row[0])


def _figures(split: SplitSettings, has_impressions: bool) -> dict[str, str]:
    """SQL of each figure of the summary, over views i (interactions), p (impressions), items, users."""
    figures = {
        "users": "SELECT count(*) FROM users",
        "items": "SELECT count(*) FROM items",
        "interactions": "SELECT count(*) FROM i",
        "impressions": "SELECT count(*) FROM p",
        "unknown_users": "SELECT count(*) FROM (SELECT user_id FROM i UNION ALL SELECT user_id FROM p) ANTI JOIN users USING (user_id)",
        "unknown_items": "SELECT count(*) FROM (SELECT item_id FROM i UNION ALL SELECT item_id FROM p) ANTI JOIN items USING (item_id)",
        "time_disorder": "SELECT count(*) FROM (SELECT timestamp < lag(timestamp) OVER (ORDER BY file_row_number) AS back FROM i) WHERE back",
        "duplicated_positions": "SELECT count(*) FROM (SELECT 1 FROM p GROUP BY request_id, position HAVING count(*) > 1)",
        "median_history_length": "SELECT coalesce(median(n), 0) FROM (SELECT count(*) AS n FROM i GROUP BY user_id)",
        "repeated_interactions": "SELECT coalesce(1 - (SELECT count(*) FROM (SELECT DISTINCT user_id, item_id, timestamp, action FROM i))"
        " / nullif(count(*), 0), 0) FROM i",
        "top_item_share": "SELECT coalesce(max(n) / sum(n), 0) FROM (SELECT count(*) AS n FROM i GROUP BY item_id)",
        "new_item_share": "SELECT coalesce(avg((first_seen >= (SELECT quantile_disc(timestamp, "
        f"{1 - split.test_share}) FROM i))::INT), 0) FROM items",
    }
    if has_impressions:
        figures["click_rate"] = "SELECT avg(click) FROM p"
    return figures


def _summarise(
    db: duckdb.DuckDBPyConnection, tables: Path, split: SplitSettings, has_impressions: bool
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The summary's one row, and a failed outcome for each figure that the tables are too broken to give."""
    views = {"i": "interactions", "p": "impressions", "items": "items", "users": "users"}
    for view, table in views.items():
        path = str(tables / f"{table}.parquet").replace("'", "''")
        db.execute(f"CREATE VIEW {view} AS SELECT * FROM read_parquet('{path}', file_row_number = true)")
    summary: dict[str, float] = {}
    broken: list[dict[str, Any]] = []
    for name, query in _figures(split, has_impressions).items():
        try:
            row = db.execute(query).fetchone()
        except duckdb.Error as error:
            reason = str(error).splitlines()[0]
            broken.append(
                {
                    "name": f"{SUMMARY}.{name}",
                    "table": SUMMARY,
                    "column": name,
                    "severity": Severity.CRITICAL.value,
                    "success": False,
                    "observed": reason,
                    "expected": "a figure that can be computed from the tables",
                    "examples": [],
                }
            )
            continue
        assert row is not None
        summary[name] = float(row[0]) if row[0] is not None else float("nan")
    return {name: value for name, value in summary.items() if value == value}, broken


def evaluate_expectations(expectations: list[Expectation], tables: Path, summary: dict[str, float], docs: Path) -> list[dict[str, Any]]:
    """Run every suite in an in-memory Great Expectations context and write Data Docs to `docs`."""
    import great_expectations as gx  # seconds to import, and only this step needs it
    import pandas as pd

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
    context.delete_data_docs_site("local_site")
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())}
    index = {"class_name": "DefaultSiteIndexBuilder"}
    site = {"class_name": "SiteBuilder", "show_how_to_buttons": False, "site_index_builder": index, "store_backend": store}
    context.add_data_docs_site("data_docs", site)  # type: ignore[arg-type]
    source = context.data_sources.add_pandas("tables")
    outcomes: list[dict[str, Any]] = []
    for table in dict.fromkeys(e.table for e in expectations):
        wanted = [e for e in expectations if e.table == table]
        if table == SUMMARY:
            wanted = [e for e in wanted if e.column in summary]
            frame = pd.DataFrame([summary])
        else:
            frame = _frame(tables / f"{table}.parquet")
        suite = context.suites.add(gx.ExpectationSuite(name=table, expectations=[_configuration(e) for e in wanted]))
        batch = source.add_dataframe_asset(table).add_batch_definition_whole_dataframe("all")
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=table, data=batch, suite=suite))
        checkpoint = context.checkpoints.add(gx.Checkpoint(name=table, validation_definitions=[definition]))
        run_result = checkpoint.run(batch_parameters={"dataframe": frame})
        (validated,) = run_result.run_results.values()
        answers: list[dict[str, Any]] = [dict(r.to_json_dict()) for r in validated.results]
        by_name = {answer["expectation_config"]["meta"]["name"]: answer for answer in answers}
        outcomes += [_outcome(e, by_name[e.name], summary) for e in wanted]
    context.build_data_docs()
    return outcomes


def _frame(parquet: Path) -> Any:
    """The table as pandas, without the columns of repeated text that only DuckDB checks: they would take most of the memory."""
    import pyarrow.parquet as pq

    table = pq.read_table(parquet)
    if parquet.stem == IMPRESSIONS.name and "request_id" in table.column_names:
        at = table.column_names.index("request_id")
        table = table.set_column(at, "request_id", table["request_id"].dictionary_encode())
    return table.to_pandas(strings_to_categorical=True)


def _configuration(expectation: Expectation) -> Any:
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
    from great_expectations.expectations.metadata_types import FailureSeverity

    return ExpectationConfiguration(
        type=expectation.type,
        kwargs=expectation.arguments,
        severity=FailureSeverity(expectation.severity.value),
        meta={"name": expectation.name, "notes": expectation.says},
    )


def _outcome(expectation: Expectation, result: dict[str, Any], summary: dict[str, float]) -> dict[str, Any]:
    """Great Expectations' answer in our words. It raises nothing, not even for a missing column, so exceptions are read out of it."""
    figures = result["result"]
    observed: Any = figures.get("observed_value")
    if figures.get("unexpected_count"):
        observed = f"{figures['unexpected_count']} of {figures['element_count']} rows otherwise"
    exceptions = result.get("exception_info") or {}
    if not result["success"] and observed is None:
        messages = [exceptions] if "exception_message" in exceptions else list(exceptions.values())
        observed = "; ".join(str(m.get("exception_message")) for m in messages if m.get("exception_message")) or None
    examples = (figures.get("partial_unexpected_list") or [])[:EXAMPLES]
    if expectation.table == SUMMARY and expectation.column in summary:
        observed, examples = f"{summary[expectation.column]:.6g}", []
    return {
        "name": expectation.name,
        "table": expectation.table,
        "column": expectation.column,
        "severity": expectation.severity.value,
        "success": bool(result["success"]),
        "observed": observed,
        "expected": expectation.says,
        "examples": [str(example) for example in examples],
    }


if __name__ == "__main__":
    run(validate)
