"""Columns that carry strong activations are scaled up first (AWQ), then searched.

Lin et al. 2023, arXiv:2306.00978: a scale folded into the norm, or matrix, before costs nothing at
run time and protects the columns that matter. The scale is a power of the activations' magnitude;
which power is found by trying. The paper takes the mean of |x|; here it is the root of the mean
square, which importance matrices hold.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeq import blocks, quantizers
from edgeq.blocks import BlockFormat
from edgeq.quantizers.search import pack, quantize

__all__ = ["NEEDS", "pack", "quantize", "scales"]

NEEDS = "importance"
POWERS = np.arange(0, 1.01, 0.1)

Array = NDArray[np.float32]


def scales(matrices: Sequence[Array], importance: Array, formats: Sequence[BlockFormat]) -> Array:
    """Factors [cols] for the columns of matrices [rows, cols] with the least error of the output.

    importance [cols]: mean square of each input. formats: what each matrix will be stored in.

    >>> scales([np.ones((1, 32), np.float32)], np.ones(32, np.float32), [blocks.get("Q4_0")])[:2]
    array([1., 1.], dtype=float32)
    """
    trials = [_scale(importance, power) for power in POWERS]
    errors = [
        sum(_error(w, importance, fmt, trial) for w, fmt in zip(matrices, formats))
        for trial in trials
    ]
    return trials[int(np.argmin(errors))]


def _scale(importance: Array, power: float) -> Array:
    """Magnitudes to a power, balanced around 1; 1 where nothing is known."""
    size = np.sqrt(importance.astype(np.float64))
    known = size > 1e-6 * size.max(initial=0)
    if not known.any():
        return np.ones(len(size), np.float32)
    factors = np.where(known, size, 1) ** power
    balance = np.sqrt(factors[known].max() * factors[known].min())
    return np.where(known, factors / balance, 1).astype(np.float32)


def _error(w: Array, importance: Array, fmt: BlockFormat, factors: Array) -> float:
    """Mean square error of the output, inputs taken as independent."""
    if fmt.value == "x":
        return 0.0
    raw = quantizers.quantize(w * factors, fmt, importance / factors**2, "search")
    miss = blocks.decode(raw, fmt) / factors - w
    return float((np.square(miss, dtype=np.float64) @ importance).sum())
