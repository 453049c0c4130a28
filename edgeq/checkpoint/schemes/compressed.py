"""Checkpoints of llm-compressor (https://github.com/vllm-project/compressed-tensors).

pack-quantized: `weight_packed` int32 [rows, cols * bits / 32] holds q + 2^(bits - 1), lowest bits
first; `weight_shape`; `weight_scale` [rows, groups]; `weight_zero_point`, where they are not all 0,
packed alike but along the rows; sometimes `weight_g_idx`, the group of each column.
int-quantized: `weight` int8 and `weight_scale` [rows, groups] or one number.
float-quantized is left to checkpoint.float8.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint.parts import Parts, unpack
from edgeq.checkpoint.schemes import Packed
from edgeq.errors import ModelError
from edgeq.grid import Grid

__all__ = ["METHODS", "find"]

METHODS = ("compressed-tensors",)
_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
    "dense",
)
_BITS = (2, 4, 8)
_FLOATS = ("F32", "F16", "BF16")


def find(parts: Parts, settings: Mapping[str, Any]) -> dict[str, Packed]:
    """See `Scheme.find`."""
    _refuse(settings)
    found: dict[str, Packed] = {}
    for name, tensor in parts.tensors.items():
        if name.endswith(".weight_packed"):
            base = name.removesuffix("_packed")
            found[base] = _Words(parts, base)
        elif name.endswith(".weight") and tensor.dtype == "I8":
            found[name] = _Bytes(parts, name)
    return found


def _refuse(settings: Mapping[str, Any]) -> None:
    """Ways to store weights that are not read, before any tensor is misread."""
    sparsity = settings.get("sparsity_config")
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, dict) else "dense"
    kind = settings.get("format") or "dense"
    advice = "convert the original checkpoint"
    if kind not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise ModelError(f"config.json: format = {kind!r:.60}: expected one of {known}: {advice}")
    if sparse != "dense":
        raise ModelError(f"config.json: sparsity format = {sparse!r:.60}: expected dense: {advice}")
    if settings.get("transform_config"):
        raise ModelError(f"config.json: transform_config: rotations are not supported: {advice}")


class _Rows:
    """What both layouts share: scales [rows, groups], zero points, groups of columns."""

    def __init__(self, parts: Parts, base: str, shape: tuple[int, int]) -> None:
        self._parts, self.shape = parts, shape
        self._scale, self._zero = f"{base}_scale", f"{base}_zero_point"
        self._index = f"{base}_g_idx"
        self.parts: tuple[str, ...] = (
            f"{base}_packed",
            f"{base}_shape",
            self._scale,
            self._zero,
            self._index,
            base,
        )
        scale = parts.tensors.get(self._scale)
        self._single = scale is not None and scale.shape in ((), (1,)) and shape[0] != 1
        if self._single:
            parts.need(self._scale, _FLOATS, scale.shape if scale else ())
            self._groups = 1
        else:
            flat = scale is not None and len(scale.shape) == 1
            sizes = parts.need(self._scale, _FLOATS, (shape[0],) if flat else (shape[0], None))
            self._groups = 1 if flat else sizes[1]

    def check(self) -> None:
        """See `Packed.check`."""
        self._columns()

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """See `Packed.read`."""
        return self.grid(start, stop).values()

    def grid(self, start: int, stop: int) -> Grid:
        """See `Packed.grid`."""
        scale = self._parts.array(self._scale).astype(np.float32)
        scale = np.broadcast_to(scale.reshape(-1, self._groups), (self.shape[0], self._groups))
        codes, middle = self._codes(start, stop)
        zero = np.full((stop - start, self._groups), middle, np.int16)
        if self._zero in self._parts:
            zero = self._zeros(start, stop)
        return Grid(codes, scale[start:stop], zero, self._columns())

    def _codes(self, start: int, stop: int) -> tuple[NDArray[np.int16], int]:
        """Codes >= 0 [stop - start, cols], and the one that means 0."""
        raise NotImplementedError

    def _zeros(self, start: int, stop: int) -> NDArray[np.int16]:
        """Zero points [stop - start, groups], as codes."""
        raise NotImplementedError

    def _columns(self) -> NDArray[np.intp]:
        cols = self.shape[1]
        unused = self._index not in self._parts
        if not unused and self._parts.tensors[self._index].shape == (cols,):
            unused = bool((self._parts.array(self._index) == -1).all())
        if unused:
            return self._parts.even_groups(self._scale, cols, self._groups)
        return self._parts.groups(self._index, cols, self._groups)


class _Words(_Rows):
    """See `Packed`: codes in 32-bit words."""

    def __init__(self, parts: Parts, base: str) -> None:
        self._packed = f"{base}_packed"
        rows, words = parts.need(self._packed, ("I32", "U32"), (None, None))
        parts.need(f"{base}_shape", ("I64", "I32"), (2,))
        stored, cols = (int(size) for size in parts.array(f"{base}_shape"))
        fits = [bits for bits in _BITS if cols > 0 and -(-cols * bits // 32) == words]
        if stored != rows or not fits:
            found = f"{stored} x {cols}: expected {rows} rows of {words} words of 2, 4 or 8 bits"
            raise parts.error(f"{base}_shape", found)
        self._bits = fits[0]
        super().__init__(parts, base, (rows, cols))
        if self._zero in parts:
            if parts.tensors[self._zero].dtype == "I8":
                parts.need(self._zero, ("I8",), (rows, self._groups))
            else:
                packed = -(-rows * self._bits // 32)
                parts.need(self._zero, ("I32", "U32"), (packed, self._groups))

    def _codes(self, start: int, stop: int) -> tuple[NDArray[np.int16], int]:
        words = self._parts.rows(self._packed, start, stop)
        codes = unpack(words, self._bits, self.shape[1]).astype(np.int16)
        return codes, 1 << (self._bits - 1)

    def _zeros(self, start: int, stop: int) -> NDArray[np.int16]:
        stored = self._parts.array(self._zero)
        if stored.dtype == np.int8:  # releases before 0.10 did not pack them
            return stored[start:stop] + np.int16(1 << (self._bits - 1))
        words = np.ascontiguousarray(stored.T)
        return unpack(words, self._bits, self.shape[0]).T[start:stop].astype(np.int16)


class _Bytes(_Rows):
    """See `Packed`: int8."""

    def __init__(self, parts: Parts, name: str) -> None:
        self._name = name
        rows, cols = parts.need(name, ("I8",), (None, None))
        super().__init__(parts, name, (rows, cols))
        if self._zero in parts:
            size = 1 if self._single else rows
            shapes = ((size, self._groups), (size,), ())
            if parts.tensors[self._zero].shape not in shapes[: 3 if size == 1 else 2]:
                parts.need(self._zero, ("I8",), shapes[0])
            parts.need(self._zero, ("I8",), parts.tensors[self._zero].shape)

    def _codes(self, start: int, stop: int) -> tuple[NDArray[np.int16], int]:
        return self._parts.rows(self._name, start, stop) + np.int16(128), 128

    def _zeros(self, start: int, stop: int) -> NDArray[np.int16]:
        stored = self._parts.array(self._zero).reshape(-1, self._groups) + np.int16(128)
        return np.broadcast_to(stored, (self.shape[0], self._groups))[start:stop]
