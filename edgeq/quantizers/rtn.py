"""Round to nearest with scales from the largest values (no search).

For the five oldest formats exactly what ggml's reference quantizers write (ggml-quants.c). Every
other method is measured against this one.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.blocks import BlockFormat, pack

__all__ = ["pack", "quantize"]

Array = NDArray[Any]
Fields = dict[str, Array]


def quantize(
    w: NDArray[np.float32], fmt: BlockFormat, importance: NDArray[np.float32] | None = None
) -> Fields:
    """Fields of `w` float32 [rows, cols], shaped as `edgeq.blocks.unpack` returns them.

    `importance` is not used.

    >>> from edgeq import blocks
    >>> fields = quantize(np.linspace(-8, 7, 32, dtype=np.float32)[None], blocks.get("Q4_0"))
    >>> fields["d"], fields["q"][0, 0, :8]
    (array([[1.]], dtype=float32), array([-8, -8, -7, -7, -6, -6, -5, -5], dtype=int32))
    """
    groups = w.reshape(len(w), -1, fmt.block // fmt.group, fmt.group)
    return _FAMILIES[fmt.value](groups, fmt)


def _scale(x: Array, fmt: BlockFormat) -> Fields:
    """x [rows, blocks, 1, block] -> d, q."""
    x = x[..., 0, :]
    if fmt.fields["q"].type:  # codes stored as signed bytes: both ends alike
        d = np.abs(x).max(axis=-1) / np.float32(fmt.limits("q")[1])
    else:
        d = _extreme(x) / np.float32(_low(fmt))
    v = x * _inverse(d)[..., None]
    if fmt.table is not None:
        return {"d": _half(d), "q": _nearest(v, fmt)}
    low, high = fmt.limits("q")
    # Halves are rounded up, or away from 0 where 0 is stored as 0, as ggml does.
    up = np.trunc(v + np.copysign(np.float32(0.5), v)) if fmt.fields["q"].type else _up(v - low)
    up = up if fmt.fields["q"].type else up + low
    return {"d": _half(d), "q": np.clip(up, low, high).astype(np.int32)}


def _pair(x: Array, fmt: BlockFormat) -> Fields:
    """x [rows, blocks, 1, block] -> d, m, q."""
    x = x[..., 0, :]
    m = x.min(axis=-1)
    top = fmt.limits("q")[1]
    d = (x.max(axis=-1) - m) / np.float32(top)
    q = np.clip(_up((x - m[..., None]) * _inverse(d)[..., None]), 0, top)
    return {"d": _half(d), "m": _half(m), "q": q.astype(np.int32)}


def _scales(x: Array, fmt: BlockFormat) -> Fields:
    """x [rows, blocks, groups, group] -> d, sc, q."""
    wish = _extreme(x) / np.float32(_low(fmt))
    low, high = fmt.limits("sc")
    d = _half(_extreme(wish) / np.float32(low))
    sc = np.clip(np.rint(wish * _inverse(d)[..., None]), low, high)
    q = _nearest(x * _inverse(d[..., None] * sc)[..., None], fmt)
    return {"d": d, "sc": sc.astype(np.int32), "q": _flat(q)}


def _pairs(x: Array, fmt: BlockFormat) -> Fields:
    """x [rows, blocks, groups, group] -> d, dmin, sc, m, q."""
    q_top, sc_top, m_top = (fmt.limits(name)[1] for name in ("q", "sc", "m"))
    floor = np.maximum(-x.min(axis=-1), 0)
    wish = (x.max(axis=-1) + floor) / np.float32(q_top)
    d = _half(wish.max(axis=-1) / np.float32(sc_top))
    dmin = _half(floor.max(axis=-1) / np.float32(m_top))
    sc = np.clip(np.rint(wish * _inverse(d)[..., None]), 0, sc_top)
    m = np.clip(np.rint(floor * _inverse(dmin)[..., None]), 0, m_top)
    above = x + (dmin[..., None] * m)[..., None]
    q = np.clip(np.rint(above * _inverse(d[..., None] * sc)[..., None]), 0, q_top)
    integers = {"sc": sc.astype(np.int32), "m": m.astype(np.int32), "q": _flat(q.astype(np.int32))}
    return {"d": d, "dmin": dmin, **integers}


def _low(fmt: BlockFormat) -> int:
    """The level that the largest value gets."""
    return fmt.table[0] if fmt.table is not None else fmt.limits("q")[0]


def _extreme(x: Array) -> Array:
    """The value of largest magnitude along the last axis, with its sign."""
    at = np.abs(x).argmax(axis=-1)[..., None]
    top: Array = np.take_along_axis(x, at, axis=-1)[..., 0]
    return top


def _inverse(scale: Array) -> Array:
    """1 / scale, 0 for 0, and for what is too small to divide by."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _half(values: Array) -> Array:
    """What f16 keeps of values, as float32; infinite where they are too large."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _up(v: Array) -> Array:
    """Nearest whole number of v >= 0, halves up."""
    return np.trunc(v + np.float32(0.5))


def _nearest(v: Array, fmt: BlockFormat) -> Array:
    """Codes of the levels nearest to v, int32."""
    if fmt.table is None:
        return np.clip(np.rint(v), *fmt.limits("q")).astype(np.int32)
    levels = np.array(fmt.table, np.float32)
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, v).astype(np.int32)


def _flat(q: Array) -> Array:
    """[rows, blocks, groups, group] -> [rows, blocks, block]."""
    return q.reshape(*q.shape[:2], -1)


_FAMILIES: dict[str, Callable[[Array, BlockFormat], Fields]] = {
    "d * q": _scale,
    "d * q + m": _pair,
    "d * sc * q": _scales,
    "d * sc * q - dmin * m": _pairs,
}
