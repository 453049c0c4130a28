"""Rows of a source on their way to a file: read one step ahead, and compared in the end."""

import math
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq import blocks
from edgeq.blocks import BlockFormat
from edgeq.gguf import TensorSpec
from edgeq.grid import Grid
from edgeq.sources import Source

__all__ = ["Chunk", "Sample", "matrix", "nbytes", "read_ahead"]

_CHUNK = 1 << 22  # weights per step: about 0.3 s, after which Ctrl-C is noticed
_SAMPLED_ROWS = 8  # per step, for the error in the report


class Chunk(NamedTuple):
    """Rows start..stop of a tensor as the source has them: bytes, or weights (and their grid)."""

    start: int
    stop: int
    raw: NDArray[np.uint8] | None = None  # in the format to write
    w: NDArray[np.float32] | None = None  # [stop - start, cols]
    grid: Grid | None = None


def read_ahead(source: Source, specs: list[TensorSpec]) -> Generator[Chunk, None, None]:
    """All rows of all tensors in order; a thread reads the next ones meanwhile."""

    def read(spec: TensorSpec, start: int, stop: int) -> Chunk:
        raw = source.copy(spec.name, spec.format, start, stop)
        if raw is not None:
            return Chunk(start, stop, raw)
        grid = source.grid(spec.name, start, stop)
        w = source.read(spec.name, start, stop) if grid is None else grid.values()
        return Chunk(start, stop, None, w, grid)

    steps = [
        (spec, start, stop)
        for spec in specs
        for start, stop in _ranges(spec.shape, source.row_step)
    ]
    if not steps:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="edgeq-read") as pool:
        waiting = pool.submit(read, *steps[0])
        for step in steps[1:]:
            chunk = waiting.result()
            waiting = pool.submit(read, *step)
            yield chunk
        yield waiting.result()


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
    rows, cols = matrix(spec.shape)
    return rows * blocks.row_bytes(spec.format, cols)


class Sample:
    """Error of stored rows: decoding is slow, so a few rows per step must do."""

    def __init__(self) -> None:
        self._error = self._square = 0.0
        self._count = 0

    def add(
        self, w: NDArray[np.float32] | None, packed: NDArray[np.uint8], fmt: BlockFormat
    ) -> None:
        """Compare some rows of w [n, cols] with packed [n, row_bytes]; None: they are the same."""
        some = slice(None, None, max(len(packed) // _SAMPLED_ROWS, 1))
        w = blocks.decode(packed[some], fmt) if w is None else w[some]
        exact = w.astype(np.float64)
        self._square += float(np.square(exact).sum())
        self._count += exact.size
        if fmt.name != "F32":
            self._error += float(np.square(blocks.decode(packed[some], fmt) - exact).sum())

    def result(self) -> tuple[float, float]:
        """Relative RMSE, and mean square of the weights."""
        relative = math.sqrt(self._error / self._square) if self._square else 0.0
        return relative, self._square / max(self._count, 1)
