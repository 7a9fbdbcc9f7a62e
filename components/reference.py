"""What the features of training looked like, for the service to notice when they change: `reference.json` of a Bento (longtrail.drift)."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtrail.drift import GIVEN, ITEM_FEATURES, REQUEST_FEATURES, RETRIEVED, Feature, Reference, effective, make_feature
from longtrail.examples import FeatureSet, history_tensors
from longtrail.statistics import smoothed_rate

Ints = NDArray[np.int64]
RETRIEVALS = 256  # requests whose candidates are retrieved; our choice
_BATCH = 64


def write_reference(path: Path, features: Path, *, retriever: Path, retrieve: int, exclude_seen: bool = True) -> None:
    """Histograms of the training requests' features, and beside each how far the newest requests, read as the service reads them, are from it.

    What a retriever chooses is not what was shown in the log, so candidates of its choice have a reference of their own:
    `retrieve` items for the newest request of each of RETRIEVALS users.
    """
    feature_set = FeatureSet.open(features)
    newest = next((name for name in ("test", "valid") if feature_set.examples(name).num_rows), "train")
    oldest = next(name for name in ("train", "valid", "test") if feature_set.examples(name).num_rows)
    train, served = (_columns(feature_set, split) for split in (oldest, newest))
    firsts, latest = _firsts(train["request"]), _latest_of_user(served)
    users, served_users = effective(train["user_id"][firsts]), effective(served["user_id"][_firsts(served["request"])])
    made: dict[str, Feature] = {}
    for name in REQUEST_FEATURES:
        # The store's histories follow the events; its other counts stay as they were at the end of the log.
        now, observed = (served[name][_firsts(served["request"])], served_users) if name == "history_length" else (served[name][latest], len(latest))
        made[name] = make_feature(train[name][firsts], now, training_observations=users, newest_observations=observed)
    now_items = item_values(feature_set, served["item_id"])
    retrieved = item_values(feature_set, retrieved_items(feature_set, newest, retriever, retrieve, exclude_seen=exclude_seen))
    for name in ITEM_FEATURES:
        made[f"{name}.{GIVEN}"] = make_feature(train[name], now_items[name], training_observations=users, newest_observations=served_users)
        made[f"{name}.{RETRIEVED}"] = make_feature(
            train[name], retrieved[name], training_observations=users, newest_observations=min(RETRIEVALS, len(latest))
        )
    Reference(
        features=made,
        click_rate=float(served["click"].mean()),
        new_item_share=float((feature_set.catalogue.train_events[served["item_id"]] == 0).mean()),
        split=newest,
        requests=len(_firsts(served["request"])),
    ).write(path)


def item_values(feature_set: FeatureSet, items: Ints) -> dict[str, Any]:
    """ITEM_FEATURES of items, as the service has them resident."""
    catalogue = feature_set.catalogue
    rate = smoothed_rate(catalogue.item_clicks[items], catalogue.item_impressions[items], feature_set.prior_click_rate)
    return dict(zip(ITEM_FEATURES, (catalogue.item_events[items], rate), strict=True))


def retrieved_items(feature_set: FeatureSet, split: str, retriever: Path, retrieve: int, *, exclude_seen: bool = True) -> Ints:
    """What the retriever chooses for the newest RETRIEVALS users of a split, one after another."""
    import torch

    from longtrail.models.store import load_model
    from longtrail.retrieval.exact import exact_index
    from longtrail.retrieval.index import Exclusion

    model = load_model(retriever)
    reads = getattr(model.card.settings, "max_history", 1)
    columns = _columns(feature_set, split)
    rows = _latest_of_user(columns)[-RETRIEVALS:]
    users, lengths = columns["user_id"][rows], columns["history_length"][rows]
    found = []
    with torch.inference_mode():
        index = exact_index(model.module)
        for start in range(0, len(rows), _BATCH):
            part = slice(start, start + _BATCH)
            history = feature_set.history.gather(users[part], lengths[part], reads)
            ends = np.concatenate([[0], np.cumsum(history.lengths_B)])
            seen = history.items_BL[np.arange(history.items_BL.shape[1]) < history.lengths_B[:, None]]
            vectors = model.module.user_vectors(history_tensors(history, feature_set.catalogue))  # type: ignore[operator]
            items_BK, _ = index.topk(vectors, retrieve, exclude=Exclusion(ends, seen) if exclude_seen else None)
            found.append(items_BK.numpy().ravel())
    items = np.concatenate(found)
    return items[items > 0]


def _columns(feature_set: FeatureSet, split: str) -> dict[str, Any]:
    table = feature_set.examples(split)
    numbers = ("user_id", "item_id", "history_length", "user_impressions", "user_clicks", "item_events", "item_impressions", "item_clicks", "click")
    columns: dict[str, Any] = {name: table[name].to_numpy() for name in numbers}
    prior = feature_set.prior_click_rate
    columns["user_click_rate"] = smoothed_rate(columns["user_clicks"], columns["user_impressions"], prior)
    columns["item_click_rate"] = smoothed_rate(columns["item_clicks"], columns["item_impressions"], prior)
    columns["request"] = table["request_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    return columns


def _firsts(requests: Ints) -> Ints:
    """The first row of each request, in the order of the rows."""
    return np.sort(np.unique(requests, return_index=True)[1])


def _latest_of_user(columns: dict[str, Any]) -> Ints:
    """The newest row of each user, oldest first."""
    users = columns["user_id"][::-1]
    return np.sort(len(users) - 1 - np.unique(users, return_index=True)[1])
