"""Estimators beyond the first three: by hand on a dozen rows, and over many simulated logs as theory orders them."""

import numpy as np
import pytest

from longtrail.errors import EvaluationError
from longtrail.offpolicy.columns import EVERY, finish, judge, refusals, user_columns
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.offpolicy.sums import EXACT_USERS, UserSums
from longtrail.schema import Propensity
from tests.offpolicy.test_estimators import ABOVE, ROWS, WEIGHTS, dozen
from tests.offpolicy.worlds import BanditWorld

R = np.array([row[3] for row in ROWS])
Q = np.array([row[6] for row in ROWS])
E = np.array([row[7] for row in ROWS])
W, V = np.array(WEIGHTS), np.array([row[5] / row[4] for row in ROWS])
U = np.array(ABOVE)
DIRECT = np.linspace(0.2, 0.75, 12)


def twelve(**changes):
    slates = dozen(**changes)
    return slates, EvaluatedPolicy.build("p", slates, [row[5] for row in ROWS], expected=E, direct=DIRECT)


def test_closed_forms_on_a_dozen_rows():
    """Every estimator of lists against its formula, written out on the arrays above."""
    value = {name: EVERY[name].terms(*twelve()).value for name in ("dm", "sndr", "slate_ips", "reward_interaction", "independent")}
    assert value["dm"] == pytest.approx(DIRECT.mean())
    assert value["sndr"] == pytest.approx((W @ (R - Q)) / W.sum() + (U @ E) / U.sum())
    whole = np.array([1, 1, 1, 0, 0, 0, 0.5, 0.5, 1, 3, 2, 1])  # the ratio at the bottom of each row's list
    assert value["slate_ips"] == pytest.approx(whole @ R / 12)
    position = np.array([row[2] for row in ROWS])
    by_place = [(position == k).mean() * (W @ (R * (position == k))) / (W @ (position == k)) for k in (1, 2, 3)]
    assert value["reward_interaction"] == pytest.approx(sum(by_place))
    assert value["independent"] == pytest.approx(V @ R / 12)
    marginal = twelve(kind=Propensity.MARGINAL)
    assert EVERY["item_position"].terms(*marginal).value == pytest.approx(V @ R / 12)
    apart = twelve(kind=Propensity.MARGINAL, independent_places=True)
    lists = [[0, 1, 2], [3, 4, 5], [6, 7], [8], [9], [10], [11]]
    assert EVERY["pseudo_inverse"].terms(*apart).value == pytest.approx(sum((1 + (V[rows] - 1).sum()) * R[rows].sum() for rows in lists) / 12)


@pytest.mark.parametrize(("name", "sizes"), [("clipped_ips", (1.0, 2.0)), ("switch_dr", (0.0, 1.0, 2.0)), ("shrinkage_dr", (0.0, 1.0, 2.0))])
def test_shrinking_by_hand(name, sizes):
    """Numerators and what the shrinking took away, for each candidate; the choice is the least of variance + bias²."""
    slates, policy = twelve()
    columns = EVERY[name].columns(slates, policy)
    full = W * R if name == "clipped_ips" else DIRECT + W * (R - Q) + U * (E - DIRECT)
    for size in sizes:
        index = EVERY[name].sizes.index(size)
        shrink = {
            "clipped_ips": lambda w, size=size: np.minimum(w, size),
            "switch_dr": lambda w, size=size: np.where((w <= size) & (size > 0), w, 0.0),
            "shrinkage_dr": lambda w, size=size: np.zeros(12) if size == 0 else w * size**2 / (w**2 + size**2),
        }[name]
        made = shrink(W) * R if name == "clipped_ips" else DIRECT + shrink(W) * (R - Q) + shrink(U) * (E - DIRECT)
        np.testing.assert_allclose(columns[f"n{index}"], made[slates.order_N], atol=1e-12)
        np.testing.assert_allclose(columns[f"b{index}"], (made - full)[slates.order_N], atol=1e-12)
    np.testing.assert_allclose(columns[f"n{len(EVERY[name].sizes) - 1}"], full[slates.order_N], atol=1e-12)
    users = np.array([row[1] for row in ROWS])[slates.order_N]
    errors = []
    for index in range(len(EVERY[name].sizes)):
        sums, bias = (np.array([columns[f"{part}{index}"][users == u].sum() for u in (1, 2, 3, 4)]) for part in "nb")
        rows = np.array([(users == u).sum() for u in (1, 2, 3, 4)])
        rest = sums - sums.sum() / 12 * rows
        errors.append(4 / 3 * (rest**2).sum() / 144 + (bias.sum() / 12) ** 2)
    least = int(np.flatnonzero(np.isclose(errors, min(errors), rtol=1e-12))[-1])
    chosen = EVERY[name].terms(slates, policy)
    assert chosen.parameter == EVERY[name].sizes[least] and chosen.value == pytest.approx(columns[f"n{least}"].sum() / 12)


