"""Functions compiled by numba at their first call and kept on disk.

numba compiles anew where the function's own file has changed; of the code that is drawn into it from other modules it knows nothing. So each
module of kernels has a `MADE_WITH`: the files of this package that its kernels are made with, this one among them, and their SHA-256 (16 digits).
A test holds the one to the other, so that whoever changes such a file changes the modules that use it.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numba


def kernel(function: Callable) -> Any:
    """Compiled at its first call, without the interpreter's lock; kept on disk where a folder for it can be written."""
    with contextlib.suppress(RuntimeError):  # numba finds no such folder: compiled again in each process
        return numba.njit(nogil=True, cache=True)(function)
    return numba.njit(nogil=True)(function)
