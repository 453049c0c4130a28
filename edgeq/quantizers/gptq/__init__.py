"""Error feedback over correlated inputs (GPTQ) on the grids of blocks.

Where inputs are correlated, the error of one column can be undone by the next ones. Columns are
rounded from left to right, and what each misses is pushed into those to its right (Frantar et al.
2022, arXiv:2210.17323). Each block gets its scales by search when its turn comes, from weights that
already make up for the blocks before. Afterwards scales and codes descend together: each in turn
becomes the best one, given all others, for the error (w - q) H (w - q)^T of the matrix's output.

Matrices without a Hessian, such as the token embedding, are left to `search`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.blocks import BlockFormat
from edgeq.quantizers import search
from edgeq.quantizers._hessian import Hessian
from edgeq.quantizers.gptq.grid import Grid
from edgeq.quantizers.search import pack

__all__ = ["NEEDS", "pack", "quantize"]

NEEDS = "hessian"
SWEEPS = 2  # over all scales and codes; a third gains about 1 % of KL divergence

Array = NDArray[np.float32]
Fields = dict[str, NDArray[Any]]


def quantize(
    w: Array,
    fmt: BlockFormat,
    importance: Array | None = None,
    hessian: Hessian | None = None,
) -> Fields:
    """Fields of `w` float32 [rows, cols], shaped as `edgeq.blocks.unpack` returns them.

    hessian: of the inputs, [cols, cols]; without one, what `search` finds. The search for scales is
    weighted with the Hessian's diagonal; `importance` counts only where there is no Hessian.

    >>> from edgeq import blocks
    >>> from edgeq.quantizers import quantize as packed
    >>> w, h = np.random.default_rng(0).standard_normal((8, 64)), 0.9 + 0.1 * np.eye(64)
    >>> errors = [
    ...     np.trace(miss @ h @ miss.T)
    ...     for miss in (
    ...         blocks.decode(packed(w, "Q4_0", method=method, hessian=h), "Q4_0") - w
    ...         for method in ("gptq", "search")
    ...     )
    ... ]
    >>> bool(errors[0] < 0.5 * errors[1])
    True
    """
    if hessian is None:
        return search.quantize(w, fmt, importance)
    parts = _feed_back(w, fmt, hessian)
    _descend(w, parts, hessian.matrix)
    return Grid.join(parts).fields()


def _feed_back(w: Array, fmt: BlockFormat, hessian: Hessian) -> list[Grid]:
    """Blocks from left to right, each rounded column by column."""
    from edgeq.quantizers.gptq.kernels import feed_back

    factor = hessian.feedback
    weights = np.ascontiguousarray(np.diagonal(hessian.matrix))
    left, parts = w.copy(), []
    for here in _places(w, fmt):
        block, rest = np.ascontiguousarray(left[:, here]), slice(here.stop, None)
        part = Grid(search.quantize(block, fmt, weights[here]), fmt)
        miss = np.empty_like(block)
        own = np.ascontiguousarray(factor[here, here])
        feed_back(block, *part.steps(), part.table, part.even, own, part.codes, miss)
        left[:, rest] -= miss @ factor[here, rest]
        parts.append(part)
    return parts


def _descend(w: Array, parts: list[Grid], hessian: Array) -> None:
    """Sweeps over the blocks; between two of them the gradient of the error is brought up to date.

    Within a block nothing but its own columns is looked at, which fit into the cache.
    """
    miss = w - Grid.join(parts).values()
    gradient = (miss @ hessian).astype(np.float32, copy=False)
    for _ in range(SWEEPS):
        for here, part in zip(_places(w, parts[0].fmt), parts):
            change = part.descend(gradient[:, here], hessian[here, here])
            gradient -= change @ hessian[here]


def _places(w: Array, fmt: BlockFormat) -> list[slice]:
    """Columns of each block."""
    return [slice(at, at + fmt.block) for at in range(0, w.shape[1], fmt.block)]
