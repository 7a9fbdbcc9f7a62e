"""Has what the service saw moved away from what its models learned from? `python -m serving.drift STATE --bento build/bento --out build/drift`.

Reads the logs of a state folder (it may be in use) and writes OUT/drift.json, OUT/drift.html and OUT/data_docs/: features, users, items and click
rates against the Bento's reference (longtrail.drift), by the measures of the service; and what was served through the Great Expectations suite
of the training data. An offline tool: it needs the pipeline's packages (Great Expectations, matplotlib), which a Bento has not.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer

from longtrail.config import Config, load_config
from longtrail.drift import Reference
from longtrail.errors import LongtrailError, ModelError
from longtrail.files import atomic_directory, write_json
from longtrail.schema import EXAMPLES, IMPRESSIONS, INTERACTIONS, ITEM_STATISTICS, USER_STATISTICS
from serving.artifacts import ARTIFACTS, Artifacts
from serving.drift_window import Listed, Row, RowMaker, measure
from serving.event_records import LoggedEvent, read_events
from serving.segments import read_answers

_DAY = 24 * 3_600_000_000  # µs
_BINS = 10


class Served:
    """A service's logs of a period, with dense ids, next to what its Bento knows."""

    def __init__(self, artifacts: Artifacts, state: Path, *, days: float | None = None) -> None:
        """`days`: only the newest so many; all by default. Raises ModelError where no list was logged."""
        self.artifacts = artifacts
        self.answers = read_answers(state)
        if not self.answers:
            raise ModelError(f"{state}: no logged answer; expected the state folder of a service that was asked for lists")
        self.end = self.answers[-1]["timestamp"]
        start = 0 if days is None else self.end - int(days * _DAY)
        self.answers = [answer for answer in self.answers if answer["timestamp"] >= start]
        self.events: list[LoggedEvent] = [event for chunk in read_events(state / "log" / "events", start) for event in chunk]
        self._users = dict(artifacts.users)
        for key in dict.fromkeys([*(answer["user"] for answer in self.answers), *(event.user for event in self.events)]):
            self._users.setdefault(key, len(self._users) + 1)
        self.clicks: dict[str, set[str]] = {}
        for event in self.events:
            if event.request is not None:
                self.clicks.setdefault(event.request, set()).add(event.item)

    def rows(self) -> list[Row]:
        """Lists as drift sees them; seconds since 1970."""
        catalogue, manifest = self.artifacts.catalogue, self.artifacts.manifest
        maker = RowMaker(Reference.read(self.artifacts.folder / "reference.json"), catalogue, manifest.prior_click_rate, manifest.users)
        made = []
        for answer in self.answers:
            evidence = answer["evidence"]
            listed = Listed(
                at=answer["timestamp"] / 1e6,
                known=answer["user"] in self.artifacts.users,
                retrieved=bool(evidence and evidence["retrieved"]),
                statistics=None if evidence is None else (evidence["total"], *evidence["user"]),
                candidates=self.items(answer["candidates"]),
                items=self.items(answer["items"]),
                scores=np.asarray(answer["scores"], np.float64),
            )
            row = maker.row(self._users[answer["user"]], listed)
            row.clicked = set(self.items([key for key in self.clicks.get(answer["request_id"], ()) if catalogue.id_of(key) is not None]).tolist())
            made.append(row)
        return made

    def items(self, keys: Sequence[str]) -> Any:
        ids = [self.artifacts.catalogue.id_of(key) for key in keys]
        return np.array([0 if item is None else item for item in ids], np.int64)

    # ------------------------------------------------------------ tables of the house's schema

    def tables(self) -> dict[str, pa.Table]:
        """interactions, impressions and examples (the served features of the items shown) as longtrail.schema has them."""
        return {
            table.name: made
            for table, made in ((INTERACTIONS, self._interactions()), (IMPRESSIONS, self._impressions()), (EXAMPLES, self._examples()))
        }

    def _interactions(self) -> pa.Table:
        done = [event for event in self.events if self.artifacts.catalogue.id_of(event.item) is not None]
        columns = {
            "user_id": [self._users[event.user] for event in done],
            "item_id": self.items([event.item for event in done]),
            "timestamp": [event.timestamp for event in done],
            "available_at": [event.written_at for event in done],
            "action": [event.action for event in done],
            "value": [event.value for event in done],
        }
        return _table(INTERACTIONS, columns)

    def _shown(self, answers: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], Any]:
        """Columns that impressions and examples share, and the answer's place of each row."""
        lengths = np.array([len(answer["items"]) for answer in answers], np.int64)
        of = np.repeat(np.arange(len(answers)), lengths)
        times = np.array([answer["timestamp"] for answer in answers], np.int64)[of]
        keys = [key for answer in answers for key in answer["items"]]
        requests = np.array([answer["request_id"] for answer in answers], object)[of]
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        columns = {
            "request_id": requests,
            "user_id": np.array([self._users[answer["user"]] for answer in answers], np.int64)[of],
            "item_id": self.items(keys),
            "timestamp": times,
            "available_at": times,
            "position": np.arange(len(of)) - starts + 1,
            "click": [int(key in self.clicks.get(request, ())) for request, key in zip(requests, keys, strict=True)],
            "propensity": [value for answer in answers for value in answer["propensities"]],
            "policy": np.array([answer["arm"] for answer in answers], object)[of],
        }
        return columns, of

    def _impressions(self) -> pa.Table:
        return _table(IMPRESSIONS, self._shown(self.answers)[0])

    def _examples(self) -> pa.Table:
        personal = [answer for answer in self.answers if answer["evidence"] is not None]
        columns, of = self._shown(personal)
        columns["history_length"] = np.array([answer["evidence"]["total"] for answer in personal], np.int64)[of]
        for place, name in enumerate(USER_STATISTICS):
            columns[name] = np.array([answer["evidence"]["user"][place] for answer in personal], np.int64)[of]
        for name in ITEM_STATISTICS:
            columns[name] = getattr(self.artifacts.catalogue, name)[columns["item_id"]]
        return _table(EXAMPLES, columns)


