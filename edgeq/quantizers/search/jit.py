"""How the search functions are compiled: without the interpreter lock, and kept on disk.

Numba's cache does not notice a change in another file, so the kernels are kept in a folder named
after the text of all quantizers; Numba's own index tells CPUs apart. An entry that cannot be read
or written is compiled again, never fatal.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, cast

import llvmlite
import numba
from numba.core.caching import FunctionCache

from edgeq.kernels.store import root

Function = Callable[..., Any]

_setting = Lock()  # modules of kernels are imported by several threads at once


@cache
def _folder() -> str:
    """Cache folder for this source and these compiler versions."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    path = root() / f"quantize-{digest.hexdigest()[:20]}"
    with suppress(OSError):
        path.mkdir(mode=0o700, exist_ok=True)  # Numba's own folders in it may be less private
    return str(path)


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache, whose errors are misses."""

    def load_overload(self, sig: Any, target: Any) -> Any:
        with suppress(Exception):
            return super().load_overload(sig, target)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(Exception):
            super().save_overload(sig, data)


def _cache(function: Function) -> _Cache:
    with _setting:
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = _folder()
        try:
            return _Cache(function)
        finally:
            numba.config.CACHE_DIR = before


def kernel(function: Function) -> Function:
    """Compiled on first use, then kept on disk. Takes arrays, numbers and named tuples of them."""
    compiled = numba.njit(nogil=True, error_model="numpy")(function)
    compiled._cache = _cache(function)
    return cast(Function, compiled)


def helper(function: Function) -> Function:
    """Compiled into the kernels that call it; may take and return lanes."""
    return cast(Function, numba.njit(nogil=True, error_model="numpy")(function))
