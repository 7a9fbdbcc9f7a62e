"""Estimators of lists in worlds whose every list can be gone through: which of them is right where, and which is not."""

import numpy as np
import pytest

from longtrail.errors import EvaluationError
from longtrail.offpolicy.columns import EVERY
from longtrail.offpolicy.lists import LoggedLists, evaluate_policies
from longtrail.offpolicy.policies import PlackettLuce
from longtrail.offpolicy.pseudo_inverse import pseudo_inverse_weights
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.schema import Propensity
from tests.offpolicy.worlds import SlateWorld

LOGS = 150


def estimates(world, names, *, requests=1_000, logs=LOGS, **options):
    draws = [world.draw(requests, seed, **options) for seed in range(logs)]
    return {name: np.array([EVERY[name].terms(*draw).value for draw in draws]) for name in names}


def wrong_by(values, truth):
    """How many of its standard errors the mean is from the truth."""
    return abs(values.mean() - truth) / (values.std() / np.sqrt(len(values)))


@pytest.mark.parametrize(
    ("clicks", "right", "wrong"),
    [
        ("position", ("ips", "snips", "slate_ips", "reward_interaction"), ("independent",)),
        ("cascade", ("ips", "snips", "slate_ips", "reward_interaction"), ("independent",)),
        ("below", ("slate_ips",), ("ips", "snips", "reward_interaction", "independent")),
    ],
)
def test_on_conditional_propensities(clicks, right, wrong):
    """150 logs of 1,000 lists: right ones within 4 standard errors of the truth (9 figures: once in 1,700 seeds), the others 8 or more away."""
    world = SlateWorld(clicks)
    found = estimates(world, (*right, *wrong))
    assert all(wrong_by(found[name], world.truth) < 4 for name in right)
    assert all(wrong_by(found[name], world.truth) > 8 for name in wrong)
    if clicks == "cascade":
        error = {name: np.sqrt(((values - world.truth) ** 2).mean()) for name, values in found.items()}
        assert error["ips"] < 0.5 * error["independent"] and error["reward_interaction"] < error["ips"] < error["slate_ips"]


@pytest.mark.parametrize(("clicks", "right"), [("position", True), ("cascade", False), ("below", False)])
def test_item_position_on_marginal_propensities(clicks, right):
    """Right where a click depends on the item and its place alone, with far less variance than products; wrong with cascades."""
    world = SlateWorld(clicks)
    found = estimates(world, ("item_position",), kind=Propensity.MARGINAL)["item_position"]
    assert (wrong_by(found, world.truth) < 4) if right else (wrong_by(found, world.truth) > 8)
    if right:
        assert found.std() < 0.6 * estimates(world, ("ips",))["ips"].std()


def test_item_position_would_be_biased_on_conditional_propensities():
    """What the refusal protects from: the same ratios taken place by place from conditional propensities, even where clicks are independent."""
    world = SlateWorld("position")
    marginal = estimates(world, ("item_position",), kind=Propensity.MARGINAL)["item_position"]
    conditional = estimates(world, ("independent",))["independent"]
    assert abs(conditional.mean() - world.truth) > 10 * abs(marginal.mean() - world.truth)


@pytest.mark.parametrize("clicks", ["position", "cascade"])
def test_products_of_marginal_propensities_are_right_only_where_places_are_independent(clicks):
    """With items that may repeat, places are independent and conditional is marginal: the product is right on a "marginal" column. Without, it is
    not, and that is why it must be declared."""
    apart, dependent = SlateWorld(clicks, independent_places=True), SlateWorld(clicks)
    options = {"kind": Propensity.MARGINAL, "independent_places": True}
    assert wrong_by(estimates(apart, ("ips",), **options)["ips"], apart.truth) < 4
    assert wrong_by(estimates(dependent, ("ips",), **options)["ips"], dependent.truth) > 8


def test_pseudo_inverse_of_independent_places():
    """W = 1 + Σ (v_k − 1): right where a list's clicks add up over items and places, with less variance than the whole list's ratio."""
    world = SlateWorld("position", independent_places=True)
    found = estimates(world, ("pseudo_inverse", "slate_ips"), kind=Propensity.MARGINAL, independent_places=True)
    assert wrong_by(found["pseudo_inverse"], world.truth) < 4
    assert found["pseudo_inverse"].std() < 0.7 * found["slate_ips"].std()
    cascade = SlateWorld("cascade", independent_places=True)
    wrong = estimates(cascade, ("pseudo_inverse",), kind=Propensity.MARGINAL, independent_places=True)["pseudo_inverse"]
    assert wrong_by(wrong, cascade.truth) > 8


def test_pseudo_inverse_weights_of_plackett_luce():
    """Exact unbiasedness, no sampling: Σ_lists p(list) W(list) clicks(list) is the truth in the additive world, not in the cascade.
    And with a logger that draws places independently the general weights equal the short formula's."""
    for clicks, right in (("position", True), ("cascade", False)):
        world = SlateWorld(clicks)
        count = len(world.lists_LK)
        weights = pseudo_inverse_weights(
            PlackettLuce(), np.tile(world.logger, (count, 1)), PlackettLuce(), np.tile(world.target, (count, 1)), world.lists_LK
        )
        value = float(world.p_L @ (weights * world.rate_LK.mean(axis=1)))
        assert (abs(value - world.truth) < 1e-9) == right
        assert float(world.p_L @ weights) == pytest.approx(1.0)
    with pytest.raises(EvaluationError, match="at most"):
        pseudo_inverse_weights(PlackettLuce(), np.zeros((1, 30)), PlackettLuce(), np.zeros((1, 30)), np.arange(4)[None])


