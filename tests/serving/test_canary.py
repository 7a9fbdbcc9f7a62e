"""The canary on simulated streams: it steps up, it rolls back for each guardrail, it remembers; and how often it cries wolf."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longtrail.config import CanarySettings
from longtrail.errors import StateError
from serving.canary import DEATHS, FOLDER, OUTCOMES, RECORD, Canary, main, period_error, read_record
from serving.event_records import LoggedEvent
from serving.guardrails import Outcomes, judge, pack, unpack

MINUTE = 60_000_000
SETTINGS: dict[str, Any] = {"arm": "new", "steps": [0.1, 0.5], "hold_requests": 100, "hold_minutes": 2.0, "max_p99_ms": 50.0}


@dataclass
class Service:
    """Users who come back, each in the canary when their number says so; `seconds`, `fails` and `clicks` are told whether it is the canary's."""

    folder: Path
    seconds: Callable[[bool], float] = lambda canary: 0.001
    fails: Callable[[bool], float] = lambda canary: 0.0
    clicks: Callable[[bool], float] = lambda canary: 0.1
    settings: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))
    fingerprint: str = "one"
    time: int = 1_000_000_000_000
    shares: list[float] = field(default_factory=list)
    told: list[tuple[str, str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random, self.answered = np.random.default_rng(5), 0
        self.places = self.random.random(400)  # a user is in the canary where this is below its share
        self.canary = self.open()

    def open(self) -> Canary:
        return Canary(
            CanarySettings(**self.settings),
            self.folder,
            self.fingerprint,
            set_share=self.shares.append,
            changed=lambda *what: self.told.append(what),
            clock=lambda: self.time,
        )

    def minute(self, requests: int = 300) -> None:
        """So many requests, their clicks, and a look at the end."""
        for user in self.random.integers(0, len(self.places), requests).tolist():
            self.answered += 1
            mine, request = bool(self.places[user] < self.shares[-1]), f"r{self.answered}"
            failed = bool(self.random.random() < self.fails(mine))
            self.canary.answered(user, mine, self.seconds(mine), failed, request, ["a", "b", "c"])
            if not failed and self.random.random() < self.clicks(mine):
                self.canary.on_logged([click(request, "b"), click(request, "b"), click(request, "z"), click(None, "a")])
        self.time += MINUTE
        self.canary.look()

    def until_it_ends(self, minutes: int = 60) -> Canary:
        for _ in range(minutes):
            if self.canary.record.phase != "ramping":
                break
            self.minute()
        return self.canary


def click(request: str | None, item: str) -> LoggedEvent:
    return LoggedEvent(event_id=None, user="u", item=item, timestamp=1, action="click", value=None, request=request, written_at=1)


def test_it_steps_up_while_the_guardrails_hold(tmp_path: Path) -> None:
    service = Service(tmp_path)
    assert service.shares == [0.1]
    service.minute()
    assert service.shares == [0.1], "too early, and too few requests"
    record = service.until_it_ends().record
    assert record.phase == "full" and service.shares == [0.1, 0.5] and record.share == 0.5
    assert [move.outcome for move in record.moves] == ["started", "stepped"] and "every guardrail held" in record.moves[1].reason
    assert record.moves[1].time - record.moves[0].time >= 2 * MINUTE
    assert service.told == [("stepped", "new", 0.5)] and read_record(tmp_path) == record


BROKEN = [
    ("errors", {"fails": lambda canary: 0.2 * canary}),
    ("p99", {"seconds": lambda canary: 0.06 if canary else 0.001}),
    ("clicks", {"clicks": lambda canary: 0.05 if canary else 0.35}),
]


@pytest.mark.parametrize(("guardrail", "behaviour"), BROKEN)
def test_each_guardrail_rolls_it_back_for_good(tmp_path: Path, guardrail: str, behaviour: dict[str, Any]) -> None:
    service = Service(tmp_path, settings=SETTINGS | {"steps": [0.3, 0.5], "hold_requests": 50_000}, **behaviour)
    record = service.until_it_ends().record
    assert record.phase == "rolled_back" and service.shares == [0.3, 0.0] and record.share == 0.0
    assert record.moves[-1].reason.startswith(f"{guardrail}: ") and service.told[-1] == ("rolled_back", "new", 0.0)
    service.canary.close()
    service.canary = service.open()
    service.minute()
    assert service.shares[-1] == 0.0 and service.canary.record.phase == "rolled_back", "not tried again after a restart"
    service.canary.close()
    service.fingerprint = "another Bento"
    assert service.open().record.phase == "ramping" and service.shares[-1] == 0.3


@pytest.mark.parametrize("behaviour", [{"fails": lambda canary: 0.5}, {"seconds": lambda canary: 0.2}])
def test_what_befalls_everybody_is_not_the_canarys_doing(tmp_path: Path, behaviour: dict[str, Any]) -> None:
    service = Service(tmp_path, settings=SETTINGS | {"steps": [0.3], "hold_minutes": 15.0}, **behaviour)
    assert service.until_it_ends().record.phase == "full"


def test_a_restart_goes_on_where_it_stood(tmp_path: Path) -> None:
    service = Service(tmp_path)
    while service.canary.record.step == 0:
        service.minute()
    service.minute()
    service.canary.close()
    before, outcomes = service.canary.record.model_copy(deep=True), service.canary._sides
    again = service.open()
    assert again.record.model_dump(exclude={"running"}) == before.model_dump(exclude={"running"}) and service.shares[-1] == 0.5
    assert again._sides == outcomes and again._sides[True].requests > 50 and sum(c for _, c in again._sides[True].users.values()) > 3
    # Outcomes that are lost or torn: the share stays, the period is a new one, with its own part of the stated error.
    again.close()
    (tmp_path / FOLDER / OUTCOMES).write_bytes(b"PK\x03\x04 torn")
    torn = service.open()
    assert torn.record.share == 0.5 and torn.record.period == before.period + 1 and torn._sides[True].requests == 0


def test_a_process_that_dies_again_and_again_is_a_broken_guardrail(tmp_path: Path) -> None:
    service = Service(tmp_path)
    for death in range(1, DEATHS + 1):
        canary = service.open()  # without close
        assert canary.record.deaths == death
    assert service.shares[-1] == 0.0 and "died 3 times" in canary.record.moves[-1].reason


def test_an_operator_rolls_it_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = Service(tmp_path)
    main(tmp_path, roll_back="complaints from support")
    assert '"phase": "ramping"' in capsys.readouterr().out
    service.minute(1)
    assert service.shares == [0.1, 0.0] and "by hand: complaints from support" in service.canary.record.moves[-1].reason
    with pytest.raises(SystemExit, match="no canary was served"):
        main(tmp_path / "elsewhere")


def test_a_damaged_record_is_named_and_not_guessed(tmp_path: Path) -> None:
    Service(tmp_path)
    (tmp_path / FOLDER / RECORD).write_text('{"phase": "ramping"')
    with pytest.raises(StateError, match=r"canary\.json: not the record of a canary"):
        Service(tmp_path)


def test_a_look_that_cannot_be_written_leaves_the_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(tmp_path, fails=lambda canary: 0.9 * canary)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("serving.canary.atomic_file", full)
    with pytest.raises(OSError, match="disk full"):
        for _ in range(30):
            service.minute()
    assert service.shares == [0.1]


def test_its_thread_looks_by_itself(tmp_path: Path) -> None:
    service = Service(tmp_path, settings=SETTINGS | {"check_seconds": 0.01, "hold_minutes": 0.001, "hold_requests": 1, "steps": [0.2, 0.4]})
    service.time += MINUTE
    service.canary.start()
    service.canary.answered(1, True, 0.001, False, "r", ["a"])
    for _ in range(500):
        if service.shares[-1] == 0.4:
            break
        time.sleep(0.01)
    service.canary.close()
    assert service.shares == [0.2, 0.4] and service.told[0] == ("started", "new", 0.2)


def test_outcomes_survive_packing() -> None:
    outcomes = Outcomes()
    assert unpack(pack(outcomes)) == outcomes
    outcomes.request(failed=True, slow=False)
    outcomes.shown(7, 5)
    outcomes.clicked(7)
    outcomes.clicked(8)  # never shown anything
    assert unpack(pack(outcomes)) == outcomes and outcomes.users == {7: [5, 1]}


def test_the_error_of_all_periods_is_the_stated_one() -> None:
    assert 0.0499 < sum(period_error(period, 0.95) for period in range(10_000)) <= 0.05


def looks(random: np.random.Generator, *, seen: int, error: float, canary_clicks: float = 0.08) -> bool:
    """Whether a stream of returning users is ever accused, over `seen` looks: failures and slow requests exactly at their limits."""
    settings, users = CanarySettings(**SETTINGS), 500
    tastes = random.beta(1.0, 9.0, users)  # people differ
    inside, sides = random.random(users) < 0.4, (Outcomes(), Outcomes())
    for _ in range(seen):
        visitors = random.integers(0, users, 250)
        for side, outcomes in enumerate(sides):
            mine = visitors[inside[visitors] == bool(side)]
            outcomes.failed += bytes((random.random(len(mine)) < settings.max_error_rate).astype(np.uint8))
            outcomes.slow += bytes((random.random(len(mine)) < 0.01).astype(np.uint8))
            rate = tastes[mine] * (canary_clicks / 0.08 if side else 1.0)
            clicked = random.binomial(4, np.minimum(rate, 1.0))
            for user, clicks in zip(mine.tolist(), clicked.tolist(), strict=True):
                outcomes.shown(user, 4)
                outcomes.users[user][1] += clicks
        if judge(*sides, settings, error=error) is not None:
            return True
    return False


def test_it_cries_wolf_no_more_often_than_stated() -> None:
    """A stated error of 10 %, 8 looks at each of 50 streams without any difference; and streams that lose most of their clicks are found."""
    error, streams = 0.1, 50
    false = sum(looks(np.random.default_rng(seed), seen=8, error=error) for seed in range(streams))
    assert false <= error * streams, f"{false} of {streams}"
    found = sum(looks(np.random.default_rng(seed), seen=12, error=error, canary_clicks=0.03) for seed in range(6))
    assert found >= 5, f"{found} of 6"
