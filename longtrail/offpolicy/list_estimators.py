"""Estimators that tell lists from single items, and replay. Notation: `estimators.py`.

What each assumes of clicks and of the propensities' kind is what they differ in; each refuses logs on which it would be wrong whatever users did.
"""

import numpy as np
from numpy.typing import NDArray

from longtrail.offpolicy.estimators import ROWS, Columns, Estimator, Terms, linearised, needs_conditional
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.schema import Propensity

Floats = NDArray[np.float64]

PLACES = 10  # our choice: places with a normaliser of their own; those further down share the last
ONE_ITEM = "every request shows one item: this is the same as inverse propensity"


class ItemPosition(Estimator):
    """Σ v_k r / N with marginal propensities: independent IPS, the item-position model (Li et al., KDD 2018).

    Right where a click depends on the item and its position alone: with cascades it is not. Marginal means P(item at this position) over all lists;
    on conditional propensities it would be biased even so, since the items above decide what is left to show: they are refused.
    """

    name, title = "item_position", "item-position"
    assumes = "A click depends on the item and its position alone, whatever else the list shows."

    def refuses(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> str | None:
        if not slates.lists:
            return ONE_ITEM
        if slates.kind is Propensity.CONDITIONAL and not slates.independent_places:
            return "the propensities are conditional on the items above; expected marginal ones, P(item at this position)"
        return None

    def columns(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> dict[str, Floats]:
        return {"n": policy.ratios_N * slates.rewards_N}


class Independent(Estimator):
    """Σ v_k r / N with conditional propensities: each place judged by itself below the *logger's* items above it. For contrast only.

    That is the policy's rate only where the items above change neither what the policy would choose next nor the click.
    """

    name, title = "independent", "independent"
    assumes = "What stands above changes neither what is chosen next nor the click: seldom so."
    contrast = True

    def refuses(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> str | None:
        if not slates.lists:
            return ONE_ITEM
        if slates.kind is not Propensity.CONDITIONAL:
            return "the propensities are marginal: see item-position"
        return None

    def columns(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> dict[str, Floats]:
        return {"n": policy.ratios_N * slates.rewards_N}


class SlateIPS(Estimator):
    """Σ w_{1:K} r / N: the whole list's ratio for each of its rows (the standard IPS of McInerney et al., KDD 2020).

    Right however clicks depend on other items of the list, further down too; the highest variance of all.
    """

    name, title = "slate_ips", "whole-list inverse propensity"
    assumes = "Propensities are right and the logger could show every list that the policy would. Nothing about clicks."

    def refuses(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> str | None:
        return needs_conditional(slates) if slates.lists else ONE_ITEM

    def columns(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> dict[str, Floats]:
        return {"n": policy.weights_N[slates.bottom_N] * slates.rewards_N}


class RewardInteraction(Estimator):
    """Σ_k (N_k / N) · Σ w_{1:k} r / Σ w_{1:k}, sums over the N_k rows at place k: RIPS (McInerney et al., KDD 2020), each place normalised by itself.

    The paper multiplies and normalises place after place, which is the same when all lists are equally long; its shortening of long products is left
    out. A sum of ratios, given as one linearised at the log's totals.
    """

    name, title = "reward_interaction", "reward-interaction"
    assumes = "As inverse propensity; a small bias at each place that vanishes with more rows."

    def refuses(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> str | None:
        return needs_conditional(slates) if slates.lists else ONE_ITEM

    def columns(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> dict[str, Floats]:
        columns = {}
        clicks = policy.weights_N * slates.rewards_N
        place_N = np.minimum(slates.places_N, PLACES - 1)
        for place in range(PLACES):
            at = place_N == place
            columns[f"n{place}"], columns[f"d{place}"], columns[f"c{place}"] = at * clicks, at * policy.weights_N, at.astype(np.float64)
        return columns

    def finish(self, sums_U: Columns) -> Terms:
        used = [place for place in range(PLACES) if sums_U[f"c{place}"].any()]
        return linearised([(sums_U[f"n{k}"], sums_U[f"d{k}"]) for k in used], sums_U[ROWS], [sums_U[f"c{k}"] for k in used])


class PseudoInverse(Estimator):
    """Σ W r / N, one weight a list: W = q_πᵀ Γ⁺ 1_list, for clicks that add up over (item, place) (Swaminathan et al., NIPS 2017).

    Γ holds the logger's joint probabilities of pairs of (item, place), q_π the policy's marginal ones. `EvaluatedPolicy.list_weights_N` are such
    weights (`pseudo_inverse.py` makes them for small candidate sets). Without them: where places are chosen independently, W = 1 + Σ_k (v_k − 1).
    Right only if the *list's* expected clicks are a sum of what each item at its place brings: with cascades they are not.
    """

    name, title = "pseudo_inverse", "pseudo-inverse"
    assumes = "A list's expected clicks are the sum of what each item brings at its place."

    def refuses(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> str | None:
        if not slates.lists:
            return ONE_ITEM
        if policy.list_weights_N is None and not slates.independent_places:
            return "needs lists whose places were chosen independently (declare it), or candidate sets small enough to list all that could be shown"
        return None

    def columns(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> dict[str, Floats]:
        if policy.list_weights_N is not None:
            return {"n": policy.list_weights_N * slates.rewards_N}
        excess_R = np.bincount(slates.requests_N, weights=policy.ratios_N - 1.0)
        return {"n": (1.0 + excess_R)[slates.requests_N] * slates.rewards_N}


class Replay(Estimator):
    """Σ over accepted rows r / accepted rows: replay (Li et al., WSDM 2011), for logs of a uniform policy.

    A row is accepted where the policy would have shown what the log shows down to it. A deterministic policy accepts where its choice was logged; a
    stochastic one draws: row accepted when u < Π π down to the row, u uniform, one a request, a function of its number alone, so that a log is always
    judged alike and two policies share their luck. Unbiased given that some row is accepted; needs no weights, and wastes most of the log.
    """

    name, title = "replay", "replay"
    assumes = "The logger showed every candidate with the same chance, and as many candidates in each request."

    def columns(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> dict[str, Floats]:
        """n and d; `odd` counts rows whose propensity is not that of others at their place, `p` and `pp` tell whether blocks of the log differ."""
        chance_N = slates.down_the_list(policy.probabilities_N)
        accepted = (_uniform(slates.requests_N + slates.first_request) < chance_N).astype(np.float64)
        top_N = np.where(slates.places_N == 0, slates.propensities_N, 0.0)
        return {"n": accepted * slates.rewards_N, "d": accepted, "odd": _uneven(slates), "p": top_N, "pp": top_N**2, "c": top_N > 0}

    def finish(self, sums_U: Columns) -> Terms:
        p, pp, requests = (float(sums_U[name].sum()) for name in ("p", "pp", "c"))
        if sums_U["odd"].any() or pp * requests > p * p * (1 + 1e-9):
            return Terms.refused("the log is not uniform: its propensities differ at a place")
        return Terms(sums_U["n"], sums_U["d"])


def _uneven(slates: LoggedSlates) -> Floats:
    """[N] 1 where the propensity is not the one of the first row at the same place."""
    if slates.lists:
        _, first, place_N = np.unique(slates.places_N, return_index=True, return_inverse=True)
        reference_N = slates.propensities_N[first][place_N]
    else:
        reference_N = np.broadcast_to(slates.propensities_N[0], slates.places_N.shape)
    return (np.abs(slates.propensities_N - reference_N) > 1e-6 * reference_N).astype(np.float64)


def _uniform(numbers_N: NDArray[np.int64]) -> Floats:
    """[N] in (0, 1), a function of each number: SplitMix64's finaliser (Steele et al., OOPSLA 2014)."""
    word = (numbers_N.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word = word ^ (word >> np.uint64(31))
    return ((word >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