def test_replay_keeps_the_rows_a_policy_would_have_shown():
    """A uniform log of one item of four: a deterministic policy keeps the rows of its item, a stochastic one its share of each."""
    rng = np.random.default_rng(0)
    item, rows = rng.integers(4, size=40_000), 40_000
    click = (rng.random(rows) < np.array([0.1, 0.3, 0.5, 0.7])[item]).astype(float)
    columns = {"requests": np.arange(rows), "users": np.arange(rows), "positions": np.ones(rows), "rewards": click}
    slates = LoggedSlates.build(**columns, propensities=np.full(rows, 0.25))
    fixed = EVERY["replay"].terms(slates, EvaluatedPolicy.build("fixed", slates, (item == 2).astype(float)))
    assert fixed.denominators_N.sum() == (item == 2).sum() and fixed.value == click[item == 2].mean()
    mixed = EVERY["replay"].terms(slates, EvaluatedPolicy.build("mixed", slates, np.array([0.5, 0.5, 0.0, 0.0])[item]))
    assert mixed.value == pytest.approx(0.2, abs=0.02) and mixed.denominators_N.sum() == pytest.approx(rows / 4, rel=0.05)
    assert not mixed.denominators_N[item >= 2].any()
    uneven = LoggedSlates.build(**columns, propensities=np.where(item == 0, 0.2, 0.25))
    half = EvaluatedPolicy.build("half", uneven, np.full(rows, 0.5))
    with pytest.raises(EvaluationError, match="not uniform"):
        EVERY["replay"].terms(uneven, half)
    finished = finish(UserSums.build(uneven.users_N % 9, user_columns(uneven, half, half)))
    assert "not uniform" in finished.refused["replay"] and "replay" not in finished.estimators


def test_replay_of_lists_needs_all_that_stands_above():
    """Uniform lists of 2 of 3 items (propensities 1/3, then 1/2): accepted to the second row only where the first was."""
    rng = np.random.default_rng(1)
    requests = 20_000
    first = rng.integers(3, size=requests)
    second = (first + rng.integers(1, 3, requests)) % 3
    propensity = np.tile([1 / 3, 1 / 2], requests)
    slates = LoggedSlates.build(
        requests=np.repeat(np.arange(requests), 2), users=np.repeat(np.arange(requests), 2), positions=np.tile([1, 2], requests),
        rewards=np.zeros(2 * requests), propensities=propensity,
    )  # fmt: skip
    pi = np.stack([(first == 0) * 1.0, (second == 1) * 0.5 + 0.25], axis=1).ravel()
    accepted = EVERY["replay"].columns(slates, EvaluatedPolicy.build("p", slates, pi))["d"].reshape(-1, 2)
    assert (accepted[:, 0] == (first == 0)).all() and not accepted[first != 0].any()
    assert accepted[(first == 0) & (second == 1), 1].mean() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("names", "changes", "why"),
    [
        (("item_position",), {}, "conditional on the items above"),
        (("pseudo_inverse",), {}, "independently"),
        (("ips", "snips", "clipped_ips", "dr", "sndr", "switch_dr", "slate_ips", "reward_interaction", "replay"), {"kind": "marginal"}, "marginal"),
        (("independent",), {"kind": "marginal"}, "see item-position"),
    ],
)
def test_the_wrong_kind_of_propensity_is_refused(names, changes, why):
    slates, policy = twelve(**{name: Propensity(value) for name, value in changes.items()})
    refused = refusals(slates, policy)
    columns = user_columns(slates, policy, policy)
    for name in names:
        assert why in refused[name] and not any(column.startswith(f"{name}/") for column in columns)
        with pytest.raises(EvaluationError, match=why):
            EVERY[name].terms(slates, policy)


