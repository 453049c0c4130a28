"""Everything before the tensor data, read and checked in one pass.

Sizes are Python integers, so nothing wraps; each is compared with the file before anything is
allocated for it. What this module returns is consistent: later code does not check again.
"""

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeq.blocks import BlockFormat, by_type, formats, row_bytes
from edgeq.errors import FormatError
from edgeq.gguf.cursor import Cursor
from edgeq.gguf.layout import (
    ARCHITECTURE,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMS,
    MAX_KEY_BYTES,
    MAX_KEYS,
    MAX_NAME_BYTES,
    MAX_TENSORS,
    MIN_ALIGNMENT,
    MIN_KEY_ENTRY,
    MIN_TENSOR_ENTRY,
    U32,
    U64,
    VERSIONS,
    TensorInfo,
    aligned,
)
from edgeq.gguf.values import read_value, shown
from edgeq.text import printable


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about itself."""

    version: int
    alignment: int
    metadata: dict[str, Any]
    value_types: dict[str, str]
    tensors: dict[str, TensorInfo]
    data_start: int  # byte where tensor data begins
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor entry as declared: its place is not yet checked."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    offset: int  # from the start of tensor data
    nbytes: int


def read_header(data: bytes | mmap.mmap, size: int, source: str) -> Header:
    """Header of a file of `size` bytes that begins with `data`; `source` names it in errors.

    Raises FormatError for everything that is malformed, with file, byte, field and value.
    """
    cursor = Cursor(data, source)
    version = _read_version(cursor)
    n_tensors = _read_count(cursor, "tensor count", MAX_TENSORS, MIN_TENSOR_ENTRY)
    n_keys = _read_count(cursor, "metadata count", MAX_KEYS, MIN_KEY_ENTRY)
    metadata, types, warnings = _read_metadata(cursor, n_keys)
    alignment = _alignment(cursor, metadata, types)
    _check_architecture(cursor, metadata, types)
    entries = [_read_entry(cursor) for _ in range(n_tensors)]
    start = _data_start(cursor, alignment, size)
    tensors = _place(entries, start, alignment, size, source)
    warnings += _trailing(tensors, start, alignment, size, source)
    return Header(version, alignment, metadata, types, tensors, start, warnings)


def _read_version(cursor: Cursor) -> int:
    if cursor.end == 0:
        raise FormatError(f"{cursor.source}: empty file: expected a GGUF file")
    start = cursor.data[:64]
    if start[:4] != MAGIC[: len(start)]:
        raise FormatError(f"{cursor.source}: not a GGUF file{_resembles(start)}")
    cursor.skip(len(MAGIC), "magic")
    version = cursor.number(U32, "version")
    if version in VERSIONS:
        return version
    if version & 0xFFFF == 0 and version:
        raise cursor.fail("the file is big-endian: expected little-endian; convert it again")
    raise cursor.fail(f"version {version} is not supported: expected 2 or 3; convert it again")


_RESEMBLANCE = {
    b"PK": "a zip archive, such as a PyTorch checkpoint: only GGUF and safetensors are read",
    b"<": "a web page: download the file itself",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file with `git lfs pull`",
    b"{": "JSON",
}
_RESEMBLANCE |= dict.fromkeys(
    (b"GGML", b"lmgg", b"ggml", b"ggjt", b"tjgg", b"ggla", b"algg", b"fmgg"),
    "a file of the time before GGUF: convert the model again",
)


def _resembles(start: bytes) -> str:
    for prefix, what in _RESEMBLANCE.items():
        if start.startswith(prefix):
            return f", it looks like {what}"
    if start[8:9] == b"{":
        return ", it looks like safetensors: convert its folder first"
    return f": it starts with {start[:4]!r}, expected {MAGIC!r}"


def _read_count(cursor: Cursor, what: str, limit: int, entry_size: int) -> int:
    count = cursor.number(U64, what)
    if count > limit:
        raise cursor.fail(f"{what} {count}: expected at most {limit}")
    cursor.need(count * entry_size, f"{what} {count}")
    return count


def _read_metadata(cursor: Cursor, count: int) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    metadata: dict[str, Any] = {}
    types: dict[str, str] = {}
    warnings: list[str] = []
    for i in range(count):
        key = cursor.identifier(f"metadata key {i}", MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.fail(f"metadata key {printable(key)} appears twice")
        metadata[key], types[key] = read_value(cursor, key, warnings)
    return metadata, types, [f"{cursor.source}: {text}" for text in warnings]


def _alignment(cursor: Cursor, metadata: Mapping[str, Any], types: Mapping[str, str]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    kind = types.get("general.alignment", "uint32")
    usable = kind == "uint32" and MIN_ALIGNMENT <= value <= MAX_ALIGNMENT
    if not usable or value & (value - 1):
        expected = f"a uint32 power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}"
        raise cursor.fail(f"general.alignment = {shown(value)} ({kind}): expected {expected}")
    return int(value)


def _check_architecture(
    cursor: Cursor, metadata: Mapping[str, Any], types: Mapping[str, str]
) -> None:
    """A later step finds code by this name, so it must be a plain word where it is present."""
    value = metadata.get("general.architecture", "absent")
    if not isinstance(value, str) or not ARCHITECTURE.fullmatch(value):
        what = f"{shown(value)} ({types['general.architecture']})"
        raise cursor.fail(f"general.architecture = {what}: expected a short plain word")


def _read_entry(cursor: Cursor) -> _Entry:
    name = cursor.identifier("tensor name", MAX_NAME_BYTES)
    if "/" in name or "\\" in name or ".." in name:
        raise cursor.fail(f"tensor name '{printable(name)}' looks like a path")
    n_dims = cursor.number(U32, f"{name}: dimensions")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.fail(f"tensor {name} has {n_dims} dimensions: expected 1 to {MAX_DIMS}")
    dims = [cursor.number(U64, f"{name}: shape") for _ in range(n_dims)]
    if min(dims) < 1 or max(dims) >= 1 << 63:
        raise cursor.fail(f"tensor {name} has shape {dims}: expected sizes from 1 to 2**63 - 1")
    fmt = _format(cursor, name, cursor.number(U32, f"{name}: type"))
    offset = cursor.number(U64, f"{name}: offset")
    if dims[0] % fmt.block:
        expected = f"rows of a multiple of {fmt.block}"
        raise cursor.fail(
            f"tensor {name} of format {fmt.name} has shape {dims}: expected {expected}"
        )
    nbytes = math.prod(dims[1:]) * row_bytes(fmt, dims[0])
    return _Entry(name, tuple(reversed(dims)), fmt, offset, nbytes)


def _format(cursor: Cursor, name: str, ggml_type: int) -> BlockFormat:
    fmt = by_type(ggml_type)
    if fmt is None:
        label, known = _type_label(ggml_type), ", ".join(formats())
        raise cursor.fail(
            f"tensor {name} has type {ggml_type} ({label}), which edgeq cannot read: "
            f"expected one of {known}; convert the original model to one of them"
        )
    return fmt


def _type_label(ggml_type: int) -> str:
    from gguf import GGMLQuantizationType  # slow to import, and needed for this message only

    try:
        return str(GGMLQuantizationType(ggml_type).name)
    except ValueError:
        return "unknown or removed from GGUF"


def _data_start(cursor: Cursor, alignment: int, size: int) -> int:
    """Byte after the padding that follows the entries; all of it must be zero.

    Anything else there means that the counts at the top are too small for what follows.
    """
    start = aligned(cursor.pos, alignment)
    if any(cursor.data[cursor.pos : min(start, size)]):
        raise cursor.fail("bytes other than zero follow the last entry: a count is too small")
    return start


def _place(
    entries: list[_Entry], start: int, alignment: int, size: int, source: str
) -> dict[str, TensorInfo]:
    """Entries with absolute offsets; they must follow each other as llama.cpp demands."""
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for entry in entries:
        where = f"{source}: tensor {entry.name}"
        if entry.name in tensors:
            raise FormatError(f"{where} appears twice")
        if entry.offset != expected:
            raise FormatError(f"{where} has offset {entry.offset}: expected {expected}")
        begin = start + entry.offset
        if begin + entry.nbytes > size:
            raise FormatError(
                f"{where} ends at byte {begin + entry.nbytes}, the file has {size}: "
                "download or copy incomplete? fetch it again"
            )
        tensors[entry.name] = TensorInfo(
            entry.name, entry.shape, entry.format.ggml_type, entry.format, begin, entry.nbytes
        )
        expected = aligned(entry.offset + entry.nbytes, alignment)
    return tensors


def _trailing(
    tensors: Mapping[str, TensorInfo], start: int, alignment: int, size: int, source: str
) -> list[str]:
    """A warning where bytes follow the last tensor; an error where there is no tensor at all."""
    used = max((info.offset + info.nbytes for info in tensors.values()), default=start)
    end = start + aligned(used - start, alignment)
    if size <= end:
        return []
    if not tensors:
        raise FormatError(f"{source}: {size - end} bytes of data but no tensors: file is damaged")
    return [f"{source}: {size - end} bytes after the last tensor are ignored"]
