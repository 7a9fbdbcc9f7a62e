"""A log of one's own: any CSV or Parquet files, by a column mapping in params.yaml."""

from pathlib import Path

from longtrail.config import EventColumns, EventLogDataset
from longtrail.datasets.raw import RAW_COLUMNS, ClickFrom, RawEvents, RawLog, Rules
from longtrail.datasets.reading import CsvFormat, find_files, load, load_text
from longtrail.engines import Engine
from longtrail.errors import ConfigError
from longtrail.schema import Propensity

_OF_EVENTS = ("user", "item", "timestamp", "written_at", "action", "value", "category", "title")


def read_event_log(engine: Engine, dataset: EventLogDataset, folder: Path, cache: Path) -> RawLog:
    """The log, its further events and its candidate sets. Raises DatasetError naming the file, ConfigError naming the setting."""
    names = column_names(dataset.columns)
    _check_settings(dataset, names)
    csv_format = CsvFormat(delimiter=dataset.delimiter, encoding=dataset.encoding)
    files = find_files(dataset.source)
    rows = load(engine, "log", files, names, csv_format=csv_format, unit=dataset.timestamp_unit)
    rules = Rules(
        timestamp_unit=dataset.timestamp_unit,
        click_from=_click_from(dataset),
        like_from=dataset.like_from,
        click_actions=dataset.click_actions,
        action="click" if dataset.columns.click else "event",
        first_position=dataset.first_position,
    )
    events = [RawEvents(rows=rows, names=names, rules=rules, delimiter=dataset.delimiter, key="log")]
    if dataset.events is not None:
        more = find_files(dataset.events)
        kept = {name: own for name, own in column_names(dataset.event_columns or dataset.columns).items() if name in _OF_EVENTS}
        rows = load(engine, "events", more, kept, csv_format=csv_format, unit=dataset.timestamp_unit)
        rules = Rules(timestamp_unit=dataset.timestamp_unit)
        events.append(RawEvents(rows=rows, names=kept, rules=rules, delimiter=dataset.delimiter, key="events"))
        files = [*files, *more]
    candidates = None
    if dataset.candidates is not None:
        more = find_files(dataset.candidates)
        wanted: dict[str, str | None] = {"request": dataset.columns.request, "item": dataset.columns.item}
        candidates = load_text(engine, "candidates", more, wanted, csv_format=csv_format)
        files = [*files, *more]
    return RawLog(events=tuple(events), files=tuple(files), candidates=candidates, propensity=Propensity(dataset.propensity_kind))


def column_names(columns: EventColumns) -> dict[str, str]:
    """Raw column → the log's own name, for the columns that params.yaml maps."""
    mapped = columns.model_dump()
    return {name: mapped[name] for name in RAW_COLUMNS if mapped.get(name) is not None}


def _click_from(dataset: EventLogDataset) -> ClickFrom:
    if dataset.columns.click:
        return "column"
    if dataset.like_from is not None:
        return "value"
    return "action" if dataset.click_actions else "nothing"


def _check_settings(dataset: EventLogDataset, names: dict[str, str]) -> None:
    """What the settings need of each other. Raises ConfigError naming the dotted key."""
    needs = {
        "dataset.like_from": (dataset.like_from is not None and not dataset.columns.click, "value"),
        "dataset.click_actions": (bool(dataset.click_actions) and not dataset.columns.click, "action"),
        "dataset.candidates": (dataset.candidates is not None, "request"),
        "dataset.propensity_kind": (dataset.propensity_kind != "none", "propensity"),
    }
    for key, (given, needed) in needs.items():
        if given and needed not in names:
            raise ConfigError(f"{key} is set, so expected dataset.columns.{needed} to name a column")
    if "propensity" in names and dataset.propensity_kind == "none":
        raise ConfigError("dataset.columns.propensity is set, so expected dataset.propensity_kind to be conditional or marginal")
