"""Search for the scales and codes with the least weighted error (default).

For each block: many scales are tried, each rounding is solved by least squares, integer sub-scales
are chosen by their true error, and codes are rounded against the numbers that the file will hold.
The searches and weights follow llama.cpp's (ggml-quants.c); scanning both ends of the range,
moving integer scales to where their error is least, and refitting d and dmin afterwards, gives less
error than it has.

Four searches serve all formats, one for each value family: `flat` and `nested`, with an offset or
without. They are compiled by Numba at first use.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.blocks import BlockFormat

__all__ = ["pack", "quantize"]

Array = NDArray[np.float32]
Fields = dict[str, NDArray[Any]]

STEPS = 7  # scales tried for each end of the levels
SPREAD = 1.2  # how far beyond its level the extreme element is moved, in levels,
LEAST_SPREAD = 0.09  # and this part of its own size at least: many levels, many good roundings
LESS = 3  # times x x counts less: in small blocks, and where nothing is known about the columns
REACH = 1  # how far integer scales move from where rounding put them
AFFINE = (-0.4, 0.5, 4, 0.3, 3)  # an AffinePlan


def quantize(w: Array, fmt: BlockFormat, importance: Array | None = None) -> Fields:
    """Fields of `w` float32 [rows, cols], shaped as `edgeq.blocks.unpack` returns them.

    `importance` float32 [cols] is what an error in each column costs; None: all the same. Integers
    come as int8 and scales as float32 values that f16 can hold.

    >>> from edgeq import blocks
    >>> w = np.arange(-8, 8, dtype=np.float32).repeat(2).reshape(1, 32)
    >>> fields = quantize(w, blocks.get("Q4_0"))
    >>> fields["d"], fields["q"][0, 0, :4]
    (array([[1.]], dtype=float32), array([-8, -8, -7, -7], dtype=int8))
    """
    blocks = w.size // fmt.block
    fields = {name: _empty(fmt, name, blocks) for name in fmt.fields}
    weights = np.empty(0, np.float32) if importance is None else importance
    known = importance is not None and fmt.group < fmt.block
    power = _power(w, fmt) * np.float32(1 if known else LESS)
    inputs = np.ascontiguousarray(w).reshape(-1), power, weights
    _SEARCHES[fmt.value](fmt, inputs, fields)
    lead = (len(w), blocks // len(w))
    return {
        name: values.reshape(lead if fmt.count(name) == 1 else (*lead, fmt.count(name)))
        for name, values in fields.items()
    }


def pack(fields: Fields, fmt: BlockFormat) -> NDArray[np.uint8]:
    """Bytes of fields, as `edgeq.blocks.pack` writes them."""
    from edgeq.quantizers.search.packing import pack

    return pack(fields, fmt)


def _empty(fmt: BlockFormat, name: str, blocks: int) -> NDArray[Any]:
    kind = np.float32 if fmt.fields[name].type == "f16" else np.int8
    return np.empty((blocks, fmt.count(name)), kind)


def _power(w: Array, fmt: BlockFormat) -> Array:
    """Mean of x x around each block [blocks]: llama.cpp's sigma2.

    Of the whole row for small blocks; twice that of the block itself where it is long.
    """
    nested = fmt.group < fmt.block
    parts = w.reshape(-1, fmt.block) if nested else w
    with np.errstate(over="ignore"):
        mean = np.einsum("ij,ij->i", parts, parts) / np.float32(parts.shape[1])
    return 2 * mean if nested else np.repeat(mean, w.shape[1] // fmt.block)


def _levels(fmt: BlockFormat) -> tuple[Any, Any]:
    """The levels of `q` and how to scan scales for them."""
    from edgeq.quantizers.search.scan import Levels, Plan

    low, high = fmt.limits("q")
    plan = Plan(max(2 * SPREAD / (high - low + 1), LEAST_SPREAD), STEPS)
    if fmt.table is None:
        return Levels(float(low), float(high), None), plan
    values = np.array(fmt.table, np.float32)
    midpoints = np.append(np.float32(0), (values[1:] + values[:-1]) / 2)
    table = np.ascontiguousarray(np.stack([values, midpoints]))
    return Levels(float(values[0]), float(values[-1]), table), plan


def _affine_plan() -> Any:
    from edgeq.quantizers.search.affine import AffinePlan

    return AffinePlan(*AFFINE)


def _scale(fmt: BlockFormat, inputs: tuple[Array, Array, Array], out: Fields) -> None:
    from edgeq.quantizers.search.flat import search_scale

    search_scale(*inputs, *_levels(fmt), out["d"], out["q"])


def _pair(fmt: BlockFormat, inputs: tuple[Array, Array, Array], out: Fields) -> None:
    from edgeq.quantizers.search.flat import search_pair

    top = float(fmt.limits("q")[1])
    search_pair(*inputs, top, _affine_plan(), out["d"], out["m"], out["q"])


def _scales(fmt: BlockFormat, inputs: tuple[Array, Array, Array], out: Fields) -> None:
    from edgeq.quantizers.search.nested import search_scales
    from edgeq.quantizers.search.scan import Levels

    levels, plan = _levels(fmt)
    low, high = fmt.limits("sc")
    ends = Levels(float(low), float(high), None)
    fields = out["d"], out["sc"], out["q"]
    search_scales(*inputs, levels, ends, fmt.group, plan, REACH, *fields)


def _pairs(fmt: BlockFormat, inputs: tuple[Array, Array, Array], out: Fields) -> None:
    from edgeq.quantizers.search.nested_affine import Tops, search_pairs

    tops = Tops(*(float(fmt.limits(name)[1]) for name in ("q", "sc", "m")))
    fields = (out[name] for name in ("d", "dmin", "sc", "m", "q"))
    search_pairs(*inputs, tops, fmt.group, _affine_plan(), REACH, *fields)


_SEARCHES = {
    "d * q": _scale,
    "d * q + m": _pair,
    "d * sc * q": _scales,
    "d * sc * q - dmin * m": _pairs,
}