def test_estimators_of_lists_have_nothing_to_add_for_single_items():
    slates = dozen(ROWS[8:])
    policy = EvaluatedPolicy.build("p", slates, [row[5] for row in ROWS[8:]], expected=[row[7] for row in ROWS[8:]])
    refused = refusals(slates, policy)
    assert {name for name, why in refused.items() if "one item" in why} == {
        "slate_ips", "reward_interaction", "item_position", "independent", "pseudo_inverse",
    }  # fmt: skip
    np.testing.assert_array_equal(policy.direct_N, policy.expected_N)


def test_without_a_model_what_needs_one_is_refused():
    slates = dozen(predicted=None)
    refused = refusals(slates, EvaluatedPolicy.build("p", slates, [row[5] for row in ROWS]))
    assert set(refused) >= {"dm", "dr", "sndr", "switch_dr", "shrinkage_dr"} and "no reward model" in refused["dr"]


def test_sums_by_user_and_whole_logs_agree():
    """finish() of sums by user gives what each estimator's terms give of the whole log; linearised pairs keep value and influence."""
    slates, policy = twelve()
    other = EvaluatedPolicy.build("same", slates, [row[4] for row in ROWS], expected=Q, direct=Q)
    finished = finish(UserSums.build(slates.users_N, {**user_columns(slates, policy, other), "weight/a": policy.weights_N}))
    assert "weight/a" not in finished.sums.columns and finished.sums["naive/d"].sum() == 12
    for name in finished.estimators:
        for side, judged in (("a", policy), ("b", other)):
            terms = EVERY[name].terms(slates, judged)
            assert finished.value(name, side) == pytest.approx(terms.value), name
            by_user = np.array([terms.numerators_N[slates.users_N == u].sum() for u in finished.sums.users_U])
            np.testing.assert_allclose(finished.sums[f"{name}/{side}/n"], by_user, err_msg=name)
    assert finished.value("ips", "b") == pytest.approx(7 / 12)
    assert set(finished.tuned) == {"clipped_ips", "switch_dr", "shrinkage_dr"}
    assert judge(slates, {"p": policy, "same": other})["sndr"]["p"] == pytest.approx(finished.value("sndr", "a"))


def test_influence_of_a_sum_of_ratios_is_its_derivative():
    """Leave one user a little out: the linearised numerators say how self-normalised DR and reward-interaction move."""
    slates, policy = twelve()
    for name in ("sndr", "reward_interaction"):
        columns = {"rows": np.ones(12), **EVERY[name].columns(slates, policy)}
        sums = UserSums.build(slates.users_N, columns)
        terms = EVERY[name].finish({column: sums[column] for column in columns})
        for user in range(4):
            weight = np.ones(4)
            weight[user] += 1e-6
            moved = EVERY[name].finish({column: sums[column] * weight for column in columns}).value
            influence = (terms.numerators_N[user] - terms.value * terms.denominators_N[user]) / 12
            assert (moved - terms.value) / 1e-6 == pytest.approx(influence, abs=1e-5), name


def test_many_users_are_summed_in_groups():
    rng = np.random.default_rng(0)
    users, values = rng.integers(1, 10**9, EXACT_USERS + 2_000), rng.random(EXACT_USERS + 2_000)
    whole = UserSums.build(users, {"v": values})
    assert whole.groups is not None and whole["v"].sum() == pytest.approx(values.sum())
    half = len(users) // 2
    parts = [UserSums.build(users[part], {"v": values[part]}) for part in (slice(half), slice(half, None))]
    assert parts[0].groups is None
    for merged in (parts[0].merge(parts[1]), parts[0].merge(UserSums.build(users[half:], {"v": values[half:]}, groups=whole.groups))):
        np.testing.assert_allclose(merged.sums_UM, whole.sums_UM)
    with pytest.raises(EvaluationError, match="groups"):
        whole.merge(UserSums.build(users, {"v": values}, groups=10))


