"""Times in messages and of options."""

import time
from datetime import UTC, datetime, timedelta, timezone

import pytest

from longtrail.times import iso, micros


def test_times_are_dates_in_utc_exact_to_the_microsecond() -> None:
    assert iso(889_237_269_000_000) == "1998-03-07T02:21:09+00:00"
    assert iso(889_237_269_000_001) == "1998-03-07T02:21:09.000001+00:00"
    assert iso(-1) == "1969-12-31T23:59:59.999999+00:00"


def test_a_time_that_no_date_can_hold_is_told_with_its_unit() -> None:
    assert iso(2**62) == f"{2**62} µs since 1970"


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kolkata"])
def test_a_time_without_a_zone_is_utc_wherever_the_machine_stands(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert micros(datetime(1998, 3, 7, 2, 21, 9)) == micros(datetime(1998, 3, 7, 2, 21, 9, tzinfo=UTC)) == 889_237_269_000_000
        assert micros(datetime(1998, 3, 7, 4, 21, 9, 1, tzinfo=timezone(timedelta(hours=2)))) == 889_237_269_000_001
    finally:
        monkeypatch.undo()
        time.tzset()
