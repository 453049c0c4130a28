"""Strict reader of safetensors files (https://github.com/huggingface/safetensors, format section).

The header is checked completely against the file before anything is allocated from it. Data is read
with `pread` and not mapped: a conversion reads every byte once, and so a file that shrinks
meanwhile is an error message instead of a SIGBUS, and pages already read do not count as this
process's memory.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint.files import open_regular, parse_json
from edgeq.errors import FormatError, ModelError, ResourceError

__all__ = [
    "READABLE",
    "HfTensor",
    "SafetensorsFile",
    "first_nonfinite",
    "float8_e4m3",
    "numbers",
    "read_header",
    "to_float32",
]

# Bytes per element of every type of the format; only READABLE ones can become weights.
_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
READABLE = ("F32", "F16", "BF16", "F8_E4M3")

_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_DIMS = 8
_PIECE = 1 << 15  # numbers converted at a time: they stay in the cache


@dataclass(frozen=True, slots=True)
class HfTensor:
    """Where one tensor of a checkpoint lies."""

    shape: tuple[int, ...]
    dtype: str  # safetensors name: "F32", "BF16", "F8_E4M3", ...
    file: Path
    offset: int  # bytes from the start of the file
    nbytes: int

    @property
    def rows(self) -> int:
        """Rows along the first dimension; vectors and scalars count as one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def cols(self) -> int:
        """Elements per row."""
        return math.prod(self.shape[1:] if len(self.shape) > 1 else self.shape)


class SafetensorsFile:
    """One open file: `tensors` by name, and their raw rows."""

    def __init__(self, path: Path) -> None:
        """Open and check `path`. Raises FormatError, ResourceError."""
        self.path = path
        self._fd, size = open_regular(path)
        try:
            self.tensors = read_header(self._fd, size, path)
        except BaseException:
            os.close(self._fd)
            raise

    def raw(self, tensor: HfTensor, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes of rows start..stop. Raises ResourceError when the disk fails."""
        row = tensor.nbytes // max(tensor.rows, 1)
        raw = np.empty((stop - start) * row, np.uint8)
        self._fill(raw, tensor.offset + start * row)
        return raw

    def rows(self, tensor: HfTensor, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop as float32 [stop - start, cols], before any scale.

        Raises ModelError for a type that cannot be read, ResourceError when the disk fails.
        """
        raw = self.raw(tensor, start, stop)
        if tensor.dtype not in READABLE:
            known = ", ".join(READABLE)
            raise ModelError(f"{self.path}: type {tensor.dtype}: expected one of {known}")
        return to_float32(raw, tensor.dtype).reshape(stop - start, tensor.cols)

    def _fill(self, raw: NDArray[np.uint8], offset: int) -> None:
        view = memoryview(raw.data)
        while view:
            try:
                n = os.preadv(self._fd, [view[: 1 << 30]], offset)
            except OSError as error:
                raise ResourceError(f"{self.path}: cannot be read: {error.strerror}") from error
            if n == 0:
                raise ResourceError(f"{self.path}: ends at byte {offset}: it changed while open")
            view, offset = view[n:], offset + n

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_header(fd: int, size: int, path: Path) -> dict[str, HfTensor]:
    """Tensors of an open file of `size` bytes, in file order.

    Raises FormatError unless header, types, shapes and offsets describe exactly this file: no gap,
    no overlap, no byte left over.
    """
    length = int.from_bytes(os.pread(fd, 8, 0), "little") if size >= 8 else 0
    if size < 10:
        raise FormatError(f"{path}: {size} bytes: too short for safetensors (download incomplete?)")
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise FormatError(
            f"{path}: header length {length}: expected 2 to {min(_MAX_HEADER, size - 8)}"
        )
    text = os.pread(fd, length, 8)
    if len(text) != length or text[:1] != b"{" or not text.rstrip(b" ").endswith(b"}"):
        raise FormatError(f"{path}: header is not a JSON object: not a safetensors file?")
    table = parse_json(text, str(path))
    _check_metadata(table.pop("__metadata__", {}), path)
    tensors = {name: _tensor(name, entry, 8 + length, path) for name, entry in table.items()}
    return _in_file_order(tensors, 8 + length, size, path)


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path}: __metadata__: expected a table of strings")


