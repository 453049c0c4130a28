"""Facts of the GGUF file format: ids, sizes, limits, and what a tensor entry says."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeq.blocks import BlockFormat

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")

# Types of metadata values by id; those of numbers are NumPy's names too.
VALUE_TYPES = (
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "float32",
    "bool",
    "string",
    "array",
    "uint64",
    "int64",
    "float64",
)
BOOL, STRING, ARRAY = 7, 8, 9
DTYPES = {
    code: np.dtype("u1" if name == "bool" else name).newbyteorder("<")
    for code, name in enumerate(VALUE_TYPES)
    if code not in (STRING, ARRAY)
}

# Limits on what a file may declare, far above any released model.
MAX_TENSORS = 65_536
MAX_KEYS = 65_536
MAX_KEY_BYTES = 65_535
MAX_STRING_BYTES = 16 << 20
MAX_TEMPLATE_BYTES = 1 << 20
MAX_ARRAY_LENGTH = 1 << 24
MAX_METADATA_BYTES = 256 << 20
MAX_DIMS = 4
MAX_NAME_BYTES = 63  # llama.cpp's GGML_MAX_NAME, less its final zero
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 1 << 20

# Smallest possible entries: key of one byte with a one-byte value; tensor of one dimension.
MIN_KEY_ENTRY = 8 + 1 + 4 + 1
MIN_TENSOR_ENTRY = 8 + 1 + 4 + 8 + 4 + 8

ARCHITECTURE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of an open file, checked: it lies inside the file and overlaps nothing."""

    name: str
    shape: tuple[int, ...]  # NumPy order: (..., rows, cols), the reverse of GGUF's
    ggml_type: int
    format: BlockFormat
    offset: int  # from the start of the file, bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]  # NumPy order: (..., rows, cols)
    format: BlockFormat


def aligned(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`.

    >>> aligned(33, 32)
    64
    """
    return -(-size // alignment) * alignment


def alignment_of(metadata: Mapping[str, Any]) -> int:
    """The alignment to lay out with; the reader's rules refuse a bad one afterwards.

    >>> alignment_of({"general.alignment": 64}), alignment_of({})
    (64, 32)
    """
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    usable = isinstance(value, int | np.integer) and 0 < value <= MAX_ALIGNMENT
    return int(value) if usable else DEFAULT_ALIGNMENT
