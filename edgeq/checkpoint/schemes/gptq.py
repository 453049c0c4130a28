"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them (Frantar et al. 2022, arXiv:2210.17323).

For each matrix [rows, cols]: `qweight` int32 [cols * bits / 32, rows], packed along the columns;
`scales` [groups, rows]; `qzeros` int32 [groups, rows * bits / 32], packed along the rows; mostly
`g_idx` int32 [cols] as well, the group of each column, in any order where `desc_act` was on.
The first version of the format stores zero points less one, the second (`gptq_v2`) as they are.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint.parts import Parts, unpack
from edgeq.errors import ModelError
from edgeq.grid import Grid

__all__ = ["METHODS", "find"]

METHODS = ("gptq",)
_BITS = (2, 3, 4, 8)
_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # to add to stored zero points


def find(parts: Parts, settings: Mapping[str, Any]) -> dict[str, "_Packed"]:
    """See `Scheme.find`."""
    kind = "marlin" if settings.get("is_marlin_format") else settings.get("checkpoint_format")
    if kind is not None and (not isinstance(kind, str) or kind not in _OFFSETS):
        raise ModelError(
            f"config.json: checkpoint_format = {kind!r:.60}: expected gptq or gptq_v2: convert the "
            "original checkpoint"
        )
    bits, offset = settings.get("bits", 4), _OFFSETS[kind or "gptq"]
    if type(bits) is not int or bits not in _BITS:
        raise ModelError(f"config.json: bits = {bits!r:.60}: expected one of 2, 3, 4, 8")
    ends = ".qweight"
    bases = [name.removesuffix(ends) for name in parts.tensors if name.endswith(ends)]
    return {f"{base}.weight": _Packed(parts, base, bits, offset) for base in bases}


class _Packed:
    """See `Packed`."""

    def __init__(self, parts: Parts, base: str, bits: int, offset: int) -> None:
        """bits: where the tensors themselves do not tell."""
        names = ("qweight", "qzeros", "scales", "g_idx")
        self.parts: tuple[str, ...] = tuple(f"{base}.{name}" for name in names)
        self._parts, self._offset = parts, offset
        words, rows = parts.need(self.parts[0], ("I32", "U32"), (None, None))
        cols = words * 32 // bits
        if self.parts[3] in parts:
            (cols,) = parts.need(self.parts[3], ("I32", "I64"), (None,))
            bits = words * 32 // cols
        if bits not in _BITS or words * 32 != cols * bits or cols % 32:
            problem = f"{words} words for {cols} columns: expected 2, 3, 4 or 8 bits for each"
            raise parts.error(self.parts[0], problem)
        self._bits, self.shape = bits, (rows, cols)
        groups, _ = parts.need(self.parts[2], ("F16", "BF16", "F32"), (None, rows))
        zeros = -(-rows * bits // 32)
        parts.need(self.parts[1], ("I32", "U32"), (groups, zeros))
        self._groups = groups
        bias = f"{base}.bias"  # AutoGPTQ adds zeros where the model has no bias
        if bias in parts and not parts.array(bias).any():
            self.parts = (*self.parts, bias)

    def check(self) -> None:
        """See `Packed.check`."""
        self._columns()

    def grid(self, start: int, stop: int) -> Grid:
        """See `Packed.grid`."""
        parts = self._parts
        rows, cols = self.shape
        words = np.ascontiguousarray(parts.array(self.parts[0])[:, start:stop].T)
        stored = unpack(parts.array(self.parts[1]), self._bits, rows)[:, start:stop].T
        zeros = (stored.astype(np.int16) + self._offset) & ((1 << self._bits) - 1)
        return Grid(
            unpack(words, self._bits, cols).astype(np.int16),
            np.ascontiguousarray(parts.array(self.parts[2])[:, start:stop].T, np.float32),
            zeros.astype(np.int16),
            self._columns(),
        )

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """See `Packed.read`."""
        return self.grid(start, stop).values()

    def _columns(self) -> NDArray[np.intp]:
        if self.parts[3] in self._parts:
            return self._parts.groups(self.parts[3], self.shape[1], self._groups)
        return self._parts.even_groups(self.parts[2], self.shape[1], self._groups)