def _tensor(name: str, entry: Any, base: int, path: Path) -> HfTensor:
    """Checked header entry; `base` is the first byte of data."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: expected the fields dtype, shape and data_offsets only")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise FormatError(f"{where}: dtype = {dtype!r}: expected one of {', '.join(READABLE)}")
    shape = _counts(entry["shape"], f"{where}: shape", range(_MAX_DIMS + 1))
    begin, end = _counts(entry["data_offsets"], f"{where}: data_offsets", range(2, 3))
    nbytes = math.prod(shape) * _SIZES[dtype]
    if end - begin != nbytes:
        raise FormatError(f"{where}: data_offsets span {end - begin} bytes, shape needs {nbytes}")
    return HfTensor(shape, dtype, path, base + begin, nbytes)


def _counts(value: Any, where: str, lengths: range) -> tuple[int, ...]:
    """A JSON list of non-negative integers as a tuple."""
    good = isinstance(value, list) and len(value) in lengths
    if not good or not all(type(item) is int and item >= 0 for item in value):
        raise FormatError(f"{where} = {str(value)[:60]}: expected a list of whole numbers >= 0")
    return tuple(value)


def _in_file_order(
    tensors: Mapping[str, HfTensor], base: int, size: int, path: Path
) -> dict[str, HfTensor]:
    """`tensors` sorted by offset, which must tile base..size exactly."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    position = base
    for name, tensor in ordered:
        if tensor.offset != position:
            raise FormatError(
                f"{path}: tensor {name!r} starts at byte {tensor.offset}: expected {position}"
            )
        position += tensor.nbytes
    if position != size:
        raise FormatError(f"{path}: {size} bytes: expected {position} (download incomplete?)")
    return dict(ordered)


def to_float32(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Little-endian bytes of a READABLE type as float32 [n].

    >>> to_float32(np.array([0x80, 0x3F, 0x20, 0xC0], np.uint8), "BF16").tolist()
    [1.0, -2.5]
    """
    if dtype == "F32":
        return raw.view(np.float32)
    if dtype == "F16":
        return _from_half(raw.view(np.int16))
    if dtype == "BF16":  # the upper half of a float32
        wide = np.empty(raw.size // 2, np.uint32)
        np.left_shift(raw.view(np.uint16), 16, out=wide, dtype=np.uint32)
        return wide.view(np.float32)
    return float8_e4m3()[raw]


def numbers(raw: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """Little-endian bytes as numbers of their own type [n]; F16, BF16 and F8_E4M3 as float32.

    >>> numbers(np.array([0xFE, 0xFF], np.uint8), "I16").tolist()
    [-2]
    """
    if dtype in READABLE:
        return to_float32(raw, dtype)
    size, kind = _SIZES[dtype], {"I": "i", "F": "f"}.get(dtype[0], "u")
    # Other 8-bit floats have no type in NumPy: they stay bytes.
    return raw.view(f"<{kind if size > 1 or dtype == 'I8' else 'u'}{size}")


def _from_half(bits: NDArray[np.int16]) -> NDArray[np.float32]:
    """Float16 bits [n] as float32: three times as fast as NumPy's own conversion.

    Exponent and fraction move to their places in a float32, whose exponent counts 112 more.
    """
    out = np.empty(bits.size, np.float32)
    for start in range(0, bits.size, _PIECE):
        half, wide = bits[start : start + _PIECE], out[start : start + _PIECE]
        moved = wide.view(np.int32)
        np.left_shift(half, 13, out=moved, dtype=np.int32)
        moved &= ~0x70000000  # copies of the sign
        wide *= np.float32(2.0**112)
        if max(wide.max(), -wide.min()) >= 65536:  # infinity or NaN
            wide[:] = half.view(np.float16)
    return out


def first_nonfinite(w: NDArray[np.float32]) -> int | None:
    """Index of the first NaN or infinity in the flattened array; None when all numbers are finite.

    >>> first_nonfinite(np.array([[1.0, 2.0], [np.nan, 0.0]], np.float32))
    2
    """
    # One pass without a temporary: NaN and infinity survive a sum. Only then look closer.
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(float(w.sum())):
            return None
    bad = np.flatnonzero(~np.isfinite(w.reshape(-1)))
    return int(bad[0]) if bad.size else None


@cache
def float8_e4m3() -> NDArray[np.float32]:
    """Value of each byte as E4M3 (Micikevicius et al. 2022, arXiv:2209.05433); 0x7F is NaN.

    >>> float8_e4m3()[[0x00, 0x01, 0x38, 0x7E, 0xB8]].tolist()
    [0.0, 0.001953125, 1.0, 448.0, -1.0]
    """
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, code & 7
    normal = np.ldexp(1 + fraction / 8, exponent - 7)
    value = np.where(exponent == 0, np.ldexp(fraction / 8, -6), normal)
    value[0x7F] = value[0xFF] = np.nan
    return np.where(code < 128, value, -value).astype(np.float32)