def drift(state: Path, bento: Path, out: Path, *, days: float | None = None) -> dict[str, Any]:
    """Write OUT and return what its drift.json holds. Raises LongtrailError where logs or Bento cannot be read."""
    artifacts = Artifacts.open(bento / "src" / ARTIFACTS)
    return drift_over(artifacts, load_config(artifacts.folder / "params.yaml"), Served(artifacts, state, days=days), out)


def drift_over(artifacts: Artifacts, config: Config, served: Served, out: Path) -> dict[str, Any]:
    """As `drift`, over what is open."""
    from components.served import check_served, drift_page  # the pipeline's packages, which only this tool needs

    settings, rows = config.serving.drift, served.rows()
    reference = Reference.read(artifacts.folder / "reference.json")
    measured = measure(rows, reference, settings, at=served.end / 1e6 + 60 * settings.click_minutes)
    tables = served.tables()
    with atomic_directory(out) as aside:
        result = {
            "requests": len(rows),
            "first": served.answers[0]["timestamp"],
            "last": served.end,
            "alarms": measured.alarms,
            "measures": measured.measures,
            "features": {
                name: asdict(each)
                | {
                    "edges": reference.features[name].edges,
                    "histograms": {
                        "training": reference.features[name].training, "packaging": reference.features[name].newest, "served": each.counts
                    },
                }
                for name, each in measured.features.items()
            },
            "reliability": reliability(rows),
            "reference": {"click_rate": reference.click_rate, "new_item_share": reference.new_item_share, "split": reference.split},
            "expectations": check_served(tables, summary(tables), config.validation, aside / "data_docs"),
            "settings": settings.model_dump(),
        }  # fmt: skip
        write_json(aside / "drift.json", result)
        (aside / "drift.html").write_text(drift_page(result), encoding="utf-8")
    return result


def summary(tables: dict[str, pa.Table]) -> dict[str, float]:
    """Figures of the log as components.validate names them, where there are rows to say."""
    figures = {}
    done = tables["interactions"].to_pandas()
    if len(done):
        figures["top_item_share"] = float(done.item_id.value_counts(normalize=True).iloc[0])
        figures["repeated_interactions"] = float(done.duplicated(["user_id", "item_id", "timestamp", "action"]).mean())
    if tables["impressions"].num_rows:
        figures["click_rate"] = float(np.mean(tables["impressions"]["click"].to_numpy()))
    if tables["examples"].num_rows:
        longest = tables["examples"].to_pandas().groupby("user_id").history_length.max()
        figures["median_history_length"] = float(longest.median())
    return figures


def reliability(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Predicted and seen click rates of the items shown, by tenth of the prediction."""
    scores = np.array([score for row in rows for score in row.scores.values()])
    clicked = np.array([item in row.clicked for row in rows for item in row.scores], bool)
    if not len(scores):
        return []
    order = np.argsort(scores, kind="stable")
    parts = [part for part in np.array_split(order, _BINS) if len(part)]
    return [{"shown": float(len(part)), "predicted": float(scores[part].mean()), "clicked": float(clicked[part].mean())} for part in parts]


def _table(table: Any, columns: dict[str, Any]) -> pa.Table:
    schema = table.arrow()
    return pa.table({field.name: pa.array(columns[field.name], from_pandas=True).cast(field.type) for field in schema}, schema=schema)


def main(
    state: Annotated[Path, typer.Argument(help="the service's state folder ($LONGTRAIL_STATE)")],
    bento: Annotated[Path, typer.Option(help="the Bento that served")] = Path("build/bento"),
    out: Annotated[Path, typer.Option(help="folder to write; what stands there is replaced")] = Path("build/drift"),
    days: Annotated[float | None, typer.Option(help="only the newest so many days of the log")] = None,
    strict: Annotated[bool, typer.Option(help="exit 1 where something has drifted or a critical expectation failed")] = False,
) -> None:
    """Compare what a service saw with what its models learned from: JSON, a page, and Data Docs."""
    try:
        result = drift(state, bento, out, days=days)
    except LongtrailError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    failed = [each["name"] for each in result["expectations"] if not each["success"] and each["severity"] == "critical"]
    for line in [*result["alarms"], *(f"expectation failed: {name}" for name in failed)]:
        print(line, file=sys.stderr)
    print(f"{result['requests']:,} lists: {len(result['alarms'])} drift alarms, {len(failed)} critical expectations failed -> {out / 'drift.html'}")
    if strict and (result["alarms"] or failed):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
