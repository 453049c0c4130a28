"""Unpack, decode and pack blocks of any format in NumPy, driven by the tables of formats/.

The oracle for every kernel and every quantizer: exact and general, not fast. The tables themselves
(BlockFormat, Field, Run, `formats`, `get`) live in `edgeq.blockformat` and are offered here too.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.blockformat import (
    DTYPES,
    FAMILIES,
    FLOATS,
    K4_BYTES,
    BlockFormat,
    Field,
    Run,
    by_type,
    formats,
    get,
    row_bytes,
)
from edgeq.errors import FormatError

__all__ = [
    "FAMILIES",
    "BlockFormat",
    "Field",
    "Run",
    "by_type",
    "decode",
    "find_nonfinite",
    "formats",
    "get",
    "pack",
    "row_bytes",
    "unpack",
]

_CHUNK = 1 << 20  # elements decoded at once: bounds the integer temporaries to about 10 MB


def unpack(raw: NDArray[np.uint8], fmt: str | BlockFormat) -> dict[str, NDArray[Any]]:
    """Fields of packed rows: `raw` [..., n * bytes] gives, with the same leading shape,

    d, dmin, x, and m of a format without dmin: float32 [..., n];
    sc, and m of a format with dmin: int32 [..., n, block // group], bias applied;
    q: int32 [..., n, block], bias applied (an index where the format has a table).

    Raises FormatError when the last axis is not a whole number of blocks.

    >>> rows = np.zeros((3, 36), np.uint8)  # two blocks of Q4_0 in each of 3 rows
    >>> {name: array.shape for name, array in unpack(rows, "Q4_0").items()}
    {'d': (3, 2), 'q': (3, 2, 32)}
    """
    fmt = get(fmt)
    blocks, lead = _as_blocks(raw, fmt)
    result = {}
    for name, entry in fmt.fields.items():
        values = _unpack_field(blocks, entry, fmt.count(name))
        result[name] = values.reshape(*lead, *values.shape[1:])
    return result


def decode(raw: NDArray[np.uint8], fmt: str | BlockFormat) -> NDArray[np.float32]:
    """Values of packed rows, `raw` [..., n * bytes] -> float32 [..., n * block].

    Bit for bit what ggml's reference dequantizers give. Raises FormatError as `unpack` does.

    >>> block = np.array([0x00, 0x3C] + [0x98] * 16, np.uint8)  # d = 1, codes 8 and 9
    >>> decode(block, "Q4_0")[[0, 16]]
    array([0., 1.], dtype=float32)
    """
    fmt = get(fmt)
    blocks, lead = _as_blocks(raw, fmt)
    values = np.empty((len(blocks), fmt.block), np.float32)
    step = max(1, _CHUNK // fmt.block)
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        values[part] = _values(unpack(blocks[part], fmt), fmt)
    return values.reshape(*lead[:-1], lead[-1] * fmt.block)


def pack(fields: Mapping[str, NDArray[Any]], fmt: str | BlockFormat) -> NDArray[np.uint8]:
    """Bytes of fields shaped as `unpack` returns them -> uint8 [..., n * bytes].

    Real numbers are rounded to nearest even where the format stores fewer bits. Raises FormatError
    when a field is missing, has the wrong shape, or holds a value that its bits cannot.

    >>> raw = np.arange(36, dtype=np.uint8)
    >>> bool(np.array_equal(pack(unpack(raw, "Q4_0"), "Q4_0"), raw))
    True
    """
    fmt = get(fmt)
    if set(fields) != set(fmt.fields):
        given, expected = ", ".join(fields), ", ".join(fmt.fields)
        raise FormatError(f"{fmt.name}: fields {given}: expected {expected}")
    lead = np.shape(fields["x" if fmt.value == "x" else "d"])
    if not lead:
        raise FormatError(f"{fmt.name}: fields are single numbers: expected arrays [..., blocks]")
    blocks = np.zeros((math.prod(lead), fmt.bytes), np.uint8)
    for name, entry in fmt.fields.items():
        values = _checked(np.asarray(fields[name]), fmt, name, lead)
        _pack_field(blocks, entry, values, f"{fmt.name}: field {name}")
    return blocks.reshape(*lead[:-1], lead[-1] * fmt.bytes)


def find_nonfinite(raw: NDArray[np.uint8], fmt: str | BlockFormat) -> int | None:
    """First block, in reading order, with a NaN or infinite scale, minimum or value; None if none.

    >>> find_nonfinite(np.array([0, 60, 0, 126], np.uint8), "F16")  # 1.0, NaN
    1
    """
    fmt = get(fmt)
    blocks, _ = _as_blocks(raw, fmt)
    real = [entry for entry in fmt.fields.values() if entry.type in FLOATS]
    bad = np.zeros(len(blocks), bool)
    for entry in real:
        bad |= ~np.isfinite(_unpack_field(blocks, entry, 1))
    return int(np.argmax(bad)) if bad.any() else None


def _as_blocks(
    raw: NDArray[np.uint8], fmt: BlockFormat
) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """`raw` as [blocks, bytes], and the leading shape with the blocks of a row as its last axis."""
    if raw.dtype != np.uint8 or raw.ndim == 0 or raw.shape[-1] % fmt.bytes:
        what = f"{raw.dtype} array of shape {raw.shape}"
        raise FormatError(f"{fmt.name}: {what}: expected uint8 [..., n * {fmt.bytes}]")
    return raw.reshape(-1, fmt.bytes), (*raw.shape[:-1], raw.shape[-1] // fmt.bytes)


def _unpack_field(blocks: NDArray[np.uint8], entry: Field, count: int) -> NDArray[Any]:
    """Field of each block: [blocks] when plain and single, else [blocks, count]."""
    if entry.runs:
        codes = np.full((len(blocks), count), entry.bias, np.int32)
        above = 0
        for run in entry.runs:
            codes += _read_run(blocks, run, count).astype(np.int32) << above
            above += run.bits
        return codes
    if entry.pack:
        return _read_k4(blocks[:, entry.at : entry.at + K4_BYTES], entry.part).astype(np.int32)
    values = _read_plain(blocks, entry, count)
    return values[:, 0] if count == 1 else values


def _read_plain(blocks: NDArray[np.uint8], entry: Field, count: int) -> NDArray[Any]:
    assert entry.type
    dtype = DTYPES[entry.type]
    size = count * dtype.itemsize
    stored: NDArray[Any] = np.ascontiguousarray(blocks[:, entry.at : entry.at + size]).view(dtype)
    if entry.type == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32 if entry.type in FLOATS else np.int32)


def _read_run(blocks: NDArray[np.uint8], run: Run, count: int) -> NDArray[np.uint8]:
    passes, slots, lanes = run.grid(count)
    region = blocks[:, run.at : run.at + passes * lanes].reshape(-1, passes, 1, lanes)
    codes = (region >> _shifts(run, slots)) & np.uint8((1 << run.bits) - 1)
    return codes.reshape(-1, count)


def _shifts(run: Run, slots: int) -> NDArray[np.uint8]:
    return (run.shift + run.bits * np.arange(slots, dtype=np.uint8)).astype(np.uint8).reshape(-1, 1)


def _read_k4(packed: NDArray[np.uint8], part: int) -> NDArray[np.uint8]:
    """The 8 scales (part 0) or minima (part 1), uint8 [blocks, 8], of 12 packed bytes.

    Bytes 0-3 and 4-7 hold the first four of each in their low 6 bits and the top 2 bits of the last
    four above them; bytes 8-11 hold the low nibbles of the last four, scales below minima.
    """
    own = packed[:, 4 * part : 4 * part + 4]
    low = (packed[:, 8:] >> np.uint8(4 * part)) & np.uint8(15)
    return np.concatenate([own & np.uint8(63), low | (own >> np.uint8(6)) << np.uint8(4)], axis=1)


def _values(fields: Mapping[str, NDArray[Any]], fmt: BlockFormat) -> NDArray[np.float32]:
    """float32 [blocks, block]; operations in ggml's order, so results agree to the last bit."""
    if fmt.value == "x":
        return fields["x"].reshape(-1, 1)
    q = fields["q"] if fmt.table is None else np.array(fmt.table, np.float32)[fields["q"]]
    q = q.astype(np.float32).reshape(-1, fmt.block // fmt.group, fmt.group)
    real = {name: _column(values) for name, values in fields.items() if name != "q"}
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged file may hold infinite scales
        scale = real["d"] * real["sc"] if "sc" in real else real["d"]
        result = scale * q
        if fmt.value == "d * q + m":
            result += real["m"]
        elif fmt.value == "d * sc * q - dmin * m":
            result -= real["dmin"] * real["m"]
    return result.reshape(-1, fmt.block)


def _column(values: NDArray[Any]) -> NDArray[np.float32]:
    """[blocks] or [blocks, groups] -> float32 [blocks, 1 or groups, 1]."""
    return values.astype(np.float32).reshape(len(values), -1, 1)


def _checked(
    values: NDArray[Any], fmt: BlockFormat, name: str, lead: tuple[int, ...]
) -> NDArray[Any]:
    """`values` as [blocks, count], float32 or int32, after checking shape and range."""
    count, entry = fmt.count(name), fmt.fields[name]
    shape = lead if count == 1 else (*lead, count)
    if values.shape != shape:
        raise FormatError(f"{fmt.name}: field {name} has shape {values.shape}: expected {shape}")
    flat = values.reshape(-1, count)
    if entry.type in FLOATS:
        return flat.astype(np.float32)
    low, high = fmt.limits(name)
    if flat.dtype.kind not in "iu":
        raise FormatError(f"{fmt.name}: field {name} is {flat.dtype}: expected integers")
    if flat.size and not low <= int(flat.min()) <= int(flat.max()) <= high:
        span = f"{flat.min()}..{flat.max()}"
        raise FormatError(f"{fmt.name}: field {name} = {span}: expected {low}..{high}")
    return flat.astype(np.int32)


def _pack_field(blocks: NDArray[np.uint8], entry: Field, values: NDArray[Any], where: str) -> None:
    """Set the bits of one field, values [blocks, count], in zeroed blocks [blocks, bytes]."""
    if entry.runs:
        codes = (values - entry.bias).astype(np.uint32)
        for run in entry.runs:
            _write_run(blocks, run, codes & np.uint32((1 << run.bits) - 1))
            codes >>= run.bits
    elif entry.pack:
        _write_k4(blocks[:, entry.at : entry.at + K4_BYTES], entry.part, values.astype(np.uint8))
    else:
        stored = _stored(values, entry, where)
        size = stored.shape[1] * stored.itemsize
        blocks[:, entry.at : entry.at + size] = stored.view(np.uint8).reshape(-1, size)


def _stored(values: NDArray[Any], entry: Field, where: str) -> NDArray[Any]:
    """`values` in the type that the field stores, contiguous."""
    assert entry.type
    if entry.type == "bf16":
        return _to_bf16(values)
    with np.errstate(over="ignore"):
        stored: NDArray[Any] = np.ascontiguousarray(values).astype(DTYPES[entry.type])
    if entry.type == "f16" and np.any(np.isinf(stored) & np.isfinite(values)):
        largest = np.abs(values[np.isfinite(values)]).max()
        raise FormatError(f"{where} = {largest:g}: too large for f16, expected at most 65504")
    return stored


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Upper 16 bits, rounded to nearest even; a NaN stays one (its top mantissa bit is set)."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # wraps for NaNs only, replaced below
    kept = (bits >> 16) | 0x40
    result: NDArray[np.uint16] = np.where(np.isnan(values), kept, rounded).astype(np.uint16)
    return result


def _write_run(blocks: NDArray[np.uint8], run: Run, codes: NDArray[np.uint32]) -> None:
    passes, slots, lanes = run.grid(codes.shape[1])
    grid = codes.astype(np.uint8).reshape(-1, passes, slots, lanes) << _shifts(run, slots)
    packed = np.bitwise_or.reduce(grid, axis=2).reshape(-1, passes * lanes)
    blocks[:, run.at : run.at + passes * lanes] |= packed


def _write_k4(packed: NDArray[np.uint8], part: int, values: NDArray[np.uint8]) -> None:
    """Inverse of `_read_k4`: set the bits of one part in `packed` [blocks, 12]."""
    first, last = values[:, :4], values[:, 4:]
    packed[:, 4 * part : 4 * part + 4] |= first | (last >> np.uint8(4)) << np.uint8(6)
    packed[:, 8:] |= (last & np.uint8(15)) << np.uint8(4 * part)
