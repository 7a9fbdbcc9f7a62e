"""The arms of a live experiment: what makes a personal list, and who is shown which.

A user's arm is drawn by weighted rendezvous hashing (Thaler & Ravishankar 1998; the weights: Schindler & Schomaker 2005): each arm gets a number
-ln(u) / share, u in (0, 1) a hash of (salt, arm, user), and the smallest wins. Nothing is stored, so the arm is the same in every process and after
every restart; and when one arm's share changes and the others keep their proportions, only users who must move do, to or from that arm.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longtrail.config import BestDraw, Draw, EpsilonGreedyDraw, ServingSettings
from longtrail.models.store import LoadedModel
from serving.artifacts import Artifacts
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


class Assignment:
    """User to name. `shares` are by name and need not add up to 1; the names and `salt` make the hash."""

    def __init__(self, shares: Mapping[str, float], salt: str) -> None:
        self.shares = {name: share for name, share in shares.items() if share > 0}
        if not self.shares:
            raise ValueError(f"shares {dict(shares)}: expected one above 0")
        # An arm's name holds no zero byte, so that no salt and name read like another salt and name.
        self._keys = [(name, share, hashlib.blake2b(f"{salt}\0{name}".encode()).digest()) for name, share in self.shares.items()]
        self._only = self._keys[0][0] if len(self._keys) == 1 else None

    def of(self, user_key: str) -> str:
        if self._only is not None:
            return self._only
        user = user_key.encode("utf-8", "surrogatepass")
        return min(self._keys, key=lambda arm: -math.log(_uniform(user, arm[2])) / arm[1])[0]


def _uniform(user: bytes, key: bytes) -> float:
    """In (0, 1), 53 bits."""
    return ((int.from_bytes(hashlib.blake2b(user, key=key, digest_size=8).digest()) >> 11) + 0.5) * 2.0**-53


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
    )


def list_policy(draw: Draw | None, settings: ServingSettings) -> ListPolicy:
    """None: Plackett-Luce as `explore_temperature` says, 0 being the best list."""
    if draw is None:
        return Exploring(settings.explore_temperature) if settings.explore_temperature > 0 else Best()
    if isinstance(draw, EpsilonGreedyDraw):
        return EpsilonGreedy(draw.epsilon)
    return Best() if isinstance(draw, BestDraw) else Exploring(draw.temperature)
