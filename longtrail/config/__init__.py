"""params.yaml as strict typed objects: an unknown key or a bad value is an error that names it. The one place settings are described.

Nothing here imports torch or a data-frame library, so that every command can read its settings at once.
"""

from longtrail.config.base import Settings
from longtrail.config.data import (
    Dataset,
    EventColumns,
    EventLogDataset,
    FeatureSettings,
    IngestSettings,
    MovieLensDataset,
    OpenBanditDataset,
    SplitSettings,
    ValidationSettings,
    WorldDataset,
)
from longtrail.config.guarding import GateSettings, StopSettings, StoreSettings
from longtrail.config.judging import ABTestSettings, EvaluationSettings, SelectionSettings, StageSelection
from longtrail.config.observing import LogSettings
from longtrail.config.ranking_models import (
    DIENSettings,
    DINSettings,
    ETASettings,
    IFASettings,
    MeanPoolingSettings,
    PopularityRankerSettings,
    RankerModel,
    RankerSettings,
    SAMSettings,
    SDIMSettings,
    SIMSettings,
    TWINSettings,
    TwoStageSettings,
)
from longtrail.config.retrieval import RetrievalSettings
from longtrail.config.retrieval_models import (
    BERT4RecSettings,
    EncoderSettings,
    GRU4RecSettings,
    MarkovSettings,
    PopularityRetrieverSettings,
    RetrieverModel,
    SASRecSettings,
    TransformerSettings,
)
from longtrail.config.serving import ServingSettings
from longtrail.config.slots import AttentionSettings, BlossomSettings, DenseItemsSettings, FullAttentionSettings, ItemsSettings, RecJPQItemsSettings
from longtrail.config.whole import ClusterSettings, Config, Model, PipelineSettings, TrainingSettings, load_config, parse_config

__all__ = [
    "ABTestSettings",
    "AttentionSettings",
    "BERT4RecSettings",
    "BlossomSettings",
    "ClusterSettings",
    "Config",
    "DIENSettings",
    "DINSettings",
    "Dataset",
    "DenseItemsSettings",
    "ETASettings",
    "EncoderSettings",
    "EvaluationSettings",
    "EventColumns",
    "EventLogDataset",
    "FeatureSettings",
    "FullAttentionSettings",
    "GRU4RecSettings",
    "GateSettings",
    "IFASettings",
    "IngestSettings",
    "ItemsSettings",
    "LogSettings",
    "MarkovSettings",
    "MeanPoolingSettings",
    "Model",
    "MovieLensDataset",
    "OpenBanditDataset",
    "PipelineSettings",
    "PopularityRankerSettings",
    "PopularityRetrieverSettings",
    "RankerModel",
    "RankerSettings",
    "RecJPQItemsSettings",
    "RetrievalSettings",
    "RetrieverModel",
    "SAMSettings",
    "SASRecSettings",
    "SDIMSettings",
    "SIMSettings",
    "SelectionSettings",
    "ServingSettings",
    "Settings",
    "SplitSettings",
    "StageSelection",
    "StopSettings",
    "StoreSettings",
    "TWINSettings",
    "TrainingSettings",
    "TransformerSettings",
    "TwoStageSettings",
    "ValidationSettings",
    "WorldDataset",
    "load_config",
    "parse_config",
]
