"""Open a GGUF file: metadata in memory, tensor data as read-only views on the mapped file."""

import contextlib
import mmap
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from edgeq.blocks import find_nonfinite, row_bytes
from edgeq.closing import Closing
from edgeq.errors import FormatError, ResourceError
from edgeq.gguf.header import Header, read_header
from edgeq.gguf.values import shown
from edgeq.text import printable

__all__ = ["REQUIRED", "Gguf", "open_gguf"]

Scalar = TypeVar("Scalar", int, float, bool, str)
Default = TypeVar("Default")
Many = Literal["ints", "floats", "strs"]


class _Required:
    """The default of `Gguf.get` for a key that a file must have."""


REQUIRED: Final = _Required()

# What `Gguf.get` accepts: words for the message, and the stored types.
_INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_ACCEPTED: dict[object, tuple[str, tuple[str, ...]]] = {
    int: ("an integer", _INTEGERS),
    float: ("a float", ("float32", "float64")),
    bool: ("a truth value", ("bool",)),
    str: ("a string", ("string",)),
    "ints": ("an array of integers", tuple(f"array[{name}]" for name in _INTEGERS)),
    "floats": ("an array of floats", ("array[float32]", "array[float64]")),
    "strs": ("an array of strings", ("array[string]",)),
}


