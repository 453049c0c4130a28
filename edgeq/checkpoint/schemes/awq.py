"""AWQ checkpoints as AutoAWQ's GEMM version writes them (Lin et al. 2023, arXiv:2306.00978).

For each matrix [rows, cols]: `qweight` int32 [cols, rows / 8], `qzeros` int32 [groups, rows / 8]
and `scales` [groups, rows]. A word holds the codes of 8 neighbouring rows, 4 bits each; from its
lowest bits up they are of rows 0, 2, 4, 6, 1, 3, 5, 7.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint.parts import Parts, unpack
from edgeq.errors import ModelError
from edgeq.grid import Grid

__all__ = ["METHODS", "find"]

METHODS = ("awq",)
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def find(parts: Parts, settings: Mapping[str, Any]) -> dict[str, "_Packed"]:
    """See `Scheme.find`."""
    version = settings.get("version") or settings.get("checkpoint_format") or "gemm"
    bits = settings.get("bits", settings.get("w_bit", 4))
    if str(version).lower() != "gemm" or bits != 4:
        raise ModelError(
            f"config.json: AWQ version = {version!r:.60}, bits = {bits!r:.60}: expected gemm, "
            "4: convert the original checkpoint"
        )
    ends = ".qweight"
    bases = [name.removesuffix(ends) for name in parts.tensors if name.endswith(ends)]
    return {f"{base}.weight": _Packed(parts, base) for base in bases}


class _Packed:
    """See `Packed`."""

    def __init__(self, parts: Parts, base: str) -> None:
        self.parts = (f"{base}.qweight", f"{base}.qzeros", f"{base}.scales")
        self._parts = parts
        cols, words = parts.need(self.parts[0], ("I32", "U32"), (None, None))
        self.shape = (8 * words, cols)
        groups, _ = parts.need(self.parts[2], ("F16", "BF16", "F32"), (None, 8 * words))
        parts.need(self.parts[1], ("I32", "U32"), (groups, words))
        self._group = parts.even_groups(self.parts[2], cols, groups)

    def check(self) -> None:
        """See `Packed.check`."""

    def grid(self, start: int, stop: int) -> Grid:
        """See `Packed.grid`."""
        scales = self._parts.array(self.parts[2])[:, start:stop].T
        return Grid(
            self._codes(self.parts[0], start, stop),
            np.ascontiguousarray(scales, np.float32),
            self._codes(self.parts[1], start, stop),
            self._group,
        )

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """See `Packed.read`."""
        return self.grid(start, stop).values()

    def _codes(self, name: str, start: int, stop: int) -> NDArray[np.int16]:
        """Codes of rows start..stop, [stop - start, length of the packed tensor]."""
        first, last = start // 8, -(-stop // 8)
        words = np.ascontiguousarray(self._parts.array(name)[:, first:last])
        packed = unpack(words, 4, 8 * (last - first)).reshape(len(words), -1, 8)
        codes = packed[:, :, np.argsort(_ORDER)].reshape(len(words), -1)
        inside = codes[:, start - 8 * first : stop - 8 * first]
        return np.ascontiguousarray(inside.T, np.int16)
