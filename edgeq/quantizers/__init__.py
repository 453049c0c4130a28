"""Quantizers, one file each: rows of float32 in, blocks of a format out.

A quantizer is a module of this package whose docstring's first line says what it does, with two
functions: `quantize` finds the fields of blocks, `pack` writes their bytes. It works for every
format of the value families that it knows (see `edgeq.blocks`). Names with an underscore are not
quantizers.

A module may also say NEEDS = "importance" or "hessian", what it is of little use without, and offer
`scales`: it then also has a say in how columns are scaled before they are quantized (see
`edgeq.folding`).
"""

import ast
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from edgeq import blocks
from edgeq.blocks import BlockFormat
from edgeq.errors import RequestError
from edgeq.quantizers._blas import single_blas
from edgeq.quantizers._hessian import Hessian

__all__ = [
    "Hessian",
    "Method",
    "about",
    "available",
    "check_needs",
    "find",
    "needs",
    "quantize",
    "single_blas",
    "thread_count",
]

CHUNK = 1 << 18  # elements that one thread takes at a time: a megabyte of them
FLOOR = 1e-5  # least importance, relative to the mean: keeps sums of weights away from 0
# Values that rounding makes infinite; for blocks, more than any scale times any code can reach.
LIMITS = {"f16": 65520.0, "bf16": 3.3961775e38, "f32": np.inf}
BLOCK_LIMIT = 1e10

Array = NDArray[np.float32]
Fields = dict[str, NDArray[Any]]
Find = Callable[[Array, BlockFormat, Array | None], Fields]
Pack = Callable[[Fields, BlockFormat], NDArray[np.uint8]]


class Method(Protocol):
    """What a module of this package offers."""

    def quantize(self, w: Array, fmt: BlockFormat, importance: Array | None = None) -> Fields:
        """Fields of w [rows, cols], shaped as `edgeq.blocks.unpack` returns them.

        importance [cols]: finite and above 0, or None.
        """

    def pack(self, fields: Fields, fmt: BlockFormat) -> NDArray[np.uint8]:
        """Bytes of these fields [rows, row_bytes]."""


def available() -> list[str]:
    """Names of the quantizers.

    >>> available()
    ['awq', 'gptq', 'rtn', 'search', 'smoothquant']
    """
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if not name.startswith("_"))


def find(name: str) -> Method:
    """Quantizer by name. Raises RequestError, listing the names there are.

    >>> find("rtn").__name__
    'edgeq.quantizers.rtn'
    """
    if name not in available():
        known = ", ".join(available())
        raise RequestError(f"quantizer {name!r} is unknown: expected one of {known}")
    return cast(Method, importlib.import_module(f"{__name__}.{name}"))


def about(name: str) -> str:
    """First line of a quantizer's docstring, without importing it.

    >>> about("rtn")
    'Round to nearest with scales from the largest values (no search)'
    """
    spec = importlib.util.find_spec(f"{__name__}.{name}")
    assert spec is not None
    assert spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].removesuffix(".")


def needs(name: str) -> str:
    """What a quantizer wants to know about inputs: "", "importance" or "hessian".

    >>> needs("search"), needs("gptq")
    ('', 'hessian')
    """
    return str(getattr(find(name), "NEEDS", ""))


def check_needs(name: str, *, importance: bool, hessians: bool) -> None:
    """Refuse a method whose inputs are not there. Raises RequestError.

    >>> check_needs("awq", importance=False, hessians=False)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    edgeq.errors.RequestError: method awq needs an importance matrix: ...
    """
    need = needs(name)
    if need == "hessian" and not hessians:
        raise RequestError(
            f"method {name} needs Hessians: make them with `edgeq calibrate --hessian` and give "
            "the file with --hessian"
        )
    if need and not (importance or hessians):
        raise RequestError(
            f"method {name} needs an importance matrix: make one with `edgeq calibrate` and give "
            "the file with --imatrix"
        )


