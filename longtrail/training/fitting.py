"""From a features folder and settings to a trained model: what `components.train` and a notebook call."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from longtrail.config import MarkovSettings, Model, PopularityRankerSettings, PopularityRetrieverSettings, TrainingSettings, at_most
from longtrail.errors import ConfigError
from longtrail.examples import FeatureSet, RankingBatches, SequenceBatches, TargetBatch, TargetBatches, seen_items
from longtrail.models.registry import build_model
from longtrail.models.store import LoadedModel, ModelCard, weights_hash
from longtrail.retrieval.index import Exclusion
from longtrail.training.averaging import WeightAverage
from longtrail.training.checkpoints import Checkpoint, Progress, Row, fingerprint
from longtrail.training.continuing import continue_from
from longtrail.training.interactions import transition_counts
from longtrail.training.learners import Learner, RankerLearner, RetrieverLearner
from longtrail.training.loop import EpochKeeper, Report, accelerator_of, make_trainer, reproducible, torchrun_shape
from longtrail.training.memory import freed_memory_is_kept
from longtrail.training.pieces import Pieces
from longtrail.training.starts import start

RANKING_METRICS = ("auc", "gauc")  # those a ranker can be stopped by: larger is better
RETRIEVAL_METRIC = "ndcg@10"

ELSEWHERE = ("devices", "accumulate")  # settings of where and in what pieces a step is computed: a run may be resumed with others

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many numbers of a model training moves, and how many it leaves as they were built (Blossom's selectors). Buffers are neither."""

    trained: int
    frozen: int

    @classmethod
    def of(cls, module: nn.Module) -> "Parameters":
        counts = {learns: sum(p.numel() for p in module.parameters() if p.requires_grad == learns) for learns in (True, False)}
        return cls(trained=counts[True], frozen=counts[False])

    def __str__(self) -> str:
        return f"{self.trained:,} parameters" + (f" and {self.frozen:,} frozen ones" if self.frozen else "")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training gives back. `checkpoint` is to be removed once the model is safe on disk."""

    module: nn.Module  # with the best epoch's weights, in eval mode on the CPU
    metric: str
    value: float | None  # the metric on the validation split; None where it cannot be computed there
    best_epoch: int  # 0: fitted, not trained; or no epoch was better than the weights that training went on from
    curve: list[Row]  # a row an epoch, and one of epoch 0 where training went on from another model's weights
    resumed_from: int  # epochs that an earlier, killed run had done
    checkpoint: Checkpoint | None

    def summary(self) -> str:
        """One line for a log."""
        value = "unknown" if self.value is None else f"{self.value:.4f}"
        return f"valid {self.metric} {value}" + (f" at epoch {self.best_epoch} of {self.epochs}" if self.epochs else "")

    def loaded(self, features: FeatureSet, name: str = "model") -> LoadedModel:
        """The model with its card, as `evaluate` and `save_model` take it. `features`: those that it was trained on."""
        settings: Any = self.module.settings
        card = ModelCard(name=name, settings=settings, sizes=features.sizes, actions=features.actions, prior_click_rate=features.prior_click_rate)
        return LoadedModel(module=self.module, card=card)

    @property
    def parameters(self) -> "Parameters":
        """How many the model has."""
        return Parameters.of(self.module)

    @property
    def epochs(self) -> int:
        """Trained, those of earlier, killed runs included."""
        return int(self.curve[-1]["epoch"]) if self.curve else 0


def train(
    features: FeatureSet,
    settings: Model,
    name: str,
    training: TrainingSettings,
    *,
    data: str,
    checkpoints: Path | None = None,
    ranking_metric: str = "auc",
    report: Report | None = None,
    since: int | None = None,
    previous: LoadedModel | None = None,
    exclude_seen: bool = True,
) -> Trained:
    """Train the model that `settings` describe.

    `data` identifies the features (the hash of features.json). With `checkpoints`, an interrupted training of the same name, settings and data
    is resumed from there, and on a CPU ends with bit-equal weights. `ranking_metric` is what a ranker is stopped by: "auc" or "gauc", and "auc" for
    any other. `report` is called with each row of the curve, those of an earlier run
    included. With `since` (UTC µs) only what happened from then on is learnt from; with `previous` training goes on from that model's weights,
    which learnt from an earlier state of the same log, and which are kept where no epoch is better on the validation split. Popularity and the
    Markov chain are counts of the training period. A retriever is judged as it will search: `exclude_seen` is that of RetrievalSettings.

    Raises HistoryError where the features have nothing to learn from, ConfigError where a GPU is asked for and absent, DivergedError where the
    loss stops being a number.
    """
    metric = RETRIEVAL_METRIC
    if settings.stage == "ranking":
        metric = ranking_metric if ranking_metric in RANKING_METRICS else RANKING_METRICS[0]
    with reproducible(training):
        module = build_model(settings, features.sizes)
        if isinstance(settings, PopularityRankerSettings | PopularityRetrieverSettings | MarkovSettings):
            if (torchrun_shape() or (1, 1)) != (1, 1):
                raise ConfigError(f"{name}: counts need no training on several processes; expected to be run without torchrun")
            return _fit_counts(module, features, settings, training, metric=metric, report=report, exclude_seen=exclude_seen)
        parts: dict[str, Any] = {
            "settings": settings.model_dump(mode="json"),
            "training": training.model_dump(mode="json", exclude=set(ELSEWHERE)),
            "data": data,
            "metric": metric,
            **({} if since is None else {"since": since}),
            **({} if previous is None else {"previous": weights_hash(previous.module)}),
            **({"exclude_seen": False} if settings.stage == "retrieval" and not exclude_seen else {}),
        }
        checkpoint = Checkpoint(checkpoints, name, fingerprint(name=name, **parts)) if checkpoints is not None else None
        return _train_network(
            module, features, settings, training, metric=metric, checkpoint=checkpoint, report=report, name=name, since=since, previous=previous,
            exclude_seen=exclude_seen,
        )  # fmt: skip


def _train_network(
    module: nn.Module,
    features: FeatureSet,
    settings: Any,
    training: TrainingSettings,
    *,
    metric: str,
    checkpoint: Checkpoint | None,
    report: Report | None,
    name: str,
    since: int | None,
    previous: LoadedModel | None,
    exclude_seen: bool,
) -> Trained:
    found = checkpoint.load() if checkpoint is not None else None
    progress, weights, optimiser = found if found is not None else (Progress(), {}, {})
    learner = _learner(module, features, settings, exclude_seen)
    if found is not None:
        log.info("%s: resuming after epoch %d%s", name, progress.epochs, f", step {progress.step}" if progress.step else "")
        module.load_state_dict(weights)
        learner.optimiser_state = optimiser
    elif previous is not None:
        continue_from(module, features, previous, seed=training.seed, since=since)
    else:
        start(module, features, settings, seed=training.seed, since=since)
    resumed_from = progress.epochs
    if report is not None and is_main_process():
        for row in progress.curve:
            report(row)
    epochs = settings.max_epochs - progress.epochs
    if epochs > 0 and not progress.exhausted(settings.patience):
        batches, valid = _training_batches(features, settings, training.seed, since), _validation_batches(features, settings, training)
        batches.set_epoch(progress.epochs)
        pieces = Pieces(batches, accumulate=training.accumulate, first_step=progress.step)
        keeper = EpochKeeper(
            progress,
            checkpoint,
            pieces,
            metric=metric,
            patience=settings.patience,
            epochs=settings.max_epochs,
            seed=training.seed,
            report=report,
            checkpoint_steps=training.checkpoint_steps,
        )
        # Before the keeper, which writes down what it has made of a step.
        means = [WeightAverage(progress, settings.weight_average, training.accumulate)] if settings.weight_average else []
        goes_on = previous is not None and found is None
        trainer = make_trainer(training, [*means, keeper], epochs, first_is_shorter=progress.step > 0, judged_first=goes_on)
        log.info("%s: %s, %d steps an epoch, %s", name, Parameters.of(module), len(batches), _place(training))
        with freed_memory_is_kept():
            trainer.fit(learner, pieces.of(trainer.global_rank, trainer.world_size), valid)
    if progress.best:
        module.load_state_dict(progress.best)
    else:
        module.load_state_dict({**module.state_dict(), **progress.average})
        log.warning("%s: the validation split cannot tell %s; the last epoch's weights are kept", name, metric)
    return Trained(
        module=module.cpu().eval(),
        metric=metric,
        value=progress.best_value,
        best_epoch=progress.best_epoch if progress.best else progress.epochs,
        curve=progress.curve,
        resumed_from=resumed_from,
        checkpoint=checkpoint,
    )


def _fit_counts(
    module: Any, features: FeatureSet, settings: Any, training: TrainingSettings, *, metric: str, report: Report | None, exclude_seen: bool
) -> Trained:
    """Counts of the training period into the module's buffers, and one pass over the validation split to have a curve of one point."""
    catalogue = features.catalogue
    if isinstance(settings, MarkovSettings):
        module.count(transitions_NN=transition_counts(features), events=catalogue.train_events)
    else:
        module.fit(
            events=catalogue.train_events,
            impressions=catalogue.train_impressions,
            clicks=catalogue.train_clicks,
            prior_click_rate=features.prior_click_rate,
        )
    learner = _learner(module, features, settings, exclude_seen)
    valid = _validation_batches(features, settings, training)
    if valid is not None:
        make_trainer(training.model_copy(update={"devices": 1, "accumulate": 1}), [], 1).validate(learner, valid, verbose=False)
    row: Row = {"epoch": 0, **{f"valid_{key}": value for key, value in learner.metrics.items()}}
    if report is not None and is_main_process():
        report(row)
    return Trained(
        module=module.cpu().eval(), metric=metric, value=learner.metrics.get(metric), best_epoch=0, curve=[row], resumed_from=0, checkpoint=None
    )


