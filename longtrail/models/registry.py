"""One table of names: (stage, kind) → class. A new model is a file, its settings in longtrail/config/ and a line here; a notebook may add its own."""

from typing import Any

from torch import nn

from longtrail.errors import ModelError
from longtrail.models.contracts import Sizes
from longtrail.models.encoders.bert4rec import BERT4Rec
from longtrail.models.encoders.gru4rec import GRU4Rec
from longtrail.models.encoders.markov import Markov
from longtrail.models.encoders.popularity import PopularityRetriever
from longtrail.models.encoders.sasrec import SASRec
from longtrail.models.rankers.dien import DIEN
from longtrail.models.rankers.din import DIN
from longtrail.models.rankers.eta import ETA
from longtrail.models.rankers.ifa import IFA
from longtrail.models.rankers.mean_pooling import MeanPooling
from longtrail.models.rankers.popularity import PopularityRanker
from longtrail.models.rankers.sam import SAM
from longtrail.models.rankers.sdim import SDIM
from longtrail.models.rankers.sim import SIM
from longtrail.models.rankers.twin import TWIN

MODELS: dict[tuple[str, str], type[nn.Module]] = {
    ("retrieval", "popularity"): PopularityRetriever,
    ("retrieval", "markov"): Markov,
    ("retrieval", "sasrec"): SASRec,
    ("retrieval", "bert4rec"): BERT4Rec,
    ("retrieval", "gru4rec"): GRU4Rec,
    ("ranking", "popularity"): PopularityRanker,
    ("ranking", "mean_pooling"): MeanPooling,
    ("ranking", "din"): DIN,
    ("ranking", "dien"): DIEN,
    ("ranking", "sim"): SIM,
    ("ranking", "eta"): ETA,
    ("ranking", "twin"): TWIN,
    ("ranking", "sdim"): SDIM,
    ("ranking", "sam"): SAM,
    ("ranking", "ifa"): IFA,
}


def build_model(settings: Any, sizes: Sizes) -> nn.Module:
    """The model of `settings` (one of longtrail.config's model settings) with fresh weights from torch's global generator.

    Raises ModelError for a kind that is not in the table, and for a model that does not keep its settings, which whoever asks it reads
    `max_history` of: without them it would be shown the newest event alone.
    """
    model = MODELS.get((settings.stage, settings.kind))
    if model is None:
        names = ", ".join(f"{stage} {kind}" for stage, kind in MODELS)
        raise ModelError(f"no {settings.stage} model of kind {settings.kind!r}; expected one of: {names}")
    built = model(settings, sizes)
    if getattr(built, "settings", None) is not settings:
        raise ModelError(f"{model.__name__} does not keep the settings it is made of; expected self.settings = settings in its __init__")
    return built