# ---------------------------------------------------------------- over many logs


def errors_of(world, names, rows, logs, **options):
    """{estimator: (bias, its standard error, root mean squared error)} over simulated logs."""
    draws = [world.draw(rows, seed, **options) for seed in range(logs)]
    found = {}
    for name in names:
        values = np.array([EVERY[name].terms(*draw).value for draw in draws]) - world.truth
        found[name] = (values.mean(), values.std() / np.sqrt(logs), np.sqrt((values**2).mean()))
    return found


UNBIASED, NEARLY = ("ips", "dr"), ("snips", "sndr")


def test_bias_and_spread_against_sample_size_and_overlap():
    """400 logs of 400 and of 3,200 rows at three overlaps, a good model. Biases within 4 of their standard errors (24 figures: once in 600 seeds);
    errors fall with √rows (by 2.83; 2.2 to 3.6 with room for heavy weights); SNIPS beats IPS, DR beats both, far loggers cost more than near ones."""
    before = {name: 0.0 for name in UNBIASED}
    for distance in (0.5, 1.0, 2.0):
        world = BanditWorld(distance=distance)
        few, many = (errors_of(world, (*UNBIASED, *NEARLY), rows, 400) for rows in (400, 3_200))
        for name in (*UNBIASED, *NEARLY):
            slack = 0.01 if name in NEARLY and distance > 1 else 0.0  # the bias of order 1/N of self-normalised estimators under poor overlap
            assert abs(few[name][0]) < 4 * few[name][1] + slack and abs(many[name][0]) < 4 * many[name][1] + slack, name
            assert 2.2 < few[name][2] / many[name][2] < 3.6, name
        for found in (few, many):
            assert found["snips"][2] < found["ips"][2] and found["dr"][2] < found["ips"][2]
        assert many["dr"][2] < many["snips"][2]
        assert all(many[name][2] > before[name] for name in UNBIASED)
        before = {name: many[name][2] for name in UNBIASED}


def test_reward_models_help_doubly_robust_and_decide_the_direct_method():
    """150 logs of 2,000 rows. The direct method is as wrong as its model; doubly robust is unbiased with any, and the better the model the nearer."""
    world, names = BanditWorld(distance=1.5), ("ips", "dm", "dr", "sndr", "switch_dr", "shrinkage_dr")
    perfect, bad = (errors_of(world, names, 2_000, 150, model=model) for model in ("perfect", "bad"))
    assert perfect["dm"][2] < 0.2 * perfect["dr"][2] and bad["dm"][2] > 2 * bad["dr"][2] and bad["dm"][0] > 10 * bad["dm"][1]
    for found in (perfect, bad):
        assert abs(found["dr"][0]) < 4 * found["dr"][1]
    assert perfect["dr"][2] < 0.9 * bad["dr"][2] and perfect["dr"][2] < perfect["ips"][2]
    for name in ("switch_dr", "shrinkage_dr"):  # never far behind DR, and well ahead of it where the model is right
        assert perfect[name][2] < 0.9 * perfect["dr"][2] and bad[name][2] < 1.1 * bad["dr"][2]


def test_shrinking_pays_under_poor_overlap():
    """100 logs of 500 rows with weights in the hundreds: the tuned estimators' errors are far below those of what they shrink."""
    found = errors_of(BanditWorld(distance=3.0), ("ips", "clipped_ips", "dr", "switch_dr", "shrinkage_dr"), 500, 100)
    assert found["clipped_ips"][2] < 0.6 * found["ips"][2]
    assert found["switch_dr"][2] < 0.8 * found["dr"][2] and found["shrinkage_dr"][2] < 0.6 * found["dr"][2]