_FITTED_BATCH = 256  # requests per step of the one pass a fitted model takes over the validation split
_FITTED_HISTORY = 1  # all that it reads, or more


def _learner(module: nn.Module, features: FeatureSet, settings: Any, exclude_seen: bool) -> Learner:
    if settings.stage == "ranking":
        return RankerLearner(module, settings)
    if not exclude_seen:
        return RetrieverLearner(module, settings, lambda batch: None)

    def exclude(batch: TargetBatch) -> Exclusion:
        return Exclusion(*seen_items(features, batch.users_B.cpu().numpy(), batch.history_length_B.cpu().numpy()))

    return RetrieverLearner(module, settings, exclude)


def _training_batches(features: FeatureSet, settings: Any, seed: int, since: int | None) -> Any:
    if settings.stage == "ranking":
        shape = {"max_history": settings.max_history, "batch_size": settings.batch_size, "sampled": settings.sampled_candidates}
        return RankingBatches(features, "train", **shape, seed=seed, since=since)
    return SequenceBatches(features, max_history=settings.max_history, batch_size=settings.batch_size, seed=seed, since=since)


def _validation_batches(features: FeatureSet, settings: Any, training: TrainingSettings) -> Any:
    table = features.examples("valid") if settings.stage == "ranking" else features.targets("valid")
    if table.num_rows == 0:
        return None
    shape = {"max_history": getattr(settings, "max_history", _FITTED_HISTORY), "batch_size": getattr(settings, "batch_size", _FITTED_BATCH)}
    if settings.stage == "ranking":
        return RankingBatches(features, "valid", **shape)
    return TargetBatches(features, "valid", **shape, max_per_user=at_most(training.validation_targets_per_user))


def is_main_process() -> bool:
    """False in the processes that Lightning starts beside the first for training on several devices."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def _place(training: TrainingSettings) -> str:
    accelerator, devices, precision = accelerator_of(training)
    machines = (torchrun_shape() or (devices, 1))[1]
    return f"{f'{machines} × ' if machines > 1 else ''}{devices} × {accelerator}, {precision}"
