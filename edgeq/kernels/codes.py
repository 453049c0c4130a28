"""From a format's table to vector IR: the codes of a step as 8-bit lanes, and its scales as f32
lanes.

Every quantized format becomes the same thing, per group of 16 or 32 weights: w = A·u + B, with u an
8-bit code, A = d·sc and B made of the minimum and of the code's offset. So a format is a table, and
kernels are written once. A step is what one pass of an inner loop reads of a row: 256 weights, or
one block of 32 at the end of a row.
"""

from dataclasses import dataclass
from types import ModuleType

from llvmlite import ir

from edgeq.blocks import BlockFormat, Field, Run
from edgeq.errors import KernelError
from edgeq.kernels.llvm import F16, F32, I1, I8, I32, Emit, Value, vector

__all__ = ["Coding", "codes", "coding", "plain", "scales"]


@dataclass(frozen=True)
class Coding:
    """How the codes of `fmt` reach the dot product of an instruction set, for steps of `blocks`
    blocks.
    """

    fmt: BlockFormat
    blocks: int  # blocks per step
    signed: (
        bool  # codes are signed bytes; otherwise unsigned and below 128 (or shifted up by `shift`)
    )
    shift: int  # added to signed codes because the dot product wants them unsigned
    offset: int  # w = A·(u + offset) [- minimum]

    @property
    def weights(self) -> int:
        return self.blocks * self.fmt.block

    @property
    def bytes(self) -> int:
        return self.blocks * self.fmt.bytes

    @property
    def groups(self) -> int:
        return self.weights // self.fmt.group

    @property
    def has_minimum(self) -> bool:
        """Whether B is not zero."""
        return bool(self.offset) or "m" in self.fmt.fields


def plain(fmt: BlockFormat) -> bool:
    """Whether weights are stored as floats (F32, F16, BF16) and not as codes."""
    return fmt.value == "x"


