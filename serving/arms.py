"""The arms of a live experiment: what makes a personal list, and who is shown which."""

from collections.abc import Sequence
from dataclasses import dataclass

from longtrail.config import BestDraw, Draw, EpsilonGreedyDraw, ServingSettings
from longtrail.models.store import LoadedModel
from serving.artifacts import Artifacts
from serving.assignment import Assignment
from serving.policies import Best, EpsilonGreedy, Exploring, ListPolicy
from serving.scoring import Scorer


@dataclass(frozen=True, kw_only=True)
class Arm:
    """`name` stands in answers, logs and metrics; `model` names the ranker of `scorer`; `policy` draws the list from its logits.

    `share` is that of the settings, None for the canary's arm; a shadow is not `shown`.
    """

    name: str
    model: str
    scorer: Scorer
    policy: ListPolicy
    share: float | None = 1.0
    shown: bool = True


class Arms:
    """Those that are shown, in the order of the settings, and the shadow. Thread-safe."""

    def __init__(self, shown: Sequence[Arm], *, salt: str, canary: str | None = None, shadow: Arm | None = None) -> None:
        """`canary` is the arm whose share `set_canary` gives; until then it is 0."""
        self.shown = tuple(shown)
        self.shadow = shadow
        self.canary = canary
        self._named = {arm.name: arm for arm in shown}
        self._salt = salt
        self.set_canary(0.0)

    @property
    def all(self) -> tuple[Arm, ...]:
        """Those shown, then the shadow."""
        return (*self.shown, *([self.shadow] if self.shadow else []))

    @property
    def shares(self) -> dict[str, float]:
        """Of every arm that gets users now; they add up to 1."""
        return self._assignment.shares

    def set_canary(self, share: float) -> None:
        """The canary's share of all users; the other arms keep their proportions in the rest."""
        shares = {arm.name: share if arm.name == self.canary else (arm.share or 0.0) * (1 - share) for arm in self.shown}
        self._assignment = Assignment(shares if self.canary else {arm.name: arm.share or 0.0 for arm in self.shown}, self._salt)

    def of(self, user_key: str) -> Arm:
        """The user's arm."""
        return self._named[self._assignment.of(user_key)]


def load_arms(artifacts: Artifacts) -> Arms:
    """The arms of `serving.experiment`; without any, one: the packaged ranker under its own name, with all users.

    Arms of the same model share its scorer; all share the retriever, its index and the catalogue.
    """
    settings, manifest = artifacts.settings, artifacts.manifest
    scorers: dict[str, Scorer] = {}

    def arm(name: str, model: str, draw: Draw | None, share: float | None, *, shown: bool = True) -> Arm:
        ranker = manifest.ranker_of(model)
        if ranker not in scorers:
            scorers[ranker] = make_scorer(artifacts, artifacts.rankers[ranker])
        return Arm(name=name, model=ranker, scorer=scorers[ranker], policy=list_policy(draw, settings), share=share, shown=shown)

    experiment = settings.experiment
    shown = [arm(name, made.model, made.policy, made.share) for name, made in experiment.arms.items()]
    shown = shown or [arm(manifest.arm, manifest.ranker, None, 1.0)]
    shadow = arm("shadow", experiment.shadow.model, BestDraw(), 0.0, shown=False) if experiment.shadow else None
    return Arms(shown, salt=experiment.salt, canary=experiment.canary.arm if experiment.canary else None, shadow=shadow)


def make_scorer(artifacts: Artifacts, ranker: LoadedModel) -> Scorer:
    return Scorer(
        retriever=artifacts.retriever,
        ranker=ranker,
        catalogue=artifacts.catalogue,
        prior_click_rate=artifacts.manifest.prior_click_rate,
        index=artifacts.index,
        exclude_seen=artifacts.exclude_seen,
    )


def list_policy(draw: Draw | None, settings: ServingSettings) -> ListPolicy:
    """None: Plackett-Luce as `explore_temperature` says, 0 being the best list."""
    if draw is None:
        return Exploring(settings.explore_temperature) if settings.explore_temperature > 0 else Best()
    if isinstance(draw, EpsilonGreedyDraw):
        return EpsilonGreedy(draw.epsilon)
    return Best() if isinstance(draw, BestDraw) else Exploring(draw.temperature)