class Gguf(Closing):
    """An open file; made by `open_gguf`. Close it, or use it in a `with` statement.

    Views that `tensor` gave stay valid after `close`.
    """

    def __init__(self, path: Path, mapped: mmap.mmap, header: Header) -> None:
        self.path = path
        self.size = len(mapped)  # bytes
        self.version = header.version
        self.alignment = header.alignment
        self.metadata: Mapping[str, Any] = MappingProxyType(header.metadata)
        self.value_types: Mapping[str, str] = MappingProxyType(header.value_types)
        self.tensors = header.tensors  # in file order
        self.warnings = header.warnings
        self._mapped = mapped
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(mapped, np.uint8)

    def __repr__(self) -> str:
        return f"Gguf({str(self.path)!r}, {len(self.tensors)} tensors)"

    def close(self) -> None:
        """Let go of the file; the mapping itself lives as long as a view on it."""
        self._bytes = None
        with contextlib.suppress(BufferError):  # a view is alive: the mapping goes with the last
            self._mapped.close()

    def tensor(self, name: str) -> NDArray[np.uint8]:
        """Bytes of a tensor, a read-only view of the file: uint8 [..., rows, row_bytes].

        A tensor of one dimension gives [row_bytes]. Raises FormatError when there is no such
        tensor, ResourceError after `close`.
        """
        info = self.tensors.get(name)
        if info is None:
            raise FormatError(f"{self.path}: tensor {printable(name)} is missing")
        if self._bytes is None:
            raise ResourceError(f"{self.path}: tensor {name}: the file is closed: open it again")
        raw = self._bytes[info.offset : info.offset + info.nbytes]
        return raw.reshape(*info.shape[:-1], row_bytes(info.format, info.shape[-1]))

    def forget(self, rows: NDArray[np.uint8]) -> None:
        """Give back the memory of a contiguous part of a tensor; it is read again when needed."""
        if self._bytes is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        at = rows.__array_interface__["data"][0] - self._bytes.__array_interface__["data"][0]
        first = at // mmap.PAGESIZE * mmap.PAGESIZE
        self._mapped.madvise(mmap.MADV_DONTNEED, first, at + rows.nbytes - first)

    @overload
    def get(self, key: str, type_: type[Scalar]) -> Scalar: ...
    @overload
    def get(self, key: str, type_: type[Scalar], default: Default) -> Scalar | Default: ...
    @overload
    def get(self, key: str, type_: Literal["strs"]) -> list[str]: ...
    @overload
    def get(self, key: str, type_: Literal["strs"], default: Default) -> list[str] | Default: ...
    @overload
    def get(self, key: str, type_: Literal["ints", "floats"]) -> NDArray[Any]: ...
    @overload
    def get(
        self, key: str, type_: Literal["ints", "floats"], default: Default
    ) -> NDArray[Any] | Default: ...
    def get(self, key: str, type_: type[Any] | Many, default: Any = REQUIRED) -> Any:
        """Metadata value of a key, of the type int, float, bool, str, "ints", "floats" or "strs".

        Raises FormatError when the key is missing and has no default, or is of another type.
        """
        words, stored = _ACCEPTED[type_]
        if key not in self.metadata:
            if default is REQUIRED:
                raise FormatError(f"{self.path}: {key} is missing: expected {words}")
            return default
        value, kind = self.metadata[key], self.value_types[key]
        if kind not in stored:
            raise FormatError(f"{self.path}: {key} = {shown(value)} ({kind}): expected {words}")
        return value

    def typed_metadata(self) -> dict[str, Any]:
        """Metadata for `GgufWriter`: each number as a NumPy scalar of the type stored here."""
        return {key: self._typed(key, value) for key, value in self.metadata.items()}

    def _typed(self, key: str, value: Any) -> Any:
        kind = self.value_types[key]
        plain = kind in ("string", "bool") or kind.startswith("array")
        return value if plain else np.dtype(kind).type(value)

    def check_unchanged(self) -> None:
        """Raise ResourceError when the file changed its size since it was opened.

        Reading a mapped file that somebody cut short kills the process; replacing it is harmless.
        """
        if self._mapped.closed or self._mapped.size() == self.size:
            return
        change = f"has {self._mapped.size()} bytes, had {self.size}"
        raise ResourceError(f"{self.path}: {change} when opened: it was overwritten; load it again")

    def problems(self) -> Iterator[str]:
        """Read every block; yields a line for each tensor with a NaN or infinite value or scale."""
        for name, info in self.tensors.items():
            rows = self.tensor(name).reshape(-1, row_bytes(info.format, info.shape[-1]))
            step = max(1, (16 << 20) // rows.shape[1])
            for start in range(0, len(rows), step):
                block = find_nonfinite(rows[start : start + step], info.format)
                if block is not None:
                    row, inside = divmod(block, info.shape[-1] // info.format.block)
                    place = f"row {start + row}, block {inside}"
                    yield f"{self.path}: tensor {name}, {place}: not a finite number"
                    break


def open_gguf(path: str | os.PathLike[str]) -> Gguf:
    """Open and check a GGUF file; tensor data is not read.

    Raises FormatError when the file is not a valid, complete GGUF file of formats that edgeq knows,
    ResourceError when it cannot be opened. Oddities that do no harm are listed in `Gguf.warnings`.

    >>> open_gguf("missing.gguf")
    Traceback (most recent call last):
        ...
    edgeq.errors.ResourceError: missing.gguf: cannot be opened: No such file or directory
    """
    path = Path(path)
    source = printable(path, limit=1000)
    mapped = _map(path, source)
    try:
        header = read_header(mapped, len(mapped), source)
        _refuse_split(path, header)
        return Gguf(path, mapped, header)
    except BaseException:
        mapped.close()
        raise


def _map(path: Path, source: str) -> mmap.mmap:
    try:
        _refuse_special(os.stat(path).st_mode, source)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(fd)
            _refuse_special(status.st_mode, source)  # again: the name may have changed its meaning
            if status.st_size == 0:
                raise FormatError(f"{source}: empty file: expected a GGUF file")
            return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ResourceError(f"{source}: cannot be opened: {reason}") from error


def _refuse_special(mode: int, source: str) -> None:
    if stat.S_ISDIR(mode):
        raise FormatError(f"{source}: is a folder: expected a GGUF file")
    if not stat.S_ISREG(mode):
        raise FormatError(f"{source}: is not a regular file: expected a GGUF file")


_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def _refuse_split(path: Path, header: Header) -> None:
    """Parts of a split model are not read; say which part is missing, or how to join them."""
    count, number = header.metadata.get("split.count", 0), header.metadata.get("split.no", 0)
    source = printable(path, limit=1000)
    if type(count) is not int or type(number) is not int or not 0 <= number < max(count, 1):
        pair = f"split.no = {shown(number)}, split.count = {shown(count)}"
        raise FormatError(f"{source}: {pair}: expected integers, the first below the second")
    if count <= 1:
        return
    named = _SPLIT_NAME.fullmatch(path.name)
    expected = f"-{number + 1:05}-of-{count:05}.gguf"
    if named is None or not path.name.endswith(expected):
        raise FormatError(
            f"{source}: is part {number + 1} of {count}: expected a name ending in {expected}"
        )
    _refuse_parts(path, named["stem"], count, source)


def _refuse_parts(path: Path, stem: str, count: int, source: str) -> None:
    parts = (path.with_name(f"{stem}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1))
    missing = next((part for part in parts if not part.is_file()), None)
    advice = "join the parts with `llama-gguf-split --merge`"
    if missing is not None:
        advice = f"{printable(missing.name, 300)} is missing: fetch it, then {advice}"
    raise FormatError(f"{source}: is one of {count} parts of a split model: {advice}")
