"""A tiny simulated experiment whose truth is exact, for testing estimators over many logs."""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from longtrail.offpolicy.policies import sample_plackett_luce, softmax
from longtrail.offpolicy.reward import CrossFittedReward
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.schema import Propensity

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


def weights_of(scores):
    """Softmax of a vector or of each row."""
    values = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return values / values.sum(axis=-1, keepdims=True)


class BanditWorld:
    """Ten items, eight kinds of request, independent rows; P(click) is known for every pair, so is the truth.

    `distance` says how far the logger is from the policy under test: 0 is the same policy; at 3 weights reach thousands. `level` is the mean logit.
    """

    CONTEXTS, ITEMS = 8, 10

    def __init__(self, *, distance=1.0, level=-1.0):
        rng = np.random.default_rng(5)
        taste = rng.normal(size=(self.CONTEXTS, self.ITEMS))
        self.q_XI = expit(level + 0.8 * taste)
        self.pi_XI = weights_of(1.2 * taste)
        self.p_XI = weights_of(1.2 * taste * (1 - distance))
        self.truth = float((self.pi_XI * self.q_XI).sum(axis=1).mean())

    def draw(self, rows, seed, *, model="good"):
        """Slates and the policy. `model`: "perfect" is the truth, "good" off by .1 logits, "bad" has nothing to do with it."""
        rng = np.random.default_rng([seed, rows])
        x = rng.integers(self.CONTEXTS, size=rows)
        item = (self.p_XI[x].cumsum(axis=1) < rng.random(rows)[:, None]).sum(axis=1).clip(max=self.ITEMS - 1)
        click = (rng.random(rows) < self.q_XI[x, item]).astype(float)
        noise = np.random.default_rng(9).normal(size=self.q_XI.shape)
        logit = np.log(self.q_XI / (1 - self.q_XI))
        q = {"perfect": self.q_XI, "good": expit(logit + 0.1 * noise), "bad": expit(2 * noise)}[model]
        slates = LoggedSlates.build(
            requests=np.arange(rows),
            users=np.arange(rows),
            positions=np.ones(rows),
            rewards=click,
            propensities=self.p_XI[x, item],
            predicted=q[x, item],
        )
        return slates, EvaluatedPolicy.build("b", slates, self.pi_XI[x, item], expected=(self.pi_XI * q).sum(axis=1)[x])


class SlateWorld:
    """Lists of 3 of 5 items, one kind of request, two Plackett-Luce policies. All 60 lists can be gone through, so every truth is exact.

    clicks  "position": examination times attraction, regardless of the rest; "cascade": the user leaves after a click; "below": an attractive item
            right below takes clicks away
    """

    ITEMS, PLACES = 5, 3

    def __init__(self, clicks, *, independent_places=False):
        rng = np.random.default_rng(2)
        self.logger, self.target = rng.normal(size=self.ITEMS) * 0.6, rng.normal(size=self.ITEMS) * 0.9
        items = np.indices((self.ITEMS,) * self.PLACES).reshape(self.PLACES, -1).T
        self.lists_LK = items if independent_places else items[[len(set(row)) == self.PLACES for row in items.tolist()]]
        self.conditional = {name: self._conditional(scores, independent_places) for name, scores in (("p", self.logger), ("pi", self.target))}
        chance = {name: values.prod(axis=1) for name, values in self.conditional.items()}
        self.p_L = chance["p"] / chance["p"].sum()
        self.marginal = {}
        for name, chance_L in chance.items():
            of_item = np.stack([np.bincount(self.lists_LK[:, k], weights=chance_L, minlength=self.ITEMS) for k in range(self.PLACES)])
            self.marginal[name] = of_item[np.arange(self.PLACES), self.lists_LK]
        self.attraction = np.array([0.7, 0.15, 0.5, 0.3, 0.05])
        self.examined = np.array([1.0, 0.7, 0.5])
        active = self.examined * self.attraction[self.lists_LK]
        if clicks == "cascade":
            active = active * np.concatenate([np.ones((len(active), 1)), np.cumprod(1 - active, axis=1)[:, :-1]], axis=1)
        elif clicks == "below":
            active = active * np.concatenate([1 - self.attraction[self.lists_LK[:, 1:]], np.ones((len(active), 1))], axis=1)
        self.rate_LK = active
        self.clicks = clicks
        self.truth = float(chance["pi"] @ self.rate_LK.mean(axis=1))
        self.logged_rate = float(chance["p"] @ self.rate_LK.mean(axis=1))

    def _conditional(self, scores, independent_places):
        weight_LK = np.exp(scores)[self.lists_LK]
        taken = 0.0 if independent_places else np.concatenate([np.zeros((len(weight_LK), 1)), weight_LK.cumsum(axis=1)[:, :-1]], axis=1)
        return weight_LK / (np.exp(scores).sum() - taken)

    def draw_lists(self, requests, seed):
        """[R] numbers of lists and [R, K] clicks."""
        rng = np.random.default_rng([seed, requests])
        chosen = np.searchsorted(self.p_L.cumsum()[:-1], rng.random(requests))
        clicks = rng.random((requests, self.PLACES)) < self.rate_LK[chosen]
        if self.clicks == "cascade":  # rate_LK is the chance of a click at k and of none above
            uniform = rng.random(requests)
            reached = self.rate_LK[chosen].cumsum(axis=1)
            clicks = (uniform[:, None] < reached) & (uniform[:, None] >= reached - self.rate_LK[chosen])
        return chosen, clicks.astype(float)

    def draw(self, requests, seed, *, kind=Propensity.CONDITIONAL, independent_places=False):
        """Slates and the policy under test; ten lists a user."""
        chosen, clicks = self.draw_lists(requests, seed)
        columns = self.conditional if kind is Propensity.CONDITIONAL else self.marginal
        request = np.repeat(np.arange(requests), self.PLACES)
        slates = LoggedSlates.build(
            requests=request,
            users=request // 10,
            positions=np.tile(np.arange(1, self.PLACES + 1), requests),
            rewards=clicks.ravel(),
            propensities=columns["p"][chosen].ravel(),
            kind=kind,
            independent_places=independent_places,
        )
        return slates, EvaluatedPolicy.build("target", slates, np.minimum(columns["pi"][chosen], 1.0).ravel())
