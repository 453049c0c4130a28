"""Inputs of matrix products: activations as f32 and as int8 with their scales and sums."""

import numpy as np
from numpy.typing import NDArray

from edgeq.kernels.program import aligned

__all__ = ["Inputs"]

LINE = 128  # bytes: two cache lines, which are fetched together

# Bytes per value; see rows.quantize_row for what each holds.
PARTS = {
    "h": 4.0,
    "codes": 1.0,
    "d": 4 / 32,
    "sums16": 4 / 16,
    "sums32": 4 / 32,
    "ints16": 4 / 16,
    "ints32": 4 / 32,
}


class Inputs:
    """Room for `rows` rows of up to `width` values, once or in `copies` copies, one per thread."""

    def __init__(self, rows: int, width: int, copies: int = 1) -> None:
        values = rows * -(-width // 32) * 32
        self._rows = rows
        self._places: dict[str, int] = {}
        size = 0
        for name, each in PARTS.items():
            self._places[name] = size
            size += -(-int(values * each) // LINE) * LINE
        self._memory = aligned(size * copies)
        self.private = size if copies > 1 else 0  # bytes from one copy to the next

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def at(self, name: str) -> int:
        """Address of a part, in the first copy."""
        start: np.ndarray = self._memory[self._places[name] :]
        return int(start.ctypes.data)

    def floats(self, cols: int) -> NDArray[np.float32]:
        """View of the activations as f32 [rows, cols], in the first copy."""
        start: NDArray[np.uint8] = self._memory[self._places["h"] :]
        return start[: 4 * self._rows * cols].view(np.float32).reshape(self._rows, cols)
