"""Times as people read them."""

from datetime import UTC, datetime, timedelta


def iso(micros: int) -> str:
    """`1998-03-07T02:14:29+00:00` of UTC µs since 1970, exact to the µs; the number itself where no date can hold it (year 10,000)."""
    try:
        return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(micros))).isoformat()
    except OverflowError:
        return f"{micros} µs since 1970"


def micros(moment: datetime) -> int:
    """UTC µs since 1970; a moment without a zone is UTC, whatever zone the machine stands in."""
    return round(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() * 1e6)
