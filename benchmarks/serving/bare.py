"""The same model without the service: a FastAPI application of a few lines, as one would write it first. No log, no propensities, no limits.

    LONGTRAIL_BARE=BENTO:STATE:MODEL uvicorn --factory benchmarks.serving.bare:application

MODEL is `packaged`, the Bento's ranker, or `tiled_din`, a DIN that copies the history to every candidate, as its paper is usually coded.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.ranker_latency import tiled_din_attention
from features.online import OnlineFeatures
from longtrail.config import DINSettings
from longtrail.models.rankers.din import DIN
from longtrail.models.store import LoadedModel, ModelCard
from serving.artifacts import Artifacts
from serving.clock import now
from serving.scoring import Scorer
from serving.user_read import read_user
from serving.user_states import attach_states


class RankRequest(BaseModel):
    user_id: str
    candidates: list[str]


def application() -> FastAPI:
    bento, state, model = os.environ["LONGTRAIL_BARE"].split(":")
    artifacts = Artifacts.open(Path(bento) / "src" / "artifacts")
    torch.set_num_threads(artifacts.settings.threads)
    online = OnlineFeatures(artifacts.snapshot, state=Path(state) / "online" / artifacts.manifest.lineage.features[:16])
    scorer = _scorer(artifacts, artifacts.ranker if model == "packaged" else _tiled_din(artifacts))
    attach_states([scorer], artifacts.catalogue, online, artifacts.folder)
    users, catalogue = artifacts.users, artifacts.catalogue
    service = FastAPI()

    @service.post("/rank")
    def rank(request: RankRequest) -> dict[str, Any]:
        items_C = np.array([catalogue.id_of(key) for key in request.candidates], np.int64)
        read = read_user(online, scorer, users[request.user_id], retrieval=False)
        statistics = scorer.item_statistics(items_C[None])
        logits_C = scorer.logits(read.history, read.totals_1, read.statistics, items_C[None], statistics, np.array([now()]), state=read.state)[0]
        order = np.argsort(-logits_C)
        scores = (1 / (1 + np.exp(-logits_C[order]))).tolist()
        return {"items": [{"item_id": request.candidates[place], "score": score} for place, score in zip(order.tolist(), scores, strict=True)]}

    @service.get("/readyz")
    def ready() -> str:
        return "ready"

    return service


def _scorer(artifacts: Artifacts, ranker: LoadedModel) -> Scorer:
    prior = artifacts.manifest.prior_click_rate
    return Scorer(retriever=artifacts.retriever, ranker=ranker, catalogue=artifacts.catalogue, prior_click_rate=prior, index=artifacts.index)


def _tiled_din(artifacts: Artifacts) -> LoadedModel:
    manifest, packaged = artifacts.manifest, artifacts.ranker.card.settings
    settings = DINSettings(max_history=getattr(packaged, "max_history", 1))
    torch.manual_seed(0)
    module = DIN(settings, manifest.sizes).eval()
    module.attention.forward = partial(tiled_din_attention, module.attention)  # type: ignore[method-assign]
    card = ModelCard(name="din", settings=settings, sizes=manifest.sizes, actions=manifest.actions, prior_click_rate=manifest.prior_click_rate)
    return LoadedModel(module=module, card=card)
