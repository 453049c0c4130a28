"""Rows of a source on their way to a file: threads read, encode and compare some at a time."""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq import blocks
from edgeq.blocks import BlockFormat
from edgeq.gguf import TensorSpec
from edgeq.grid import Grid
from edgeq.quantizers import single_blas
from edgeq.sources import Source

__all__ = ["Chunk", "Encoded", "Part", "Sample", "matrix", "nbytes", "parts"]

_CHUNK = 1 << 20  # weights per step of a thread: some 10 ms, after which Ctrl-C is noticed
_AHEAD = 4  # steps that may be done before their turn to be written
_SAMPLED_ROWS = 4  # per step, for the error in the report


class Chunk(NamedTuple):
    """Rows start..stop of a tensor as the source has them: bytes, or weights (and their grid)."""

    start: int
    stop: int
    raw: NDArray[np.uint8] | None = None  # in the format to write
    w: NDArray[np.float32] | None = None  # [stop - start, cols]
    grid: Grid | None = None


class Encoded(NamedTuple):
    """Packed rows uint8 [n, row_bytes]; kept: all of them are integers of the source."""

    packed: NDArray[np.uint8]
    kept: bool


class Part(NamedTuple):
    """Rows of a tensor up to row `stop`, as they go to the file."""

    stop: int
    encoded: Encoded
    sample: "Sample"


Encode = Callable[[TensorSpec, Chunk], Encoded]


def parts(
    source: Source, specs: list[TensorSpec], encode: Encode, threads: int
) -> Generator[Part, None, None]:
    """All rows of all tensors in order; threads read and encode the next ones meanwhile."""

    def work(spec: TensorSpec, start: int, stop: int) -> Part:
        chunk = _read(source, spec, start, stop)
        encoded = encode(spec, chunk)
        factors = source.factors(spec.name, start, stop)
        return Part(stop, encoded, Sample.of(chunk.w, encoded.packed, spec.format, factors))

    steps = (
        (spec, start, stop)
        for spec in specs
        for start, stop in _ranges(spec.shape, source.row_step)
    )
    waiting: deque[Future[Part]] = deque()
    with contextlib.ExitStack() as stack:
        stack.enter_context(single_blas())
        pool = ThreadPoolExecutor(threads, thread_name_prefix="edgeq-quantize")
        stack.callback(pool.shutdown, cancel_futures=True)
        for step in steps:
            if len(waiting) == threads + _AHEAD:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work, *step))
        while waiting:
            yield waiting.popleft().result()


def _read(source: Source, spec: TensorSpec, start: int, stop: int) -> Chunk:
    raw = source.copy(spec.name, spec.format, start, stop)
    if raw is not None:
        return Chunk(start, stop, raw)
    grid = source.grid(spec.name, start, stop)
    w = source.read(spec.name, start, stop) if grid is None else grid.values()
    return Chunk(start, stop, None, w, grid)


def _ranges(shape: tuple[int, ...], row_step: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about _CHUNK weights, multiples of `row_step` rows."""
    rows, cols = matrix(shape)
    step = max(_CHUNK // cols // row_step, 1) * row_step
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor seen as one matrix; a vector is one row."""
    return math.prod(shape[:-1]), shape[-1]


def nbytes(spec: TensorSpec) -> int:
    """Size of a tensor in the file."""
    rows, cols = matrix(spec.shape)
    return rows * blocks.row_bytes(spec.format, cols)


class Sample(NamedTuple):
    """Error of stored rows: decoding is slow, so a few rows per step must do."""

    error: float = 0.0  # sum of (stored - w)^2
    square: float = 0.0  # sum of w^2
    weights: int = 0

    @classmethod
    def of(
        cls,
        w: NDArray[np.float32] | None,
        packed: NDArray[np.uint8],
        fmt: BlockFormat,
        factors: NDArray[np.float32] | None = None,
    ) -> "Sample":
        """Compare some rows of w [n, cols] with packed [n, row_bytes]; None: they are the same.

        factors: what the model's own weights were multiplied by. Errors are those of the latter.
        """
        some = slice(None, None, max(len(packed) // _SAMPLED_ROWS, 1))
        w = blocks.decode(packed[some], fmt) if w is None else w[some]
        exact, unit = w.astype(np.float64), np.ones(1)
        if factors is not None:
            unit = 1 / np.broadcast_to(factors, (len(packed), w.shape[1]))[some].astype(np.float64)
        square = float(np.square(exact * unit).sum())
        if fmt.name == "F32":
            return cls(0.0, square, exact.size)
        error = float(np.square((blocks.decode(packed[some], fmt) - exact) * unit).sum())
        return cls(error, square, exact.size)

    def plus(self, other: "Sample") -> "Sample":
        """Both samples as one."""
        error, square = self.error + other.error, self.square + other.square
        return Sample(error, square, self.weights + other.weights)

    def result(self) -> tuple[float, float]:
        """Relative RMSE, and mean square of the weights."""
        relative = math.sqrt(self.error / self.square) if self.square else 0.0
        return relative, self.square / max(self.weights, 1)
