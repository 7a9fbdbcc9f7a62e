"""Bentos to measure, and users with histories of given lengths in their online stores. L events of a history."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

from longtrail.files import read_json, write_json

IFA_READS = 2_000_000  # events of the longest history: above all lengths measured
KEPT = 1_000  # events of a user in the online store of the IFA Bento, which needs no more than its exact branch
_BATCH = 10_000  # events appended at once


@dataclass(frozen=True, kw_only=True)
class Bento:
    """A packaged Bento, its state folder, and the keys of users by the length of their histories."""

    folder: Path
    state: Path
    users: dict[int, list[str]]

    @property
    def artifacts(self) -> Path:
        return self.folder / "src" / "artifacts"


def make_bento(folder: Path, ranker: str, lengths: Sequence[int], *, items: int, threads: int, redis_address: str | None) -> Bento:
    """ingest, build_features and package on a small simulated log with an untrained `ranker` (sam or ifa), then histories that grow to `lengths`.

    The arithmetic of an untrained model is that of a trained one; select and ab_test are answered for.
    """
    import torch

    from components.build_features import build_features
    from components.ingest import ingest
    from components.package import package
    from longtrail.config import load_config
    from longtrail.examples import FeatureSet
    from longtrail.models.registry import build_model
    from longtrail.models.store import ModelCard, save_model

    folder.mkdir(parents=True)
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump(_params(ranker, max(lengths), items=items, threads=threads, redis_address=redis_address)))
    tables, validation, features, champion, report = (folder / name for name in ("tables", "validation", "features", "champion", "ab"))
    ingest(params=file, tables=tables)
    write_json(validation / "result.json", {"success": True})
    build_features(tables=tables, validation=validation, params=file, features=features)
    opened, settings = FeatureSet.open(features), load_config(file).models
    for target, name in (("retriever", "sasrec"), ("ranker", ranker), ("incumbent", "popularity")):
        torch.manual_seed(0)
        module = build_model(settings[name], opened.sizes)
        card = ModelCard(name=name, settings=settings[name], sizes=opened.sizes, actions=opened.actions, prior_click_rate=opened.prior_click_rate)
        save_model(champion / target, module, card, {})
    write_json(champion / "selection.json", {"retriever": {"name": "sasrec"}, "ranker": {"name": ranker}, "incumbent": "popularity"})
    write_json(report / "report.json", {"verdict": "win"})
    package(champion=champion, features=features, tables=tables, validation=validation, report=report, params=file, bento=folder / "bento")
    return Bento(folder=folder / "bento", state=folder / "state", users=grow(folder / "bento", folder / "state", lengths))


def _params(ranker: str, longest: int, *, items: int, threads: int, redis_address: str | None) -> dict[str, Any]:
    kept = min(longest, KEPT) if ranker == "ifa" else longest
    models = {
        "sasrec": {"stage": "retrieval", "kind": "sasrec", "max_history": 50},
        "popularity": {"stage": "ranking", "kind": "popularity"},
        "sam": {"stage": "ranking", "kind": "sam", "max_history": longest},
        "ifa": {"stage": "ranking", "kind": "ifa", "max_history": IFA_READS, "recent_events": 100},
    }
    chosen = {name: models[name] for name in ("sasrec", "popularity", ranker)}
    stage = {"max_latency_ms": 100, "max_bytes": 10**10}
    online = {} if redis_address is None else {"online_store": "redis", "redis_address": redis_address}
    return {
        "dataset": {"kind": "world", "users": 60, "items": items, "events_per_user": 60, "requests_per_user": 3, "candidates": 20},
        "models": chosen,
        "pipeline": {"models": list(chosen)},
        "features": {"online_history_length": kept, **online},
        "selection": {"incumbent": "popularity", "retrieval": {"metric": "ndcg@10", **stage}, "ranking": {"metric": "gauc", **stage}},
        "serving": {"threads": threads, "max_candidates": 1_000},
    }


def grow(bento: Path, state: Path, lengths: Sequence[int], *, each: int = 3) -> dict[int, list[str]]:
    """Append events to `each` users a length until they have exactly so many, as the service does for /events: history first, then user states.

    So a history of a million events exists as a state and as its newest events. Users by length.
    """
    from features.online import OnlineFeatures
    from longtrail.catalogue import Catalogue
    from longtrail.models.store import load_model
    from serving.artifacts import _users
    from serving.user_states import attach_states

    artifacts = bento / "src" / "artifacts"
    manifest = read_json(artifacts / "manifest.json")
    keys = {number: key for key, number in _users(artifacts / "users.parquet", manifest["users"]).items()}
    online = OnlineFeatures(artifacts / "feast", state=state / "online" / manifest["lineage"]["features"][:16])
    catalogue = Catalogue.open(artifacts / "catalogue.parquet")
    scorer = SimpleNamespace(model=load_model(artifacts / "ranker"), states=None)
    states = attach_states([scorer], catalogue, online, artifacts)
    totals = dict(zip(keys, online.read(list(keys), 0).totals_B.tolist(), strict=True))
    rng, free, grown = np.random.default_rng(0), sorted(keys, key=lambda user: totals[user]), {}
    for length in sorted(lengths):
        chosen = [user for user in free if totals[user] <= length][:each]
        if len(chosen) < each:
            raise SystemExit(f"{len(chosen)} users have at most {length} events; expected {each}: fewer lengths, or longer ones")
        free = [user for user in free if user not in chosen]
        for user in chosen:
            for many in _parts(length - totals[user]):
                columns = [np.full(many, user), rng.integers(1, catalogue.items + 1, many), rng.integers(1, len(manifest["actions"]) + 1, many)]
                columns.append(np.sort(rng.integers(10**15, 17 * 10**14, many)))
                places = online.append_events(*columns)
                for kept in states:
                    kept.refresh([user]) if places[0] == totals[user] + 1 else kept.on_events(*columns, places)  # type: ignore[call-arg]
        grown[length] = [keys[user] for user in chosen]
    for kept in states:
        kept.refresh([user for user, key in keys.items() if any(key in users for users in grown.values())])
    return grown


def _parts(many: int) -> list[int]:
    return [_BATCH] * (many // _BATCH) + ([many % _BATCH] if many % _BATCH else [])


def make_requests(bento: Bento, *, length: int, candidates: int, count: int, seed: int = 0) -> list[bytes]:
    """Bodies of /rank: users with `length` events, candidates drawn anew for each."""
    import pyarrow.parquet as pq

    items = np.array(pq.read_table(bento.artifacts / "catalogue.parquet", columns=["item_key"])["item_key"].to_pylist())
    rng, users = np.random.default_rng(seed), bento.users[length]
    return [
        json.dumps({"user_id": users[i % len(users)], "candidates": rng.choice(items, candidates, replace=False).tolist()}).encode()
        for i in range(count)
    ]
