"""The .dat files that llama-imatrix wrote before it wrote GGUF.

int32 number of entries; each entry: int32 length and bytes of the weight's name, int32 calls, int32
number of values n, float32[n] mean of x² times calls (of experts one after another); at the end,
in later versions, int32 chunks, int32 length and bytes of the text's name.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import FormatError
from edgeq.gguf.partfile import PartFile
from edgeq.text import printable

__all__ = ["CHUNK", "looks_like", "read", "write"]

CHUNK = 512  # tokens of a call, which the file does not say: llama-imatrix's default
MAX_ENTRIES, MAX_NAME = 65_536, 1023

_INT = struct.Struct("<i")
Array = NDArray[np.float32]


class Content(NamedTuple):
    """The fields of `edgeq.imatrix.Imatrix`; experts are not told apart, n_mat is 1."""

    sums: dict[str, Array]
    counts: dict[str, Array]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int


def looks_like(path: Path) -> bool:
    """Whether a file begins as such a file does: such files have all kinds of names."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(8)
    entries, length = (int.from_bytes(part, "little") for part in (start[:4], start[4:]))
    return 1 <= entries <= MAX_ENTRIES and 1 <= length <= MAX_NAME


class _Reader:
    """A position in bytes that nobody vouches for."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.pos = path, path.read_bytes(), 0

    def bytes(self, size: int, what: str) -> bytes:
        if not 0 <= size <= len(self.data) - self.pos:
            raise self.fail(f"{what} needs {size} bytes, {len(self.data) - self.pos} are left")
        self.pos += size
        return self.data[self.pos - size : self.pos]

    def integer(self, what: str, least: int, most: int) -> int:
        value: int = _INT.unpack(self.bytes(4, what))[0]
        if not least <= value <= most:
            raise self.fail(f"{what} is {value}: expected {least} to {most}")
        return value

    def text(self, what: str) -> str:
        size = self.integer(f"length of {what}", 0, MAX_NAME)
        return self.bytes(size, what).decode("utf-8", "surrogateescape")

    def fail(self, message: str) -> FormatError:
        advice = "is it an importance matrix of llama-imatrix?"
        return FormatError(f"{self.path}: byte {self.pos}: {message}: {advice}")


def read(path: Path) -> Content:
    """Sums as if every call had seen CHUNK tokens. Raises FormatError."""
    reader = _Reader(path)
    sums: dict[str, Array] = {}
    counts: dict[str, Array] = {}
    for i in range(reader.integer("number of entries", 1, MAX_ENTRIES)):
        name = reader.text(f"name of entry {i}")
        if name in sums or not name.isprintable() or not name:
            raise reader.fail(f"entry {i} is named '{printable(name)}': expected a new plain name")
        calls = reader.integer(f"calls of {name}", 1, 1 << 30)
        size = reader.integer(f"values of {name}", 1, 1 << 28)
        values = np.frombuffer(reader.bytes(4 * size, name), "<f4")
        sums[name] = values.astype(np.float32).reshape(1, -1) * np.float32(CHUNK)
        counts[name] = np.array([calls * CHUNK], np.float32)
    if reader.pos == len(reader.data):  # the first versions ended here
        return Content(sums, counts, (), 0, CHUNK)
    chunks = reader.integer("number of chunks", 0, 1 << 30)
    return Content(sums, counts, (reader.text("name of the text"),), chunks, CHUNK)


def write(imatrix: Any, path: Path, *, force: bool = False) -> None:
    """Write an `edgeq.imatrix.Imatrix`; only the last of its texts has room for its name.

    Raises ResourceError when the file exists (unless `force`) or the disk is full.
    """
    sums: Mapping[str, Array] = imatrix.sums
    parts = [_INT.pack(len(sums))]
    for name in sorted(sums):
        counts = imatrix.counts[name][:, None]
        calls = max(int(np.ceil(counts.max() / imatrix.chunk_size)), 1)
        means = np.where(counts > 0, sums[name] / np.where(counts > 0, counts, 1), 1)
        values = (means * calls).astype("<f4").tobytes()
        parts += [_text(name), _INT.pack(calls), _INT.pack(len(values) // 4), values]
    parts += [_INT.pack(imatrix.chunk_count), _text("".join(imatrix.datasets[-1:]))]
    _save(b"".join(parts), path, force)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return _INT.pack(len(raw)) + raw


def _save(content: bytes, path: Path, force: bool) -> None:
    file = PartFile(path, len(content), force=force)
    try:
        file.pwrite(4, memoryview(content)[4:])
        file.pwrite(0, memoryview(content)[:4])
        file.commit()
    finally:
        file.abort()
