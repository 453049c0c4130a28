"""Block formats as tables: the TOML files of formats/, read and checked.

A tensor row is a chain of blocks, each `bytes` long and holding `block` elements. What the bytes
mean is a table of fields, so a new format of a known family is a new file and no code. Kernels,
quantizers and `edgeq.blocks` all follow the same tables.

The layouts are ggml's (ggml-common.h, ggml-quants.c in https://github.com/ggml-org/llama.cpp).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeq.data import find, from_table, load_toml
from edgeq.errors import FormatError

__all__ = ["FAMILIES", "BlockFormat", "Field", "Run", "by_type", "formats", "get", "row_bytes"]

# How the fields of a block make its values; the tuple lists the fields such a format must define.
FAMILIES: dict[str, tuple[str, ...]] = {
    "x": ("x",),
    "d * q": ("d", "q"),
    "d * q + m": ("d", "m", "q"),
    "d * sc * q": ("d", "sc", "q"),
    "d * sc * q - dmin * m": ("d", "dmin", "sc", "m", "q"),
}

DTYPES: dict[
    str, np.dtype[Any]
] = {  # bf16 has no NumPy type: its 16 bits are the upper half of an f32
    "f16": np.dtype("<f2"),
    "f32": np.dtype("<f4"),
    "bf16": np.dtype("<u2"),
    "i8": np.dtype("i1"),
    "u8": np.dtype("u1"),
}
FLOATS = ("f16", "f32", "bf16")
K4_BYTES, K4_COUNT = 12, 8  # the packing of Q4_K and Q5_K: 8 scales and 8 minima of 6 bits


@dataclass(frozen=True, slots=True)
class Run:
    """Codes of `bits` bits, interleaved over `lanes` neighbouring bytes.

    Byte `at + l` holds elements l, l + lanes, l + 2 * lanes, ... from its bit `shift` upwards;
    when the 8 bits are used up, the next `lanes` bytes follow.

    >>> nibbles = Run(at=2, bits=4, lanes=16)  # Q4_0: elements 0 and 16 share byte 2
    >>> nibbles.byte(16), nibbles.bit(16)
    (2, 4)
    """

    at: int  # first byte in the block
    bits: int  # 1, 2, 4 or 8
    lanes: int  # bytes over which neighbouring elements are spread
    shift: int = (
        0  # lowest bit used; not 0 where two fields share the bytes (Q2_K scales and minima)
    )

    def byte(self, e: int) -> int:
        """Byte of the block that holds element `e`."""
        return self.at + e // (self.lanes * 8 // self.bits) * self.lanes + e % self.lanes

    def bit(self, e: int) -> int:
        """Lowest bit of element `e` within that byte."""
        return self.shift + self.bits * (e // self.lanes % (8 // self.bits))

    def grid(self, count: int) -> tuple[int, int, int]:
        """Shape (passes, slots per byte, lanes) of `count` elements in element order."""
        slots = max(1, min(8 // self.bits, count // self.lanes))
        return count // (slots * self.lanes), slots, self.lanes


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a block, stored in one of three ways.

    plain   `at`, `type`, `count`: numbers one after the other
    runs    `runs`, `bias`: value = code + bias; a second run holds the bits above the first's
    packed  `at`, `pack = "k4"`, `part`: the 12 bytes of Q4_K and Q5_K, part 0 = sc, part 1 = m
    """

    name: str
    at: int = 0
    type: Literal["f16", "f32", "bf16", "i8", "u8", ""] = ""
    count: int = 1
    runs: tuple[Run, ...] = ()
    bias: int = 0
    pack: Literal["k4", ""] = ""
    part: int = 0


@dataclass(frozen=True)
class BlockFormat:
    """What the bytes of one block mean; see the module's docstring and formats/*.toml."""

    name: str  # as GGUF tools print it: "Q4_K"
    ggml_type: int  # id in a GGUF tensor info
    block: int  # elements
    bytes: int
    group: int  # elements that share one sub-scale; = block where there are none
    value: str  # a key of FAMILIES
    fields: Mapping[str, Field] = dataclass_field(hash=False)
    table: tuple[int, ...] | None = None  # codebook: q is an index into it

    @property
    def bits_per_weight(self) -> float:
        """Bits of file per element.

        >>> get("Q4_K").bits_per_weight
        4.5
        """
        return self.bytes * 8 / self.block

    def count(self, name: str) -> int:
        """How many values field `name` has in a block: 1, one per group, or one per element.

        >>> [get("Q4_K").count(name) for name in ("d", "sc", "q")]
        [1, 8, 256]
        """
        if name == "q":
            return self.block
        grouped = name == "sc" or (name == "m" and "dmin" in self.fields)
        return self.block // self.group if grouped else 1

    def limits(self, name: str) -> tuple[int, int]:
        """Smallest and largest integer of field `name`; for q with a table, indices into it.

        Raises FormatError for a field of real numbers.

        >>> get("Q6_K").limits("q"), get("Q4_K").limits("sc")
        ((-32, 31), (0, 63))
        """
        entry = self.fields[name]
        if entry.runs:
            return entry.bias, entry.bias + (1 << sum(run.bits for run in entry.runs)) - 1
        if entry.pack:
            return 0, 63
        if entry.type in FLOATS:
            raise FormatError(f"{self.name}: field {name} holds {entry.type} numbers, not codes")
        info = np.iinfo(DTYPES[entry.type])
        return int(info.min), int(info.max)


