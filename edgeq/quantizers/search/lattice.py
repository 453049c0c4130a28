"""Integers in weights that were trained for a grid of 4 bits (QAT) and published as floats.

Searching again for scales would not find the grid again; here each block is asked whether it lies
on one: w = d * k with k in -8..7, the levels of Q4_0, exactly or rounded to bfloat16.
"""

import numpy as np
from numpy.typing import NDArray

from edgeq.blocks import BlockFormat
from edgeq.grid import Ready, half
from edgeq.quantizers.search.jit import kernel

__all__ = ["find_grid"]

BLOCK = 32
LOW, HIGH = -8, 7
SAMPLES = 64
INSIDE = 1 - 2.0**-20  # of the way to a number halfway between two bfloat16


@kernel
def fit(x, power, odd, k, scales):
    """Grids through x float32 [blocks, 32]: k int8 [blocks, 32], scales float64 [blocks, 3].

    power and odd [blocks, 32]: of two, not above each |x|; whether bfloat16 x ends in a bit 1.
    The scales are the best one and the ends of the range that the rounding of x leaves; all 0
    where there is no grid. The largest weight is a whole multiple of the scale: each is tried, -8
    first as in Q4_0. Chance rarely lets the first few weights pass, and never 32.
    """
    for b in range(len(x)):
        at = 0
        for i in range(BLOCK):
            if abs(x[b, i]) > abs(x[b, at]):
                at = i
        largest = x[b, at]
        if largest == 0 or not np.isfinite(largest):
            continue
        for size in range(-LOW, 0, -1):
            for sign in (-1, 1):
                top = sign * size
                if top > HIGH or scales[b, 0] != 0:
                    continue
                d = largest / np.float64(top)
                xk, kk, low, high = 0.0, 0.0, 0.0, np.inf
                for i in range(BLOCK):
                    value = np.float64(x[b, i])
                    code = np.rint(value / d)
                    # Both weight and scale may be off by the half unit of bfloat16, 2^-8.
                    if not LOW <= code <= HIGH or abs(value - code * d) > 0.01 * abs(value):
                        break
                    k[b, i] = np.int8(code)
                    if code != 0:
                        above = power[b, i] * 2.0**-8
                        below = above / 2 if abs(value) == power[b, i] else above
                        if odd[b, i]:  # ties go to even numbers
                            above, below = above * INSIDE, below * INSIDE
                        low = max(low, (abs(value) - below) / abs(code))
                        high = min(high, (abs(value) + above) / abs(code))
                        xk, kk = xk + value * code, kk + code * code
                else:
                    if low <= high:
                        scales[b, 0] = xk / kk
                        scales[b, 1] = low
                        scales[b, 2] = high


def find_grid(w: NDArray[np.float32], fmt: BlockFormat) -> Ready | None:
    """Blocks of w [rows, cols] that lie on a grid of Q4_0, in the fields of `fmt`; None: no such.

    Zeros lie on any grid, so a block of zeros is left to the search. Looks at all blocks only when
    half of a sample are on a grid.

    >>> from edgeq import blocks
    >>> k = np.arange(32, dtype=np.float32)[None] % 16 - 8
    >>> find_grid(np.float32(0.25) * k, blocks.get("Q4_0")).fields["q"][0, 0, :4]
    array([-8, -7, -6, -5], dtype=int8)
    """
    rows, cols = w.shape
    affine = fmt.value == "d * q + m"
    if fmt.block != BLOCK or fmt.table is not None or cols % BLOCK:
        return None
    if not affine and fmt.value != "d * q":
        return None
    x = np.ascontiguousarray(w, np.float32).reshape(-1, BLOCK)
    sample = x[:: max(len(x) // SAMPLES, 1)]
    sample = sample[sample.any(axis=1)]
    if 2 * np.count_nonzero(_fit(sample)[1][:, 0]) < max(len(sample), 1):
        return None
    q, scales = _fit(x)
    d = _pick(*scales.T).reshape(rows, -1)
    exact = (d != 0) & np.isfinite(d)
    if not exact.any():
        return None
    fields = {"d": np.where(exact, d, 0)}
    if affine:
        q -= LOW
        fields["m"] = LOW * fields["d"]
    return Ready({**fields, "q": q.reshape(rows, -1, BLOCK) * exact[..., None]}, exact)


def _fit(x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """See `fit`."""
    bits = x.view(np.uint32)
    power = (bits & np.uint32(0x7F800000)).view(np.float32)
    k, scales = np.zeros(x.shape, np.int8), np.zeros((len(x), 3))
    fit(x, power, bits & np.uint32(0x10000), k, scales)
    return k, scales


def _pick(
    best: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
) -> NDArray[np.float32]:
    """The 16-bit scale nearest to the best one; between low and high, if any is."""
    near = np.clip(np.abs(best), low, high).astype(np.float16)
    ends = np.float16(0), np.float16(np.inf)
    near = np.where(near > high, np.nextafter(near, ends[0]), near)
    near = np.where(near < low, np.nextafter(near, ends[1]), near)
    return np.copysign(half(near.astype(np.float32)), best).astype(np.float32)