def lists_of(world, requests, seed, kind=Propensity.CONDITIONAL, logger=True):
    chosen, clicks = world.draw_lists(requests, seed)
    columns = world.conditional if kind is Propensity.CONDITIONAL else world.marginal
    return LoggedLists(
        users_R=np.arange(requests) // 5,
        lengths_R=np.full(requests, world.ITEMS),
        shown_RK=world.lists_LK[chosen],
        positions_RK=np.tile([1, 2, 3], (requests, 1)),
        rewards_RK=clicks,
        propensities_RK=columns["p"][chosen],
        features_RCF=np.tile(np.eye(world.ITEMS), (requests, 1, 1)),
        kind=kind,
        logger_RC=np.tile(world.logger, (requests, 1)) if logger else None,
    )


def test_from_candidates_every_estimator_is_near_the_truth():
    """40 logs of 600 lists with candidates, a fitted reward model. Means within 4 standard errors of the truth; the model pays."""
    world = SlateWorld("position")
    found = {}
    for seed in range(40):
        lists = lists_of(world, 600, seed)
        slates, policies = evaluate_policies(lists, {"target": np.tile(world.target, (600, 1))})
        np.testing.assert_allclose(policies["target"].probabilities_N, world.conditional["pi"][world.draw_lists(600, seed)[0]].ravel(), atol=1e-12)
        for name in ("ips", "dr", "sndr", "pseudo_inverse", "switch_dr", "shrinkage_dr", "dm"):
            found.setdefault(name, []).append(EVERY[name].terms(slates, policies["target"]).value)
    values = {name: np.array(of_logs) for name, of_logs in found.items()}
    for name in ("ips", "dr", "sndr", "pseudo_inverse"):
        assert wrong_by(values[name], world.truth) < 4, name
    for name in ("switch_dr", "shrinkage_dr", "dm"):  # leaning on a regression of item and position: nearly right
        assert abs(values[name].mean() - world.truth) < 0.015, name
        assert values[name].std() < values["ips"].std()


def test_marginal_propensities_with_candidates_are_drawn():
    """The policy's marginal probabilities come from draws, and their mean is the exact one."""
    world, requests = SlateWorld("position"), 3_000
    lists = lists_of(world, requests, 0, Propensity.MARGINAL, logger=False)
    slates, policies = evaluate_policies(lists, {"target": np.tile(world.target, (requests, 1))})
    exact = world.marginal["pi"][world.draw_lists(requests, 0)[0]].ravel()
    drawn = policies["target"].probabilities_N
    assert abs((drawn - exact).mean()) < 4 * (drawn - exact).std() / np.sqrt(len(exact)) + 1e-6 and np.abs(drawn - exact).max() < 0.2
    assert EVERY["item_position"].terms(slates, policies["target"]).value == pytest.approx(world.truth, abs=0.03)


def test_direct_values_are_those_of_lists_drawn_from_the_policy():
    """E_π[q̂] at each place against going through every list."""
    world = SlateWorld("position")
    lists = lists_of(world, 2_000, 1)
    slates, policies = evaluate_policies(lists, {"target": np.tile(world.target, (2_000, 1))})
    direct_RK = policies["target"].direct_N.reshape(-1, 3)
    expected_RK = policies["target"].expected_N.reshape(-1, 3)
    np.testing.assert_allclose(direct_RK[:, 0], expected_RK[:, 0])
    chosen, _ = world.draw_lists(2_000, 1)
    cell_RK = world.lists_LK[chosen] * 3 + np.arange(3)  # the model knows the item and the place: its mean value of each, over folds
    q_C = np.bincount(cell_RK.ravel(), weights=slates.predicted_N) / np.bincount(cell_RK.ravel())
    chance_L = world.conditional["pi"].prod(axis=1)
    exact_K = chance_L @ q_C[world.lists_LK * 3 + np.arange(3)]
    np.testing.assert_allclose(direct_RK.mean(axis=0), exact_K, atol=0.005)
    assert abs(expected_RK[:, 2].mean() - exact_K[2]) > 0.01  # below the logger's items it is another thing


def test_lists_that_differ_in_length():
    """Lists of one, two, three and twelve in one log: every estimator of lists is defined, and a logger judged by itself gets its rate."""
    rng = np.random.default_rng(0)
    lengths = np.array([3, 3, 2, 1, 1, 1, 1, 12])
    request = np.repeat(np.arange(8), lengths)
    position = np.concatenate([np.arange(1, n + 1) for n in lengths])
    reward, p = rng.integers(0, 2, len(request)).astype(float), rng.uniform(0.2, 1.0, len(request))
    slates = LoggedSlates.build(requests=request, users=request, positions=position, rewards=reward, propensities=p)
    policy = EvaluatedPolicy.build("same", slates, p)
    for name in ("ips", "snips", "slate_ips", "reward_interaction", "independent", "clipped_ips"):
        assert EVERY[name].terms(slates, policy).value == pytest.approx(reward.mean()), name
