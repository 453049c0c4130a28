"""Rotary frequencies of a model: context extensions turned into one frequency per pair, and one
magnitude.
"""

import math

import numpy as np
from numpy.typing import NDArray

from edgeq.models.arch import Rope

__all__ = ["frequencies", "magnitude", "tables"]


def frequencies(rope: Rope, factors: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
    """Radians per position, float64 [dim / 2]; `factors` (rope_freqs.weight) divide them.

    Linear scaling divides positions by the factor (Chen et al. 2023, arXiv:2306.15595). YaRN does
    so only for slow pairs and blends between (Peng et al. 2023, arXiv:2309.00071, section 3.2).

    >>> frequencies(Rope(dim=4, base=10000.0, style="norm")).tolist()
    [1.0, 0.01]
    """
    plain = rope.base ** -(np.arange(0, rope.dim, 2) / rope.dim)
    if factors is not None:
        plain = plain / factors.astype(np.float64)
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "yarn":
        slow = _yarn_ramp(rope)
        return plain * (1 - slow) + plain / rope.factor * slow
    return plain


def _yarn_ramp(rope: Rope) -> NDArray[np.float64]:
    """0 for pairs that turn often within the original context, 1 for those that hardly turn."""

    def pair_of(turns: float) -> float:
        ratio = rope.original_context / (turns * 2 * math.pi)
        return rope.dim * math.log(ratio) / (2 * math.log(rope.base))

    low = max(math.floor(pair_of(rope.beta_fast)), 0)
    high = min(math.ceil(pair_of(rope.beta_slow)), rope.dim - 1)
    ramp = (np.arange(rope.dim // 2) - low) / max(high - low, 0.001)
    return np.clip(ramp, 0.0, 1.0)


def magnitude(rope: Rope) -> float:
    """Factor of cos and sin: YaRN's attention temperature, and what the file adds to it."""
    yarn = 0.1 * math.log(rope.factor) + 1.0 if rope.scaling == "yarn" else 1.0
    return yarn * rope.attn_factor


def tables(
    turn: NDArray[np.float64], scale: float, first: int, count: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(cos, sin) float32 [count, pairs] of positions first .. first + count - 1."""
    angles = np.arange(first, first + count)[:, None] * turn
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)
