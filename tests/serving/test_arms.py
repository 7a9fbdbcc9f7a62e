"""Who gets which arm: uniform, sticky, and nobody moves without need. And what policies draw, against every list that there is."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from longtrail.config import parse_config
from longtrail.errors import ConfigError
from longtrail.offpolicy.policies import EpsilonGreedy as OfflineEpsilonGreedy
from serving.assignment import Assignment
from serving.policies import Best, EpsilonGreedy, Exploring

USERS = [f"user-{number}" for number in range(8_000)]


def test_users_are_assigned_as_the_shares_say() -> None:
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    counts = {name: 0 for name in shares}
    for user in USERS:
        counts[Assignment(shares, "spring").of(user)] += 1
    for name, share in shares.items():
        assert abs(counts[name] - share * len(USERS)) < 4 * np.sqrt(len(USERS) * share * (1 - share)), counts


def test_another_salt_is_an_independent_assignment() -> None:
    shares = {"a": 0.5, "b": 0.5}
    one, two = Assignment(shares, "spring"), Assignment(shares, "summer")
    same = sum(one.of(user) == two.of(user) for user in USERS)
    assert abs(same - len(USERS) / 2) < 4 * np.sqrt(len(USERS) / 4)


def test_an_arm_is_the_same_in_every_process() -> None:
    code = (
        "from serving.assignment import Assignment\n"
        "print(''.join(Assignment({'a': 0.5, 'b': 0.3, 'c': 0.2}, 'spring').of(f'user-{number}') for number in range(40)), end='')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2], env={"PYTHONHASHSEED": "7"}
    )
    found = "".join(Assignment({"c": 0.2, "b": 0.3, "a": 0.5}, "spring").of(user) for user in USERS[:40])
    # Frozen: were it to change, every running experiment would be dealt anew.
    assert found == run.stdout == FROZEN


FROZEN = "abcbcaabccbcbaabbaabcaaabbcaabccaacaaaab"


@pytest.mark.parametrize("steps", [(0.0, 0.01, 0.05, 0.25, 0.5), (0.5, 0.25, 0.0)])
def test_a_step_moves_only_who_must_move(steps: tuple[float, ...]) -> None:
    """The canary's share changes, the others keep their proportions: nobody moves between the others, and all moves go one way."""
    before: list[str] | None = None
    for last, share in zip((None, *steps), steps, strict=False):
        assignment = Assignment({"canary": share, "a": 0.7 * (1 - share), "b": 0.3 * (1 - share)}, "s")
        after = [assignment.of(user) for user in USERS]
        if before is not None and last is not None:
            moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
            assert all((new if share > last else old) == "canary" for old, new in moved)
            expected = abs(share - last)
            assert abs(len(moved) - expected * len(USERS)) < 4 * np.sqrt(len(USERS) * expected * (1 - expected)) + 1
        before = after


def test_an_assignment_to_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one above 0"):
        Assignment({"a": 0.0}, "")


# ---------------------------------------------------------------- policies


@pytest.mark.parametrize("epsilon", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("places", [1, 3, 9])
def test_epsilon_greedy_states_the_exact_chance_of_every_list(epsilon: float, places: int) -> None:
    """Against enumeration: each list's chance, place by place, of "any of those left with epsilon, else the best left"."""
    logits = np.array([0.3, 2.0, -1.0, 2.0])  # a tie: the first of the two is the best

    def chance(chosen: tuple[int, ...]) -> list[float]:
        left, found = [0, 1, 2, 3], []
        for column in chosen:
            best = min(left, key=lambda c: (-float(logits[c]), c))
            found.append(epsilon / len(left) + (1 - epsilon) * float(column == best))
            left.remove(column)
        return found

    lists = {chosen: chance(chosen) for chosen in itertools.permutations(range(4), min(places, 4))}
    assert abs(sum(np.prod(stated) for stated in lists.values()) - 1) < 1e-12
    random, draws, counts = np.random.default_rng(places), 1_500, dict.fromkeys(lists, 0)
    for _ in range(draws):
        columns, propensities = EpsilonGreedy(epsilon).draw(logits, places, random)
        chosen = tuple(columns.tolist())
        assert propensities.tolist() == pytest.approx(lists[chosen], abs=1e-12)
        counts[chosen] += 1
    for chosen, stated in lists.items():
        probability = float(np.prod(stated))
        assert abs(counts[chosen] / draws - probability) <= 4.5 * np.sqrt(probability * (1 - probability) / draws), chosen
    shown = np.array([next(iter(lists))])
    offline = OfflineEpsilonGreedy(epsilon).probabilities(logits[None, :], np.array([4]), shown)[0]
    assert offline[np.arange(shown.shape[1]), shown[0]].tolist() == pytest.approx(lists[tuple(shown[0].tolist())])


def test_policies_are_named_with_their_parameters_and_handle_one_candidate() -> None:
    random = np.random.default_rng(0)
    for policy, name in ((Best(), "best"), (Exploring(0.25), "plackett_luce(0.25)"), (EpsilonGreedy(0.1), "epsilon_greedy(0.1)")):
        assert policy.name == name
        columns, propensities = policy.draw(np.array([0.5]), 10, random)
        assert columns.tolist() == [0] and propensities.tolist() == pytest.approx([1.0])


# ---------------------------------------------------------------- settings

ARMS = {"old": {"share": 0.5}, "new": {"model": "champion", "share": 0.5, "policy": {"kind": "best"}}}


@pytest.mark.parametrize(
    ("experiment", "says"),
    [
        ({"arms": {"old": {"share": 0.5}}}, "add up to 0.5; expected 1"),
        ({"arms": {"old": {}, "new": {"share": 1.0}}}, r"arms\.old\.share: missing"),
        ({"arms": {"popularity_fallback": {"share": 1.0}}}, "expected another"),
        ({"arms": {"a b": {"share": 1.0}}}, "arms"),
        ({"arms": {"old": {"share": 1.0, "model": "nothing"}}}, "names the model 'nothing'"),
        ({"arms": {"old": {"share": 1.0, "model": "sasrec"}}}, "names the model 'sasrec'"),
        ({"shadow": {"model": "nothing"}}, "names the model 'nothing'"),
        ({"arms": ARMS, "canary": {"arm": "newest"}}, "canary.arm is 'newest'"),
        ({"arms": ARMS, "canary": {"arm": "new"}}, r"arms\.new\.share: expected none"),
        ({"arms": {"old": {"share": 1.0}, "new": {}}, "canary": {"arm": "new", "steps": [0.1, 0.1]}}, "larger than the one before"),
        ({"arms": {"old": {"share": 1.0, "policy": {"kind": "epsilon_greedy", "epsilon": 2}}}}, "epsilon"),
        ({"sault": "x"}, "unknown key"),
    ],
)
def test_settings_that_make_no_experiment_are_named(experiment: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config({"serving": {"experiment": experiment}})


def test_settings_of_an_experiment() -> None:
    config = parse_config({"serving": {"experiment": {"arms": {"old": {"share": 1.0}, "new": {"model": "din"}}, "canary": {"arm": "new"}}}})
    assert config.serving.experiment.models == ("packaged", "din") and config.serving.experiment.canary is not None
    assert parse_config({}).serving.experiment.arms == {}
