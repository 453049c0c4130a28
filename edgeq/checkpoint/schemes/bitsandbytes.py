"""bitsandbytes checkpoints: 4 bits with a code book (NF4, FP4), and int8.

4 bits (Dettmers et al. 2023, arXiv:2305.14314): `weight` holds two codes a byte, the first in the
upper half, over the whole matrix row by row; `weight.quant_map` float32 [16] is what codes mean,
`weight.absmax` the scale of each `blocksize` of them. With double quantization absmax is uint8:
nested_quant_map[absmax] * nested_absmax of its `nested_blocksize` + nested_offset. The numbers are
JSON in `weight.quant_state.bitsandbytes__nf4` (or fp4).

int8 (Dettmers et al. 2022, arXiv:2208.07339): `weight` int8, w = q * SCB / 127 with `SCB` per row.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint.files import parse_json
from edgeq.checkpoint.parts import Parts
from edgeq.checkpoint.schemes import Packed
from edgeq.grid import Grid

__all__ = ["METHODS", "find"]

METHODS = ("bitsandbytes",)
_STATE = ".quant_state.bitsandbytes__"
_FLOATS = ("F32", "F16", "BF16")
_MAX_STATE = 1 << 16  # bytes of JSON
_MAX_OFFSET = 1e38  # a float32; JSON has integers of any size, and NaN


def find(parts: Parts, settings: Mapping[str, Any]) -> dict[str, Packed]:
    """See `Scheme.find`."""
    found: dict[str, Packed] = {}
    for name in parts.tensors:
        if _STATE in name:
            weight = name.partition(_STATE)[0]
            found[weight] = _FourBits(parts, weight, name)
        elif name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            found[weight] = _Int8(parts, weight)
    return found


class _FourBits:
    """See `Packed`."""

    def __init__(self, parts: Parts, weight: str, state: str) -> None:
        kinds = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        self._absmax, self._map, self._nested, self._nested_map = (f"{weight}.{k}" for k in kinds)
        self._parts, self._weight, self._state = parts, weight, state
        self.parts = (weight, state, *(f"{weight}.{kind}" for kind in kinds))
        values = self._values()
        shape = values.get("shape")
        sizes = shape if isinstance(shape, list) else []
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise parts.error(state, f"shape = {shape!r:.60}: expected two whole numbers")
        self.shape = (sizes[0], sizes[1])
        tensor = parts.tensors.get(weight)
        count = math.prod(self.shape)
        if tensor is None or tensor.nbytes != -(-count // 2):
            nbytes = None if tensor is None else tensor.nbytes
            raise parts.error(weight, f"{nbytes} bytes: expected {-(-count // 2)} for {self.shape}")
        parts.need(self._map, _FLOATS, (16,))
        self._block = self._size(values, "blocksize", count)
        scales = -(-count // self._block)
        self._double = self._nested in parts
        if not self._double:
            parts.need(self._absmax, _FLOATS, (scales,))
            return
        parts.need(self._absmax, ("U8",), (scales,))
        parts.need(self._nested_map, _FLOATS, (256,))
        self._nested_block = self._size(values, "nested_blocksize", count)
        parts.need(self._nested, _FLOATS, (-(-scales // self._nested_block),))
        offset = values.get("nested_offset")
        if not isinstance(offset, int | float) or not abs(offset) <= _MAX_OFFSET:
            raise parts.error(state, f"nested_offset = {offset!r:.60}: expected a number")
        self._offset = np.float32(offset)

    def _values(self) -> dict[str, Any]:
        (size,) = self._parts.need(self._state, ("U8",), (None,))
        if size > _MAX_STATE:
            raise self._parts.error(self._state, f"{size} bytes: expected at most {_MAX_STATE}")
        text = self._parts.array(self._state).tobytes()
        values = parse_json(text, f"{self._parts.where}: {self._state}")
        if not isinstance(values, dict):
            raise self._parts.error(self._state, "expected a JSON object")
        return values

    def _size(self, values: dict[str, Any], key: str, count: int) -> int:
        """A size of blocks, at most `count`: whole blocks are held in memory."""
        value = values.get(key)
        if type(value) is not int or not 1 <= value <= count:
            problem = f"{key} = {value!r:.60}: expected 1 to {count}, the number of weights"
            raise self._parts.error(self._state, problem)
        return value

    def check(self) -> None:
        """See `Packed.check`."""

    def grid(self, start: int, stop: int) -> None:
        """See `Packed.grid`: the levels are not evenly spaced."""
        return None

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """See `Packed.read`."""
        first, last = start * self.shape[1], stop * self.shape[1]
        packed = self._parts.codes(self._weight)[first // 2 : -(-last // 2)]
        codes = np.stack([packed >> np.uint8(4), packed & np.uint8(15)], axis=1).reshape(-1)
        codes = codes[first % 2 : first % 2 + last - first]
        w = self._parts.array(self._map).astype(np.float32)[codes]
        w *= self._scales(first // self._block, -(-last // self._block)).repeat(self._block)[
            first % self._block : first % self._block + last - first
        ]
        return w.reshape(stop - start, -1)

    def _scales(self, first: int, last: int) -> NDArray[np.float32]:
        """Scales of blocks first..last."""
        stored = self._parts.array(self._absmax)[first:last]
        if not self._double:
            return stored.astype(np.float32)
        outer = np.arange(first, last) // self._nested_block
        scale = self._parts.array(self._nested).astype(np.float32)[outer]
        levels = self._parts.array(self._nested_map).astype(np.float32)
        return np.asarray(levels[stored] * scale + self._offset, np.float32)


class _Int8:
    """See `Packed`."""

    def __init__(self, parts: Parts, weight: str) -> None:
        base = weight.removesuffix("weight")
        self._parts, self._weight, self._scb = parts, weight, f"{base}SCB"
        self._format = f"{base}weight_format"
        self.parts: tuple[str, ...] = (weight, self._scb, self._format)
        rows, cols = parts.need(weight, ("I8",), (None, None))
        parts.need(self._scb, _FLOATS, (rows,))
        self.shape = (rows, cols)

    def check(self) -> None:
        """See `Packed.check`: other layouts than rows exist, for certain GPUs."""
        if self._format in self._parts:
            self._parts.need(self._format, ("U8",), ())
            if int(self._parts.array(self._format)):
                raise self._parts.error(self._format, "expected 0 (row): save it again on a CPU")

    def grid(self, start: int, stop: int) -> Grid:
        """See `Packed.grid`."""
        scale = self._parts.array(self._scb)[start:stop, None].astype(np.float32) / np.float32(127)
        return Grid(
            self._parts.rows(self._weight, start, stop) + np.int16(128),
            scale,
            np.full(scale.shape, 128, np.int16),
            np.zeros(self.shape[1], np.intp),
        )

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """See `Packed.read`."""
        return self.grid(start, stop).values()
