"""Feature folders to batches of tensors: what models are trained and judged on."""

from longtrail.examples.features import FeatureSet
from longtrail.examples.ranking import RankingBatch, RankingBatches
from longtrail.examples.retrieval import SequenceBatch, SequenceBatches, TargetBatch, TargetBatches, seen_items
from longtrail.examples.tensors import candidate_tensors, context_tensors, history_tensors

__all__ = [
    "FeatureSet",
    "RankingBatch",
    "RankingBatches",
    "SequenceBatch",
    "SequenceBatches",
    "TargetBatch",
    "TargetBatches",
    "candidate_tensors",
    "context_tensors",
    "history_tensors",
    "seen_items",
]
