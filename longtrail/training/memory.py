"""Freed memory stays with the process while it trains on a CPU.

glibc gives blocks above 32 MB back to the system when they are freed, and every step of training asks for the same ones again: at L = 1,000, B = 256,
D = 32 each is 33 MB, and a third of a step of SAM or DIN went into the kernel's fresh, zeroed pages.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of mallopt's, from malloc.h
_DEFAULTS = {_MMAP_MAX: 65_536, _TRIM_THRESHOLD: 128 * 1024}
_KEPT = 1 << 30  # bytes at the top of the heap that may lie idle


@contextmanager
def freed_memory_is_kept() -> Iterator[None]:
    """Within it, free() returns little to the system; afterwards all that is idle is returned. Does nothing where the C library is not glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        for name, value in _DEFAULTS.items():
            libc.mallopt(name, value)
        libc.malloc_trim(0)