@cache
def formats() -> dict[str, BlockFormat]:
    """All formats in the formats/ folder, by upper-case name, in the order of their GGUF ids.

    Raises FormatError when a file is wrong.

    >>> formats()["Q8_0"].bytes
    34
    """
    found = sorted(
        (_read(path) for path in find("formats").glob("*.toml")), key=lambda f: f.ggml_type
    )
    ids = [fmt.ggml_type for fmt in found]
    if len(set(ids)) != len(ids):
        raise FormatError(f"{find('formats')}: ggml_type {sorted(ids)}: two formats share one id")
    return {fmt.name: fmt for fmt in found}


def get(name: str | BlockFormat) -> BlockFormat:
    """Format by name, in any case; a BlockFormat is returned as it is.

    Raises FormatError, listing the known names.

    >>> get("q4_0").name
    'Q4_0'
    """
    if isinstance(name, BlockFormat):
        return name
    fmt = formats().get(name.upper())
    if fmt is None:
        raise FormatError(f"format {name!r} is unknown: expected one of {', '.join(formats())}")
    return fmt


def by_type(ggml_type: int) -> BlockFormat | None:
    """Format with this GGUF id, or None.

    >>> by_type(12).name, by_type(4)
    ('Q4_K', None)
    """
    return next((fmt for fmt in formats().values() if fmt.ggml_type == ggml_type), None)


def row_bytes(fmt: str | BlockFormat, cols: int) -> int:
    """Bytes of a row of `cols` elements.

    Raises FormatError when `cols` is not a multiple of the block.

    >>> row_bytes("Q4_0", 64)
    36
    """
    fmt = get(fmt)
    if cols % fmt.block:
        raise FormatError(f"{fmt.name}: row of {cols} elements: expected a multiple of {fmt.block}")
    return cols // fmt.block * fmt.bytes


def _read(path: Path) -> BlockFormat:
    table = load_toml(path)
    entries = table.pop("field", None)
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise FormatError(
            f"{path}: [field] is missing or not a table of tables: add one table per field"
        )
    table["fields"] = {name: {**entry, "name": name} for name, entry in entries.items()}
    fmt = from_table(BlockFormat, table, str(path))
    _check(fmt, path)
    return fmt


def _check(fmt: BlockFormat, path: Path) -> None:
    """Refuse tables that could make a reader step outside a block."""
    if fmt.name != path.stem.upper():
        raise FormatError(
            f"{path}: name = {fmt.name!r}: expected {path.stem.upper()!r} as the file's"
        )
    if fmt.value not in FAMILIES:
        raise FormatError(f"{path}: value = {fmt.value!r}: expected one of {', '.join(FAMILIES)}")
    if set(fmt.fields) != set(FAMILIES[fmt.value]):
        raise FormatError(f"{path}: [field]: expected {', '.join(FAMILIES[fmt.value])}")
    if fmt.block < 1 or fmt.group < 1 or fmt.block % fmt.group:
        raise FormatError(f"{path}: group = {fmt.group}: expected a divisor of block = {fmt.block}")
    for name, entry in fmt.fields.items():
        if not _fits(entry, fmt.count(name), fmt.bytes):
            raise FormatError(
                f"{path}: field {name}: its place, bits or count do not fit the block"
            )
    if fmt.table is not None and len(fmt.table) != fmt.limits("q")[1] + 1:
        raise FormatError(f"{path}: table: expected {fmt.limits('q')[1] + 1} values, one per code")


def _fits(entry: Field, count: int, size: int) -> bool:
    if (bool(entry.type), bool(entry.runs), bool(entry.pack)).count(True) != 1 or entry.at < 0:
        return False
    if entry.runs:
        return all(_run_fits(run, count, size) for run in entry.runs)
    if entry.pack:
        return count == K4_COUNT and entry.part in (0, 1) and entry.at + K4_BYTES <= size
    assert entry.type
    return entry.count == count and entry.at + count * DTYPES[entry.type].itemsize <= size


def _run_fits(run: Run, count: int, size: int) -> bool:
    if run.bits not in (1, 2, 4, 8) or run.lanes < 1 or run.at < 0 or run.shift < 0:
        return False
    passes, slots, lanes = run.grid(count)
    inside = run.at + passes * lanes <= size and run.shift + slots * run.bits <= 8
    return inside and passes * slots * lanes == count
