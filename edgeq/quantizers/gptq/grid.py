"""Blocks of any family, written one way: value = (A a) level + (B b).

A and B are a block's numbers of f16, a and b a whole number per group, or 1 where the format has
none.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.blocks import BlockFormat

__all__ = ["Grid"]

Array = NDArray[np.float32]
Fields = dict[str, NDArray[Any]]


class _Factor:
    """One of the two products: a number per block [rows, blocks] and one per group [rows, groups].

    low, high: limits of the latter; equal where it is 1 and not stored.
    """

    def __init__(self, scale: NDArray[Any], whole: NDArray[Any] | None, limits: tuple[int, int]):
        self.scale = scale.astype(np.float32)
        if whole is None:
            whole, limits = np.ones_like(self.scale), (1, 1)
        self.whole = whole.reshape(len(scale), -1).astype(np.float32)
        self.low, self.high = np.float32(limits[0]), np.float32(limits[1])

    def product(self) -> Array:
        """[rows, groups]"""
        return np.repeat(self.scale, self.whole.shape[1] // self.scale.shape[1], 1) * self.whole


class Grid:
    """Rows of blocks: their codes, int32 [rows, cols], and what the codes mean."""

    def __init__(self, fields: Fields, fmt: BlockFormat) -> None:
        self.fmt, self.even = fmt, fmt.table is None
        first, last = fmt.limits("q")
        levels = range(first, last + 1) if fmt.table is None else fmt.table
        self.table = np.array(levels, np.float32)
        self._first = first if self.even else 0
        codes = fields["q"].reshape(len(fields["q"]), -1).astype(np.int32) - self._first
        self.codes: NDArray[np.int32] = np.ascontiguousarray(codes)
        self._steps = self._factor(fields, "d", "sc")
        # A stored minimum is subtracted; the smaller the format, the fewer of these names it has.
        self._bases = None
        if "m" in fields:
            nested = "dmin" in fields
            self._bases = self._factor(fields, *(("dmin", "m") if nested else ("m", "")))
            self._bases.scale *= np.float32(-1 if nested else 1)

    def _factor(self, fields: Fields, scale: str, whole: str) -> _Factor:
        nested = whole in fields
        limits = self.fmt.limits(whole) if nested else (1, 1)
        return _Factor(fields[scale], fields[whole] if nested else None, limits)

    @staticmethod
    def join(parts: "Sequence[Grid]") -> "Grid":
        """Grids side by side."""
        fields = [part.fields() for part in parts]
        joined = {name: np.concatenate([f[name] for f in fields], axis=1) for name in fields[0]}
        return Grid(joined, parts[0].fmt)

    def fields(self) -> Fields:
        """As `edgeq.blocks.unpack` shapes them, integers as int8."""
        rows, blocks = self._steps.scale.shape
        integers: Fields = {"sc": self._steps.whole, "q": self.codes + self._first}
        numbers: Fields = {"d": self._steps.scale}
        if self._bases is not None and "dmin" in self.fmt.fields:
            numbers["dmin"], integers["m"] = -self._bases.scale, self._bases.whole
        elif self._bases is not None:
            numbers["m"] = self._bases.scale
        found = {
            name: array.reshape(rows, blocks, -1).astype(np.int8)
            for name, array in integers.items()
        }
        return {name: (numbers | found)[name] for name in self.fmt.fields}

    def steps(self) -> tuple[Array, Array]:
        """Distance of levels, and what is added to them: float32 [rows, groups] each."""
        steps = self._steps.product()
        bases = np.zeros_like(steps) if self._bases is None else self._bases.product()
        return steps, bases

    def values(self) -> Array:
        """What the blocks stand for, float32 [rows, cols]."""
        steps, bases = (
            np.repeat(each, self.codes.shape[1] // each.shape[1], 1) for each in self.steps()
        )
        return steps * self.table[self.codes] + bases

    def descend(self, gradient: Array, hessian: Array) -> Array:
        """Scales, offsets and codes that are better for (w - values) H (w - values)^T, each the
        best one for all others as they are; how that changes the values, float32 [rows, cols].

        gradient: (w - values) H, float32 [rows, cols]. hessian: H, float32 [cols, cols]. Both of
        these columns only; neither is changed.
        """
        from edgeq.quantizers.gptq.kernels import descend_codes, descend_scales

        before, left = self.values(), np.array(gradient, np.float32, order="C")
        own = np.ascontiguousarray(hessian)
        for factor in (self._steps, self._bases):
            if factor is not None:
                found = self.codes, left, factor.scale, factor.whole
                ends, leveled = (factor.low, factor.high), factor is self._steps
                descend_scales(*found, *ends, self.table, leveled, own)
        descend_codes(self.codes, left, *self.steps(), self.table, self.even, own)
        return self.values() - before