def coding(fmt: BlockFormat, isa: ModuleType, *, tail: bool = False) -> Coding:
    """Steps of 256 weights; with `tail`, of a single block of 32."""
    q = fmt.fields["q"]
    signed = q.type == "i8" or fmt.table is not None
    shift = isa.OFFSET if signed else 0
    offset = (0 if fmt.table else q.bias) - shift
    return Coding(fmt, 1 if tail else max(256 // fmt.block, 1), signed and not shift, shift, offset)


# -- codes -----------------------------------------------------------------------------------------
def codes(e: Emit, c: Coding, step: Value, first: int, count: int) -> Value:
    """i8[count]: codes first .. first+count-1 of the step that starts at pointer `step`."""
    block = c.fmt.block
    if count > block:
        parts = range(first, first + count, block)
        return e.join([codes(e, c, step, part, block) for part in parts])
    base = e.at(step, first // block * c.fmt.bytes)
    return _block_codes(e, c, base, first % block, count)


def _block_codes(e: Emit, c: Coding, block: Value, first: int, count: int) -> Value:
    q = c.fmt.fields["q"]
    if q.type == "i8":
        v = e.load(vector(I8, count), block, q.at + first)
        return e.b.xor(v, e.fill(I8, count, 0x80)) if c.shift else v
    v = _runs(e, q.runs, block, first, count)
    if c.fmt.table is None:
        return v
    return e.isa.lookup(e, [_byte(x + c.shift) for x in c.fmt.table], v)


def _byte(value: int) -> int:
    return (value + 128) % 256 - 128


def _runs(e: Emit, runs: tuple[Run, ...], block: Value, first: int, count: int) -> Value:
    out, low = None, 0
    for run in runs:
        v = _run(e, run, block, first, count)
        shifted = e.b.shl(v, e.fill(I8, count, low)) if low else v
        out = shifted if out is None else e.b.or_(out, shifted)
        low += run.bits
    return out


def _place(run: Run, element: int) -> tuple[int, int]:
    """(byte, shift) of an element; see blocks.Run."""
    per_byte = 8 // run.bits
    byte = run.at + element // (run.lanes * per_byte) * run.lanes + element % run.lanes
    return byte, run.shift + run.bits * (element // run.lanes % per_byte)


def _run(e: Emit, run: Run, block: Value, first: int, count: int) -> Value:
    """i8[count] of the run's bits, by the cheapest way its layout allows."""
    places = [_place(run, first + i) for i in range(count)]
    if run.bits == 1 and run.lanes == 1 and count % 8 == 0:
        word = e.load(ir.IntType(count), block, places[0][0])
        return e.b.zext(e.b.bitcast(word, vector(I1, count)), vector(I8, count))
    size = min(run.lanes, count)
    if size < 8:
        return _scattered(e, run, block, places)
    parts = []
    for start in range(0, count, size):
        byte, shift = places[start]
        v = e.load(vector(I8, size), block, byte)
        parts.append(e.bits(v, shift, (1 << run.bits) - 1))
    return e.join(parts)


def _scattered(e: Emit, run: Run, block: Value, places: list[tuple[int, int]]) -> Value:
    """Bits at irregular places (sub-scales): one load, one permutation, one shift per lane."""
    start = min(byte for byte, _ in places)
    span = max(byte for byte, _ in places) + 1 - start
    loaded = e.load(vector(I8, span), block, start)
    picked = e.pick(loaded, [byte - start for byte, _ in places])
    wide = e.widen(picked, I32, signed=False)
    wide = e.b.lshr(wide, e.const(I32, [shift for _, shift in places]))
    wide = e.b.and_(wide, e.fill(I32, len(places), (1 << run.bits) - 1))
    return e.b.trunc(wide, vector(I8, len(places)))


# -- scales ----------------------------------------------------------------------------------------
def scales(e: Emit, c: Coding, step: Value) -> tuple[Value, Value | None]:
    """(A, B): f32[groups] each; B is None where it is zero."""
    fields = c.fmt.fields
    d = _scalars(e, c, fields["d"], step)
    a = d if "sc" not in fields else e.mul(d, _sub(e, c, fields["sc"], step))
    b = e.mul(a, e.fill(F32, c.groups, c.offset)) if c.offset else None
    if "m" not in fields:
        return a, b
    if "dmin" in fields:
        minimum = e.mul(_scalars(e, c, fields["dmin"], step), _sub(e, c, fields["m"], step))
        b = e.sub(b if b is not None else e.fill(F32, c.groups, 0.0), minimum)
    else:
        m = _scalars(e, c, fields["m"], step)
        b = m if b is None else e.add(b, m)
    return a, b


def _scalars(e: Emit, c: Coding, field: Field, step: Value) -> Value:
    """f32[groups] of an f16 that each block has once."""
    if field.type != "f16":
        raise KernelError(f"{c.fmt.name}: a scale of type {field.type}: expected f16")
    halves = [e.load(F16, step, i * c.fmt.bytes + field.at) for i in range(c.blocks)]
    wide = e.isa.from_f16(e, e.gather(halves))
    each = c.groups // c.blocks
    return wide if each == 1 else e.pick(wide, [i // each for i in range(c.groups)])


def _sub(e: Emit, c: Coding, field: Field, step: Value) -> Value:
    """f32[groups] of the integer sub-scales (or sub-minimums) of one block."""
    if field.pack == "k4":
        small = _k4(e, field, step)
    elif field.type:
        small = e.load(vector(I8, c.groups), step, field.at)
    else:
        small = _runs(e, field.runs, step, 0, c.groups)
    wide = e.widen(small, I32, signed=field.type == "i8")
    if field.bias:
        wide = e.b.add(wide, e.fill(I32, c.groups, field.bias))
    return e.floats(wide)


def _k4(e: Emit, field: Field, step: Value) -> Value:
    """u8[8] of the twelve bytes that Q4_K and Q5_K share: four plain 6-bit values, four split in 4
    + 2 bits.
    """
    low = e.load(vector(I8, 4), step, field.at + 4 * field.part)
    tail = e.load(vector(I8, 4), step, field.at + 8)
    high = e.b.shl(e.bits(low, 6, 3), e.fill(I8, 4, 4))
    rest = e.b.or_(e.bits(tail, 4 * field.part, 15), high)
    return e.join([e.bits(low, 0, 63), rest])
