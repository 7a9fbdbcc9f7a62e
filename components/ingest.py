"""Step `ingest`: a raw log to the four tables, the quarantine and the counts."""

from pathlib import Path
from typing import Annotated

import typer

from components.command import run
from longtrail.config import load_config


def ingest(
    params: Annotated[Path, typer.Option(help="settings: dataset and ingest")] = Path("params.yaml"),
    tables: Annotated[Path, typer.Option(help="output: interactions, impressions, items, users, quarantine, counts.json")] = Path("build/tables"),
    cache: Annotated[Path, typer.Option(help="folder that keeps downloaded datasets")] = Path("data"),
) -> None:
    """Read the dataset of params.yaml, check every row, and write the tables. Rejected rows go to quarantine.parquet with their reasons."""
    from components.source import resolve
    from longtrail.ingest import ingest as write_tables

    config = load_config(params)
    found = resolve(config.dataset, cache)
    write_tables(found.dataset, config.ingest, tables, cache=cache, origin=found.origin)


if __name__ == "__main__":
    run(ingest)
