"""The time, as everything here is stamped with it."""

import time


def now() -> int:
    """UTC microseconds since 1970."""
    return time.time_ns() // 1_000
