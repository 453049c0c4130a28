"""Outliers of activations are moved into the weights (SmoothQuant), which are then searched.

Xiao et al. 2022, arXiv:2211.10438: with s = max|x|^a / max|w|^(1-a) per column, inputs x / s and
weights w s are equally hard to round. Engines round activations to 8 bits with one scale for many
columns (32 here, 256 in llama.cpp for K formats), where one large channel blurs the others.
Importance matrices hold mean squares, so their root stands for max|x|: only proportions matter.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeq.blocks import BlockFormat
from edgeq.quantizers.search import pack, quantize

__all__ = ["NEEDS", "pack", "quantize", "scales"]

NEEDS = "importance"
STRENGTH = 0.5  # the paper's a: 0 leaves outliers in the activations, 1 moves them all

Array = NDArray[np.float32]


def scales(matrices: Sequence[Array], importance: Array, formats: Sequence[BlockFormat]) -> Array:
    """Factors [cols] for the columns of matrices [rows, cols], around 1.

    importance [cols]: mean square of each input. formats: not used.

    >>> w = np.array([[1.0, 1.0]], np.float32)
    >>> scales([w], np.array([16.0, 1.0], np.float32), []).tolist()
    [1.4142135381698608, 0.7071067690849304]
    """
    x = np.sqrt(importance.astype(np.float64))
    w = np.max([np.abs(matrix).max(axis=0) for matrix in matrices], axis=0).astype(np.float64)
    known = (x > 0) & (w > 0)
    if not known.any():
        return np.ones(len(x), np.float32)
    factors = np.where(known, x, 1) ** STRENGTH / np.where(known, w, 1) ** (1 - STRENGTH)
    factors /= np.exp(np.log(factors[known]).mean())
    return np.where(known, factors, 1).astype(np.float32)
