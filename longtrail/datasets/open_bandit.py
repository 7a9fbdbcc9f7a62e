"""ZOZO's Open Bandit Dataset (Saito et al., NeurIPS Datasets 2021): impressions of a fashion shop with the propensities that were really used.

Each row is one item shown at one of three positions, so each row is a request of its own, and its propensity P(item at that position) is
marginal. The log has no user id, only four hashed features: users with equal features are one user here.
"""

import logging
from pathlib import Path

import ibis

from longtrail.config import OpenBanditDataset
from longtrail.datasets import fetching
from longtrail.datasets.raw import RAW_COLUMNS, RawEvents, RawLog, Rules
from longtrail.datasets.reading import CsvFormat, load_text
from longtrail.engines import Engine
from longtrail.errors import DatasetError
from longtrail.schema import Propensity

log = logging.getLogger(__name__)

FULL = "https://research.zozo.com/data_release/open_bandit_dataset.zip"  # 11 GB; ZOZO publishes no checksum
_FEATURES = tuple(f"user_feature_{i}" for i in range(4))
_NAMES = {
    "timestamp": "timestamp",
    "item": "item_id",
    "position": "position",
    "click": "click",
    "propensity": "propensity_score",
    "user": "user_feature_0..3",
}
SMALL = fetching.Wheel(
    requirement="obp==0.4.1",
    sha256="87dec9caf4283c25ab13036532e0a24566f1c7bdcad1653a8ded43b2f5ef8208",
    members={
        f"obp/dataset/obd/{policy}/{campaign}/{name}.csv": f"{policy}/{campaign}/{name}.csv"
        for policy in ("random", "bts")
        for campaign in ("all", "men", "women")
        for name in (campaign, "item_context")
    },
)


def read_open_bandit(engine: Engine, dataset: OpenBanditDataset, folder: Path, cache: Path) -> RawLog:
    """One policy's log of one campaign. `folder` takes what a zip holds. Raises DatasetError."""
    source = _find(dataset.source, cache)
    log_file, context = _open(source, dataset, folder)
    columns: dict[str, str | None] = {raw: own for raw, own in _NAMES.items() if raw != "user"}
    columns |= {feature: feature for feature in _FEATURES}
    rows = load_text(engine, "log", [log_file], columns, csv_format=CsvFormat(), label=fetching.label(source, log_file))
    user = rows[_FEATURES[0]]
    for feature in _FEATURES[1:]:
        user = user + "|" + rows[feature]  # null where a feature is missing
    rows = rows.mutate(user=user, **{name: ibis.null("string") for name in RAW_COLUMNS if name not in _NAMES})
    rules = Rules(
        timestamp_unit="iso",
        click_from="column",
        action="click",
        policy=dataset.policy,
        request_prefix=f"{dataset.policy}-{dataset.campaign}-",
    )
    events = RawEvents(rows=rows, names=_NAMES, rules=rules, key="log")
    items = None
    files = [log_file]
    if context is not None:
        wanted: dict[str, str | None] = {"item": "item_id", "category": "item_feature_1"}
        items = load_text(engine, "items", [context], wanted, csv_format=CsvFormat(), label=fetching.label(source, context))
        items = items.mutate(title=ibis.null("string"))
        files.append(context)
    return RawLog(events=(events,), files=tuple(files), items=items, propensity=Propensity.MARGINAL)


def _open(source: Path, dataset: OpenBanditDataset, folder: Path) -> tuple[Path, Path | None]:
    """The log and, if it is there, the item features, of the policy and campaign asked for."""
    names = (f"{dataset.campaign}.csv", "item_context.csv")
    if source.is_dir():
        for root in (source, source / "open_bandit_dataset"):
            inside = [root / dataset.policy / dataset.campaign / name for name in names]
            if inside[0].is_file():
                return inside[0], inside[1] if inside[1].is_file() else None
        raise DatasetError(f"{source}: not the Open Bandit layout; expected {dataset.policy}/{dataset.campaign}/{names[0]} in it")
    ends = [f"{dataset.policy}/{dataset.campaign}/{name}" for name in names]
    members = {end: member for end in ends for member in fetching.archive_paths(source) if f"/{member}".endswith(f"/{end}")}
    if ends[0] not in members:
        raise DatasetError(f"{source}: not the Open Bandit layout; expected {ends[0]} in it")
    fetching.extract(source, {member: end for end, member in members.items()}, folder)
    return folder / ends[0], folder / ends[1] if ends[1] in members else None


def _find(source: str, cache: Path) -> Path:
    if Path(source).exists():
        return Path(source)
    if source == "small":  # its only official home is the package obp
        return fetching.from_wheel(SMALL, cache)
    if source == "full":
        return fetching.download(FULL, cache / "open_bandit_dataset.zip", checksum=None)
    raise DatasetError(f"dataset.source {source!r}: no such folder or zip (looked from {Path.cwd()}), and neither 'small' nor 'full'")
