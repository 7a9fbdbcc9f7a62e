"""Threads that run compiled kernels side by side: Python's own, which need no threading library, survive callers in many threads, and can be made
anew after a fork."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_lock = Lock()


def run_all(tasks: Sequence[Callable[[], Any]]) -> None:
    """Run all tasks, the first one in this thread, and with it those that no other thread has begun by then. Raises what a task raised."""
    if len(tasks) == 1:
        tasks[0]()
        return
    key = (os.getpid(), len(tasks) - 1)
    pool = _pools.get(key)
    if pool is None:
        with _lock:
            pool = _pools.setdefault(key, ThreadPoolExecutor(key[1], thread_name_prefix="longtrail-search"))
    waiting = [pool.submit(task) for task in tasks[1:]]
    tasks[0]()
    for task, future in zip(tasks[1:], waiting, strict=True):
        if future.cancel():  # on a busy machine nobody has woken up for it
            task()
        else:
            future.result()


def cuts(total: int, parts: int) -> list[tuple[int, int]]:
    """`total` in at most `parts` runs of nearly equal length, none empty (one run where total is 0)."""
    parts = max(1, min(parts, total))
    return [(total * p // parts, total * (p + 1) // parts) for p in range(parts)]
