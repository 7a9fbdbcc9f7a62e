"""A tiny simulated experiment whose truth is exact, for testing estimators over many logs."""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from longtrail.offpolicy.policies import sample_plackett_luce, softmax
from longtrail.offpolicy.reward import CrossFittedReward
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates

ITEMS = 6


@dataclass
class Draw:
    slates: LoggedSlates
    a: EvaluatedPolicy
    b: EvaluatedPolicy


class OneItemWorld:
    """Requests of a finite population of users; each user has a taste (so rows within a user are alike); one of 6 items is shown.

    The population is infinite: users are drawn anew for each log, so the truth is an expectation over users, computed by quadrature.
    """

    def __init__(self, *, level: float = -1.0, gap: float = 0.7, user_sd: float = 0.7, sharpness: float = 1.0, spread: float = 1.0):
        self.quality = spread * np.linspace(-1.0, 1.0, ITEMS)
        self.level, self.user_sd = level, user_sd
        rng = np.random.default_rng(7)
        self.logger = sharpness * 0.5 * rng.normal(size=ITEMS)
        self.scores = {"a": self.logger * 0.7, "b": self.logger * 0.7 + gap * self.quality}
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        rate_I = (expit(level + user_sd * nodes[:, None] + self.quality) * weights[:, None]).sum(axis=0) / weights.sum()
        ones = np.array([ITEMS])
        self.truth = {name: float((softmax(s[None], ones)[0] * rate_I).sum()) for name, s in self.scores.items()}

    def draw(self, requests: int, users: int, seed: int, *, modelled: bool = True, bad_model: bool = False) -> Draw:
        rng = np.random.default_rng(seed)
        user_R = rng.integers(users, size=requests)
        taste_R = self.user_sd * rng.normal(size=users)[user_R]
        lengths = np.full(requests, ITEMS)
        shown, propensities = sample_plackett_luce(np.tile(self.logger, (requests, 1)), lengths, 1, rng)
        item = shown[:, 0]
        clicks = (rng.random(requests) < expit(self.level + taste_R + self.quality[item])).astype(float)
        slates = LoggedSlates.build(
            requests=np.arange(requests), users=user_R, positions=np.ones(requests), rewards=clicks, propensities=propensities[:, 0]
        )
        features = np.eye(ITEMS)
        model = None
        if modelled:
            if bad_model:
                predicted_RI = np.tile(rng.random(ITEMS), (requests, 1))
            else:
                model = CrossFittedReward.fit(features[item], clicks, user_R)
                predicted_RI = model.predict(np.broadcast_to(features, (requests, ITEMS, ITEMS)), user_R)
            slates = slates.with_predictions(predicted_RI[np.arange(requests), item])
        policies = []
        for name, scores in self.scores.items():
            pi = softmax(scores[None], np.array([ITEMS]))[0]
            expected = (predicted_RI * pi).sum(axis=1) if modelled else None
            policies.append(EvaluatedPolicy.build(name, slates, pi[item], expected=expected))
        return Draw(slates, *policies)