def quantize(
    w: NDArray[np.floating[Any]],
    fmt: BlockFormat | str,
    importance: NDArray[np.floating[Any]] | None = None,
    method: str = "search",
    threads: int | None = None,
    hessian: "Hessian | NDArray[np.floating[Any]] | None" = None,
) -> NDArray[np.uint8]:
    """Blocks of `w` [rows, cols] in format `fmt`: uint8 [rows, row_bytes].

    `importance` [cols] is what an error in each column costs, such as the mean square of the
    activations that it multiplies (an importance matrix); only its proportions matter. `method` is
    a name that `find` knows. The result does not depend on `threads`, by default one per core.
    `hessian` [cols, cols] is the mean of x x^T over inputs x, for methods that use it.

    Raises RequestError for values that are not finite or too large for the format, for a wrong
    shape, importance, Hessian, method or number of threads; FormatError for an unknown format, and
    for rows that are not whole blocks.

    >>> w = np.random.default_rng(0).standard_normal((4, 256), np.float32)
    >>> raw = quantize(w, "Q6_K", method="rtn")
    >>> raw.shape, bool(np.abs(blocks.decode(raw, "Q6_K") - w).max() < 0.1)
    ((4, 210), True)
    """
    fmt = blocks.get(fmt)
    chosen = find(method)
    if w.ndim != 2:
        raise RequestError(f"weights of shape {w.shape}: expected [rows, cols]")
    out = np.empty((len(w), blocks.row_bytes(fmt, w.shape[1])), np.uint8)
    weights = _importance(importance, w.shape[1])
    find_fields = _with_hessian(chosen, hessian, w.shape[1])

    def work(part: slice) -> None:
        chunk = np.ascontiguousarray(w[part], np.float32)
        _check(chunk, fmt, part.start)
        out[part] = _encode(chunk, fmt, weights, find_fields, chosen.pack, part.start)

    _run(work, list(_parts(w.shape)), thread_count(threads))
    return out


def _with_hessian(method: Method, hessian: Any, cols: int) -> Find:
    """The method's `quantize`, knowing the Hessian if it wants one."""
    if hessian is None or getattr(method, "NEEDS", "") != "hessian":
        return method.quantize
    known = hessian if isinstance(hessian, Hessian) else Hessian(hessian)
    if known.matrix.shape != (cols, cols):
        raise RequestError(f"Hessian of shape {known.matrix.shape}: expected [{cols}, {cols}]")
    known.prepare()  # once, not in every thread
    return partial(cast(Any, method).quantize, hessian=known)


def _encode(
    w: Array, fmt: BlockFormat, importance: Array | None, find_fields: Find, pack: Pack, first: int
) -> NDArray[np.uint8]:
    """Bytes of rows `first`.. of a matrix."""
    if fmt.value == "x":
        return blocks.pack({"x": w}, fmt)
    with np.errstate(over="ignore", invalid="ignore"):  # seen below, as a scale out of range
        fields = find_fields(w, fmt, importance)
    for name, entry in fmt.fields.items():
        if entry.type == "f16" and not np.abs(fields[name]).max() < np.finfo(np.float16).max:
            raise _too_large(w, fmt, first)
    return pack(fields, fmt)


def _check(w: Array, fmt: BlockFormat, first: int) -> None:
    """Refuse what is not finite or hopelessly large, in rows `first`.. of a matrix."""
    kind = fmt.fields["x"].type if fmt.value == "x" else ""
    if max(w.max(), -w.min()) < LIMITS.get(kind, BLOCK_LIMIT):
        return
    bad = np.argwhere(~np.isfinite(w))
    if not len(bad):
        raise _too_large(w, fmt, first)
    row, col = bad[0]
    where = f"row {first + row}, column {col}"
    raise RequestError(f"weights: {where} is {w[row, col]}: expected finite numbers")


def _too_large(w: Array, fmt: BlockFormat, first: int) -> RequestError:
    row, col = np.unravel_index(np.argmax(np.abs(w)), w.shape)
    where = f"row {first + row}, column {col}"
    return RequestError(f"weights: {where} is {w[row, col]:g}: too large for {fmt.name}: use F32")


def _importance(importance: NDArray[np.floating[Any]] | None, cols: int) -> Array | None:
    """Importance with mean 1, float32 [cols], or None where it says nothing."""
    if importance is None:
        return None
    if importance.shape != (cols,):
        raise RequestError(f"importance of shape {importance.shape}: expected [{cols}]")
    values = importance.astype(np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        at = int(np.argmax(~(np.isfinite(values) & (values >= 0))))
        raise RequestError(f"importance: column {at} is {values[at]}: expected a number >= 0")
    mean = values.mean() if cols else 0.0
    if mean == 0 or values.min() == values.max():
        return None
    return np.maximum(values / mean, FLOOR).astype(np.float32)


def _parts(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows, of about CHUNK elements each."""
    rows, cols = shape
    if not cols:
        return
    step = max(1, CHUNK // cols)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def thread_count(threads: int | None) -> int:
    """`threads`, or one per core that this process may use. Raises RequestError below 1."""
    if threads is None:
        known = hasattr(os, "sched_getaffinity")
        return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    if threads < 1:
        raise RequestError(f"threads = {threads}: expected at least 1")
    return threads


def _run(work: Any, parts: list[slice], threads: int) -> None:
    """Work on all parts; the first error ends it."""
    if min(threads, len(parts)) <= 1:
        for part in parts:
            work(part)
        return
    with single_blas(), ThreadPoolExecutor(min(threads, len(parts))) as pool:
        futures = [pool.submit(work, part) for part in parts]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
