"""Scale tensors that belong to FP8 weights: which weight each is for, and how it is spread over it.

Three layouts exist, told apart by shape: one number per tensor, one per row (compressed-tensors),
and one per block of 128 x 128 (DeepSeek-V3, arXiv:2412.19437, section 3.3.2). The scale always
multiplies, also under the name `weight_scale_inv`: it is the inverse of the factor used when
quantizing.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint.safetensors import HfTensor
from edgeq.checkpoint.schemes import settings
from edgeq.errors import ModelError

__all__ = ["Scale", "block_shape", "scale_names"]

_SUFFIXES = ("_scale_inv", "_scale")


def scale_names(tensors: Mapping[str, HfTensor]) -> dict[str, str]:
    """FP8 weight name -> name of its scale tensor, for those that have one."""
    pairs = {}
    for name, tensor in tensors.items():
        if tensor.dtype.startswith("F8_E4M3"):
            found = [name + suffix for suffix in _SUFFIXES if name + suffix in tensors]
            if found:
                pairs[name] = found[0]
    return pairs


class Scale:
    """Factors of one FP8 weight, spread over any range of its rows."""

    def __init__(
        self,
        values: NDArray[np.float32],
        weight: tuple[int, ...],
        block: tuple[int, int] = (128, 128),
        where: str = "scale",
    ) -> None:
        """values: [], [1], [rows], [rows, 1] or [rows / block, cols / block], rounded up.

        weight: shape (rows, cols) of the weight. Raises ModelError when the shapes do not fit.
        """
        rows, cols = weight if len(weight) == 2 else (1, weight[-1] if weight else 1)
        blocks = (-(-rows // block[0]), -(-cols // block[1]))
        if values.size == 1:
            self._values, self._block = values.reshape(1, 1), (rows, cols)
        elif values.shape in ((rows,), (rows, 1)):
            self._values, self._block = values.reshape(rows, 1), (1, cols)
        elif values.shape == blocks:
            self._values, self._block = values, block
        else:
            raise ModelError(
                f"{where}: shape {values.shape} does not fit a weight of shape {weight}: expected "
                f"one number, {rows} rows or {blocks[0]} x {blocks[1]} blocks"
            )

    def apply(self, w: NDArray[np.float32], start: int) -> None:
        """Multiply rows w [n, cols], which begin at row `start` of the weight, in place.

        >>> w = np.ones((2, 4), np.float32)
        >>> Scale(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), (4, 4), (2, 2)).apply(w, 1)
        >>> w.tolist()
        [[1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0]]
        """
        per_row, per_col = self._block
        lines = self._values[np.arange(start, start + len(w)) // max(per_row, 1)]
        for i in range(lines.shape[1]):
            w[:, i * per_col : (i + 1) * per_col] *= lines[:, i : i + 1]


def block_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale: `quantization_config.weight_block_size`, or 128 x 128.

    Raises ModelError when it is not a pair of positive whole numbers.

    >>> block_shape({"quantization_config": {"weight_block_size": [64, 128]}})
    (64, 128)
    """
    size = settings(config).get("weight_block_size") or [128, 128]
    good = isinstance(size, list) and len(size) == 2
    if not good or not all(type(item) is int and item > 0 for item in size):
        raise ModelError(f"config.json: weight_block_size = {size!r}: expected two whole numbers")
    return size[0], size[1]
