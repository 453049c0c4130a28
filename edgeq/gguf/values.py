"""Metadata values: bytes to Python and NumPy values, and back."""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import FormatError
from edgeq.gguf.cursor import Cursor
from edgeq.gguf.layout import (
    ARRAY,
    BOOL,
    DTYPES,
    MAX_ARRAY_LENGTH,
    MAX_STRING_BYTES,
    MAX_TEMPLATE_BYTES,
    STRING,
    U32,
    U64,
    VALUE_TYPES,
)
from edgeq.text import printable


def read_value(cursor: Cursor, key: str, warnings: list[str]) -> tuple[Any, str]:
    """The value at the cursor and its type's name ("uint32", "array[string]").

    Numbers become int, float or bool, strings str (undecodable bytes as surrogates), arrays of
    numbers a read-only NumPy array, arrays of strings a list. Raises FormatError.
    """
    code = _type_code(cursor, key)
    if code == ARRAY:
        return _read_array(cursor, key, warnings)
    if code == STRING:
        return _read_string(cursor, key, warnings), VALUE_TYPES[code]
    dtype = DTYPES[code]
    start = cursor.skip(dtype.itemsize, key)
    value = np.frombuffer(cursor.data, dtype, 1, start)
    return _numbers(value, code, key, warnings)[0].item(), VALUE_TYPES[code]


def shown(value: Any) -> str:
    """A metadata value for an error message: short, on one line, safe to print.

    >>> shown("a" + chr(10)), shown([1, 2]), shown(3.5)
    ("'a\\\\n'", '2 values', '3.5')
    """
    if isinstance(value, np.ndarray | list):
        return f"{len(value)} values"
    return f"'{printable(value)}'" if isinstance(value, str) else str(value)


def _type_code(cursor: Cursor, key: str) -> int:
    code = cursor.number(U32, f"type of {key}")
    if code >= len(VALUE_TYPES):
        known = f"0..{len(VALUE_TYPES) - 1}"
        raise cursor.fail(f"{key} has value type {code}: expected {known}; the file is damaged")
    return code


def _read_string(cursor: Cursor, key: str, warnings: list[str]) -> str:
    limit = MAX_TEMPLATE_BYTES if key.startswith("tokenizer.chat_template") else MAX_STRING_BYTES
    raw = cursor.string(key, limit)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("utf-8", "surrogateescape")
        warnings.append(f"{key} = '{printable(text)}' is not valid UTF-8")
        return text


def _read_array(cursor: Cursor, key: str, warnings: list[str]) -> tuple[Any, str]:
    code = _type_code(cursor, key)
    if code == ARRAY:
        raise cursor.fail(f"{key} is an array of arrays: expected numbers or strings")
    count = cursor.number(U64, f"length of {key}")
    size = 8 if code == STRING else DTYPES[code].itemsize
    if count > MAX_ARRAY_LENGTH:
        raise cursor.fail(f"{key} has {count} elements: expected at most {MAX_ARRAY_LENGTH}")
    cursor.need(count * size, key)
    name = f"array[{VALUE_TYPES[code]}]"
    if code == STRING:
        return _read_strings(cursor, key, count), name
    start = cursor.skip(count * size, key)
    stored = np.frombuffer(cursor.data, DTYPES[code], count, start)
    values = _numbers(stored, code, key, warnings).copy()
    values.flags.writeable = False
    return values, name


def _read_strings(cursor: Cursor, key: str, count: int) -> list[str]:
    """A vocabulary can have a quarter of a million strings: one plain loop, no call per string."""
    data, pos, end, unpack = cursor.data, cursor.pos, cursor.end, U64.unpack_from
    strings: list[str] = []
    for _ in range(count):
        if end - pos < 8:
            break
        size = unpack(data, pos)[0]
        pos += 8
        if size > MAX_STRING_BYTES or size > end - pos:
            break
        strings.append(data[pos : pos + size].decode("utf-8", "surrogateescape"))
        pos += size
    cursor.pos = pos
    if len(strings) < count:
        what = f"{key}[{len(strings)}] of {count}"
        raise cursor.fail(f"{what} does not fit: the file is truncated or damaged")
    return strings


def _numbers(values: NDArray[Any], code: int, key: str, warnings: list[str]) -> NDArray[Any]:
    if code != BOOL:
        return values
    if values.size and values.max() > 1:
        warnings.append(f"{key} has the byte {values.max()} for a truth value: taken as true")
    truth: NDArray[np.bool_] = values != 0
    return truth


def write_value(value: Any, key: str) -> bytes:
    """Type and bytes of a metadata value.

    int -> uint32, or the first of int32, uint64, int64 that holds it; float -> float32; bool; str;
    a list -> array of string, bool, int32 (or int64) or float32; NumPy scalars and 1-D arrays keep
    their type. Raises FormatError for anything else.

    >>> write_value(7, "llama.block_count")
    b'\\x04\\x00\\x00\\x00\\x07\\x00\\x00\\x00'
    """
    if isinstance(value, str):
        return U32.pack(STRING) + _string(value)
    if isinstance(value, list | tuple):
        return _write_list(list(value), key)
    array = _as_array(value, key)
    code = _code(array, key)
    stored = array.astype(DTYPES[code]).tobytes()
    if array.ndim == 0:
        return U32.pack(code) + stored
    if array.ndim != 1:
        raise FormatError(f"{key}: array of {array.ndim} dimensions: expected 1")
    return U32.pack(ARRAY) + U32.pack(code) + U64.pack(array.size) + stored


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return U64.pack(len(raw)) + raw


def _write_list(values: list[Any], key: str) -> bytes:
    if all(isinstance(value, str) for value in values):
        head = struct.pack("<IIQ", ARRAY, STRING, len(values))
        return head + b"".join(map(_string, values))
    types = {type(value) for value in values}
    if types == {int}:
        low, high = min(values), max(values)
        return write_value(np.array(values, _int_type(low, high, ("int32", "int64"), key)), key)
    if types == {float}:
        return write_value(np.array([_float32(value, key) for value in values]), key)
    if types == {bool}:
        return write_value(np.array(values), key)
    names = ", ".join(sorted(kind.__name__ for kind in types))
    raise FormatError(f"{key}: list of {names}: expected one of str, bool, int, float")


def _as_array(value: Any, key: str) -> NDArray[Any]:
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    if isinstance(value, bool):
        return np.array(value)
    if isinstance(value, int):
        kinds = ("uint32", "int32", "uint64", "int64")
        return np.array(value, _int_type(value, value, kinds, key))
    if isinstance(value, float):
        return np.array(_float32(value, key))
    raise FormatError(f"{key}: {type(value).__name__} cannot be stored in GGUF metadata")


def _int_type(low: int, high: int, kinds: tuple[str, ...], key: str) -> str:
    for kind in kinds:
        info = np.iinfo(kind)
        if info.min <= low and high <= info.max:
            return kind
    raise FormatError(f"{key} = {low if low < 0 else high}: expected an integer of 64 bits")


def _float32(value: float, key: str) -> np.float32:
    with np.errstate(over="ignore"):
        stored = np.float32(value)
    if np.isinf(stored) and not np.isinf(value):
        raise FormatError(f"{key} = {value}: too large for float32")
    return stored


def _code(array: NDArray[Any], key: str) -> int:
    name = array.dtype.newbyteorder("=").name
    if name not in VALUE_TYPES:
        raise FormatError(f"{key}: NumPy type {array.dtype} cannot be stored in GGUF metadata")
    return VALUE_TYPES.index(name)
