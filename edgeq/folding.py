"""Scale the columns of matrices, and undo it where their inputs come from: in a norm, or in the
rows of the matrix before. The model's function stays the same; what rounding does to it does not.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq import models
from edgeq.blocks import BlockFormat
from edgeq.errors import ModelError
from edgeq.grid import Grid
from edgeq.models.flow import Fold, folds
from edgeq.sources import Source
from edgeq.statistics import Statistics

__all__ = ["FoldedSource", "Scaler", "fold"]

SAMPLE = 1 << 17  # weights of each matrix that a method may look at

Array = NDArray[np.float32]


class Scaler(Protocol):
    """A quantizer that scales columns first."""

    def scales(
        self, matrices: Sequence[Array], importance: Array, formats: Sequence[BlockFormat]
    ) -> Array:
        """Factors [cols], finite and above 0, for matrices [rows, cols] that read the same input.

        importance [cols]: its mean squares. formats: those that the matrices will get.
        """


class FoldedSource:
    """A source whose matrices are scaled by columns and by rows; else the same. See `Source`."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._columns: dict[str, Array] = {}
        self._rows: dict[str, Array] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def scale(self, pair: Fold, factors: Array) -> None:
        """Multiply the columns of the readers by `factors` [cols], and divide the writers."""
        for name in pair.readers:
            self._columns[name] = self._columns.get(name, np.float32(1)) * factors
        divisors = _of_writer(pair, factors)
        for name in pair.writers:
            self._rows[name] = self._rows.get(name, np.float32(1)) / divisors

    def _scaled(self, name: str) -> bool:
        return name in self._columns or name in self._rows

    def copy(self, name: str, fmt: BlockFormat, start: int, stop: int) -> NDArray[np.uint8] | None:
        """See `Source.copy`."""
        return None if self._scaled(name) else self._source.copy(name, fmt, start, stop)

    def grid(self, name: str, start: int, stop: int) -> Grid | None:
        """See `Source.grid`."""
        return None if self._scaled(name) else self._source.grid(name, start, stop)

    def factors(self, name: str, start: int, stop: int) -> Array | None:
        """See `Source.factors`."""
        rows, columns = self._rows.get(name), self._columns.get(name)
        if rows is None:
            return None if columns is None else columns[None]
        # A vector is one long row.
        one = rows[None] if len(self._source.shapes[name]) == 1 else rows[start:stop, None]
        return one if columns is None else one * columns

    def read(self, name: str, start: int, stop: int) -> Array:
        """See `Source.read`."""
        w, factors = self._source.read(name, start, stop), self.factors(name, start, stop)
        return w if factors is None else w * factors


def _of_writer(pair: Fold, factors: Array) -> Array:
    """One factor for each row of the writer: the first of the heads that read it."""
    return np.ascontiguousarray(factors.reshape(-1, pair.share, pair.head)[:, 0]).reshape(-1)


def fold(
    source: Source,
    statistics: Statistics,
    method: Scaler,
    formats: Mapping[str, BlockFormat],
    architecture: str,
) -> FoldedSource:
    """The source with all folds that the method wants; statistics are scaled along.

    architecture: as GGUF names it. Matrices without importance are left alone. Raises ModelError
    for an architecture that is not known, since what feeds what is not known then.
    """
    models.find(architecture)
    folded = FoldedSource(source)
    for pair in folds(source.shapes, source.model):
        importance = statistics.importance(pair.readers[0])
        if importance is None or importance.ndim != 1:
            continue
        matrices = [_sample(folded, name) for name in pair.readers]
        wanted = method.scales(matrices, importance, [formats[name] for name in pair.readers])
        factors = _shared(pair, wanted)
        folded.scale(pair, factors)
        for name in pair.readers:
            statistics.scale(name, factors)
    return folded


def _shared(pair: Fold, factors: Array) -> Array:
    """The factors, alike in columns that are read from the same row: their geometric mean."""
    heads = np.log(factors.reshape(-1, pair.share, pair.head).astype(np.float64))
    alike = np.exp(heads.mean(axis=1, keepdims=True)) + np.zeros_like(heads)
    if not np.isfinite(alike).all() or not (alike > 0).all():
        raise ModelError(f"{pair.readers[0]}: scales of columns are not finite numbers above 0")
    found: Array = alike.reshape(-1).astype(np.float32)
    return found


def _sample(source: FoldedSource, name: str) -> Array:
    """Rows spread over a matrix, in the chunks in which it may be read."""
    rows, cols = math.prod(source.shapes[name][:-1]), source.shapes[name][-1]
    step = source.row_step
    groups = max(rows // step, 1)
    count = min(groups, max(SAMPLE // (cols * step), 1))
    starts: Iterable[int] = (round(i * groups / count) * step for i in range(count))
    return np.concatenate([source.read(name, at, min(at + step, rows)) for at in starts])
