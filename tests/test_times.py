"""Times in messages."""

from longtrail.times import iso


def test_times_are_dates_in_utc_exact_to_the_microsecond() -> None:
    assert iso(889_237_269_000_000) == "1998-03-07T02:21:09+00:00"
    assert iso(889_237_269_000_001) == "1998-03-07T02:21:09.000001+00:00"
    assert iso(-1) == "1969-12-31T23:59:59.999999+00:00"


def test_a_time_that_no_date_can_hold_is_told_with_its_unit() -> None:
    assert iso(2**62) == f"{2**62} µs since 1970"
