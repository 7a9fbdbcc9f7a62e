"""An arm: what makes a personal list, and the name under which it stands in answers, logs and metrics."""

from dataclasses import dataclass

from serving.policies import ListPolicy
from serving.scoring import Scorer


@dataclass(frozen=True, kw_only=True)
class Arm:
    """`model` names the ranker of `scorer`; `policy` draws the list from its logits."""

    name: str
    model: str
    scorer: Scorer
    policy: ListPolicy
