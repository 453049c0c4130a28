"""Tensors that together make one weight of a quantized checkpoint."""

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint.safetensors import HfTensor, numbers
from edgeq.errors import ModelError

__all__ = ["Parts", "unpack"]

_KEPT = 6  # arrays: all parts of the weight that is being read


class Parts:
    """All tensors of a checkpoint by their names in the files, in the types stored there."""

    def __init__(
        self,
        where: Path,
        tensors: Mapping[str, HfTensor],
        read: Callable[[HfTensor, int, int], NDArray[np.uint8]],
    ) -> None:
        """read: bytes of rows start..stop of a tensor. where: for messages."""
        self.where, self.tensors, self._read = where, tensors, read
        self._kept: dict[str, NDArray[Any]] = {}
        self._keeping = Lock()  # several threads read rows

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop of a matrix, [stop - start, cols]. Raises ResourceError."""
        tensor = self.tensors[name]
        return numbers(self._read(tensor, start, stop), tensor.dtype).reshape(-1, tensor.cols)

    def codes(self, name: str) -> NDArray[np.uint8]:
        """All bytes of a tensor, whatever its type; kept as `array` keeps."""
        tensor = self.tensors[name]
        return self._keep(f"bytes of {name}", lambda: self._read(tensor, 0, tensor.rows))

    def array(self, name: str) -> NDArray[Any]:
        """A whole tensor; the last few are kept in memory. Raises ResourceError."""
        tensor = self.tensors[name]
        return self._keep(name, lambda: self.rows(name, 0, tensor.rows).reshape(tensor.shape))

    def _keep(self, key: str, load: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        with self._keeping:
            if key not in self._kept:
                while len(self._kept) >= _KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[key] = load()
            return self._kept[key]

    def need(
        self, name: str, types: tuple[str, ...], shape: tuple[int | None, ...]
    ) -> tuple[int, ...]:
        """Shape of a tensor that must be there, of one of these types; None fits any size but 0.

        Raises ModelError.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise self.error(name, "is missing: the checkpoint is incomplete: download it again")
        if tensor.dtype not in types:
            raise self.error(name, f"type {tensor.dtype}: expected {' or '.join(types)}")
        fits = len(tensor.shape) == len(shape) and all(
            found == wanted if wanted is not None else found > 0
            for found, wanted in zip(tensor.shape, shape)
        )
        if not fits:
            sizes = " x ".join("any" if size is None else str(size) for size in shape)
            raise self.error(name, f"shape {tensor.shape}: expected {sizes}")
        return tensor.shape

    def error(self, name: str, problem: str) -> ModelError:
        """What is wrong with a tensor, to be raised."""
        return ModelError(f"{self.where}: {name}: {problem}")

    def groups(self, name: str, cols: int, count: int) -> NDArray[np.intp]:
        """Group of each column [cols] as the tensor `name` lists them, each below `count`.

        Raises ModelError for numbers out of range.
        """
        self.need(name, ("I32", "I64"), (cols,))
        group = self.array(name)
        if group.min() < 0 or group.max() >= count:
            wrong = int(group[(group < 0) | (group >= count)][0])
            raise self.error(name, f"group {wrong}: expected 0 to {count - 1}")
        return group.astype(np.intp)

    def even_groups(self, name: str, cols: int, count: int) -> NDArray[np.intp]:
        """Group of each column [cols] when `count` groups follow each other; name: of the scales.

        Raises ModelError when the columns cannot be divided so.
        """
        size = -(-cols // count)
        if -(-cols // size) != count:
            raise self.error(name, f"{count} groups for {cols} columns: expected equal groups")
        return np.arange(cols, dtype=np.intp) // size


def unpack(words: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """Codes of `bits` bits [rows, count] from 32-bit words [rows, n], lowest bits first.

    Codes follow each other without a gap, over the ends of words as well.

    >>> unpack(np.array([[0x87654321]], np.uint32), 4, 8).tolist()
    [[1, 2, 3, 4, 5, 6, 7, 8]]
    """
    rows, n = words.shape
    chains = -(-n // bits)  # of `bits` words, which hold 32 codes
    lanes = np.zeros((rows, chains * bits), np.uint32)
    lanes[:, :n] = words.view(np.uint32)
    lanes = lanes.reshape(rows, chains, bits)
    codes = np.empty((rows, chains, 32), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = lanes[:, :, word] >> np.uint32(shift)
        if shift + bits > 32:
            code |= lanes[:, :, word + 1] << np.uint32(32 - shift)
        codes[:, :, i] = code & mask
    return codes.reshape(rows, -1)[:, :count]
