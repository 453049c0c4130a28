"""NumPy's matrix products on one thread: while many parts are worked on, each has its own."""

import functools
from contextlib import AbstractContextManager
from typing import Any

__all__ = ["single_blas"]


def single_blas() -> AbstractContextManager[Any]:
    """While it is open, products take one thread each, in all threads of the process.

    >>> with single_blas():
    ...     all(pool["num_threads"] == 1 for pool in _controller().info())
    True
    """
    limit: AbstractContextManager[Any] = _controller().limit(limits=1, user_api="blas")
    return limit


@functools.cache
def _controller() -> Any:
    """Of the libraries that are loaded: NumPy's at least."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")
