"""Weights that are integers already: kept as they are where the format to write can hold them.

A quantized checkpoint says w = scale * (q - zero), one scale and zero point for a group of columns.
Q4_0, Q8_0 and their kin say the same of blocks of 32, so nothing needs to be quantized again.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq.blocks import BlockFormat

__all__ = ["Grid", "Ready", "half"]


class Ready(NamedTuple):
    """Fields of blocks that need no quantizer, and where they are true: exact [rows, blocks].

    Elsewhere the fields are 0.
    """

    fields: dict[str, NDArray[Any]]  # shaped as `edgeq.blocks.unpack` returns them; integers int8
    exact: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows of a matrix as integers: w = scale * (q - zero)."""

    q: NDArray[np.int16]  # [rows, cols], >= 0
    scale: NDArray[np.float32]  # [rows, groups]
    zero: NDArray[np.int16]  # [rows, groups]
    group: NDArray[np.intp]  # [cols]: the group of each column

    def values(self) -> NDArray[np.float32]:
        """The weights, float32 [rows, cols].

        >>> grid = Grid(np.int16([[8, 9]]), np.float32([[0.5]]), np.int16([[8]]), np.zeros(2, int))
        >>> grid.values().tolist()
        [[0.0, 0.5]]
        """
        steps = (self.q - self.zero[:, self.group]).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # the reader looks for such numbers
            steps *= self.scale[:, self.group]
        return steps

    def fields(self, fmt: BlockFormat) -> Ready | None:
        """These integers as blocks of `fmt`; None when it has no place for them.

        A block is exact when its weights share a scale and the format has their integers. Scale,
        and scale times zero point, are rounded to the 16 bits of the format.

        >>> from edgeq import blocks
        >>> q = np.arange(32, dtype=np.int16)[None] // 2
        >>> grid = Grid(q, np.float32([[0.5]]), np.int16([[8]]), np.zeros(32, int))
        >>> ready = grid.fields(blocks.get("Q4_0"))
        >>> ready.fields["d"], ready.fields["q"][0, 0, :4], ready.exact
        (array([[0.5]], dtype=float32), array([-8, -8, -7, -7], dtype=int8), array([[ True]]))
        """
        rows, cols = self.q.shape
        if fmt.table is not None or fmt.value not in ("d * q", "d * q + m") or cols % fmt.block:
            return None
        group = self.group.reshape(-1, fmt.block)
        shared = (group == group[:, :1]).all(axis=1)
        if not shared.any():
            return None
        d, zero = self.scale[:, group[:, 0]], self.zero[:, group[:, 0]]
        codes = self.q.reshape(rows, -1, fmt.block)
        exact = shared & (np.abs(half(d) - d) <= 2.0**-10 * np.abs(d))
        real = {"d": d}
        if "m" in fmt.fields:
            m = real["m"] = np.asarray(-d * zero, np.float32)
            exact &= np.abs(half(m) - m) <= np.abs(d) / 64
        else:
            codes = codes - zero[..., None]
        low, high = fmt.limits("q")
        exact &= (codes.min(axis=-1) >= low) & (codes.max(axis=-1) <= high)
        fields = {name: np.where(exact, values, 0) for name, values in real.items()}
        return Ready({**fields, "q": (codes * exact[..., None]).astype(np.int8)}, exact)


def half(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What 16 bits keep of values, as float32; infinite where they are too large.

    >>> half(np.float32([1.0002, 1e6])).tolist()
    [1.0, inf]
    """
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)
