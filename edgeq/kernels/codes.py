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
from edgeq.kernels.llvm import F16, F32, I8, I16, I32, I64, Emit, Value, vector

__all__ = [
    "Coding",
    "block_scales",
    "centred",
    "codes",
    "coding",
    "has_top_bit",
    "integers",
    "looked_up",
    "place_of",
    "plain",
    "scale_and_minimum",
    "scale_and_size",
    "scales",
    "subtracted",
]


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
    if plain(fmt) or ("m" in fmt.fields and fmt.fields["q"].bias):
        raise KernelError(f"{fmt.name}: expected integer codes, with a minimum or a bias, not both")
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
    q = c.fmt.fields["q"]
    if q.type == "i8":
        v = e.load(vector(I8, count), base, q.at + first % block)
        return e.b.xor(v, e.fill(I8, count, 0x80)) if c.shift else v
    return looked_up(e, c, _runs(e, q.runs, base, first % block, count))


def has_top_bit(c: Coding) -> bool:
    """Whether the highest bit of codes is stored apart from the others."""
    runs = c.fmt.fields["q"].runs
    return len(runs) == 2 and runs[1].bits == 1


def centred(e: Emit, c: Coding, step: Value, first: int, count: int) -> Value:
    """i8[count]: codes that have a top bit, less what that is worth."""
    rest, top = c.fmt.fields["q"].runs
    base, at = e.at(step, first // c.fmt.block * c.fmt.bytes), first % c.fmt.block
    if top.lanes == 1:
        word = e.load(ir.IntType(count), base, place_of(top, at)[0])
        missing = e.b.neg(e.isa.flags(e, e.b.not_(word)))
    else:
        missing = e.isa.missing(e, *_bytes_at(e, top, base, at, count))
    return e.isa.signed(e, *_bytes_at(e, rest, base, at, count), rest.bits, missing)


def _bytes_at(e: Emit, run: Run, block: Value, first: int, count: int) -> tuple[Value, int]:
    """(bytes, shift) of some of a run's numbers that lie in neighbouring bytes."""
    places = [place_of(run, first + i) for i in range(count)]
    start, shift = places[0]
    assert places == [(start + i, shift) for i in range(count)]
    return e.load(vector(I8, count), block, start), shift


def looked_up(e: Emit, c: Coding, v: Value) -> Value:
    """Codes → what they stand for in a format with a table."""
    if c.fmt.table is None:
        return v
    return e.isa.lookup(e, [_byte(x + c.shift) for x in c.fmt.table], v)


def _byte(value: int) -> int:
    return (value + 128) % 256 - 128


def _runs(e: Emit, runs: tuple[Run, ...], block: Value, first: int, count: int) -> Value:
    if len(runs) == 2 and all(_whole(run, first, count) for run in runs):
        parts = [_bytes_at(e, run, block, first, count) for run in runs]
        return e.isa.stacked(e, parts, [run.bits for run in runs])
    out, low = None, 0
    for run in runs:
        v = _run(e, run, block, first, count)
        shifted = e.b.shl(v, e.fill(I8, count, low)) if low else v
        out = shifted if out is None else e.b.or_(out, shifted)
        low += run.bits
    return out


def _whole(run: Run, first: int, count: int) -> bool:
    """Whether codes lie in so many neighbouring bytes, all shifted alike."""
    places = [place_of(run, first + i) for i in range(count)]
    start, shift = places[0]
    return places == [(start + i, shift) for i in range(count)]


def place_of(run: Run, element: int) -> tuple[int, int]:
    """(byte, shift) of an element; see blocks.Run."""
    per_byte = 8 // run.bits
    byte = run.at + element // (run.lanes * per_byte) * run.lanes + element % run.lanes
    return byte, run.shift + run.bits * (element // run.lanes % per_byte)


def _run(e: Emit, run: Run, block: Value, first: int, count: int) -> Value:
    """i8[count] of the run's bits, by the cheapest way its layout allows."""
    places = [place_of(run, first + i) for i in range(count)]
    if run.bits == 1 and run.lanes == 1 and count % 8 == 0:
        return e.isa.flags(e, e.load(ir.IntType(count), block, places[0][0]))
    size = min(run.lanes, count)
    if size < 8:
        return _scattered(e, run, block, places)
    if len({byte for byte, _ in places[::size]}) == 1 and size < count:
        return _fanned(e, run, block, places, size)
    parts = []
    for start in range(0, count, size):
        byte, shift = places[start]
        v = e.load(vector(I8, size), block, byte)
        parts.append(e.bits(v, shift, (1 << run.bits) - 1))
    return e.join(parts)


def _fanned(e: Emit, run: Run, block: Value, places: list[tuple[int, int]], size: int) -> Value:
    """The same `size` bytes several times, each time with another shift."""
    loaded = e.load(vector(I8, size), block, places[0][0])
    repeated = e.pick(loaded, [k % size for k in range(len(places))])
    words = e.b.bitcast(repeated, vector(I64, len(places) // 8))
    shifts = e.const(I64, [shift for _, shift in places[::8]])
    v = e.b.bitcast(e.b.lshr(words, shifts), repeated.type)
    return e.b.and_(v, e.fill(I8, len(places), (1 << run.bits) - 1))


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
    a, m = scale_and_minimum(e, c, step)
    if c.offset:
        return a, e.mul(a, e.fill(F32, c.groups, c.offset))
    return a, m


def scale_and_minimum(e: Emit, c: Coding, step: Value) -> tuple[Value, Value | None]:
    """(A, m) of w = A·(u + offset) + m: f32[groups] each; m is None where it is zero."""
    a, m = scale_and_size(e, c, step)
    return a, e.b.fneg(m) if subtracted(c) else m


def subtracted(c: Coding) -> bool:
    """Whether the format takes the minimum off."""
    return "dmin" in c.fmt.fields


def scale_and_size(e: Emit, c: Coding, step: Value) -> tuple[Value, Value | None]:
    """The same, with minimums as they are stored: see `subtracted`."""
    fields = c.fmt.fields
    d = _scalars(e, c, "d", step)
    a = d if "sc" not in fields else e.mul(d, e.floats(integers(e, c, "sc", step)))
    if "m" not in fields:
        return a, None
    if "dmin" not in fields:
        return a, _scalars(e, c, "m", step)
    return a, e.mul(_scalars(e, c, "dmin", step), e.floats(integers(e, c, "m", step)))


def block_scales(e: Emit, c: Coding, name: str, step: Value) -> Value:
    """f32[blocks] of an f16 that each block has once."""
    field = c.fmt.fields[name]
    if field.type != "f16":
        raise KernelError(f"{c.fmt.name}: a scale of type {field.type}: expected f16")
    if c.blocks > 1 or "dmin" not in c.fmt.fields:
        return e.isa.from_f16(e, _halves(e, c, field.at, step))
    # Two that lie side by side are converted at once.
    first = min(c.fmt.fields[k].at for k in ("d", "dmin"))
    both = e.isa.from_f16(e, e.load(vector(F16, 2), step, first))
    return e.pick(both, [(field.at - first) // 2])


def _scalars(e: Emit, c: Coding, name: str, step: Value) -> Value:
    """The same for each group."""
    wide = block_scales(e, c, name, step)
    if c.blocks == 1:
        return e.splat(e.lane(wide, 0), c.groups)  # converted once, then spread
    each = c.groups // c.blocks
    return wide if each == 1 else e.pick(wide, [i // each for i in range(c.groups)])


def _halves(e: Emit, c: Coding, at: int, step: Value) -> Value:
    """f16[blocks], put together in general registers, four at a time."""
    places = [i * c.fmt.bytes + at for i in range(c.blocks)]
    if len(places) == 1:
        return e.load(vector(F16, 1), step, at)
    words = []
    for four in range(0, len(places), 4):
        word = I64(0)
        for k, place in enumerate(places[four : four + 4]):
            wide = e.b.zext(e.load(I16, step, place), I64)
            word = e.b.or_(word, e.b.shl(wide, I64(16 * k))) if k else wide
        words.append(word)
    return e.b.bitcast(e.gather(words), vector(F16, len(places)))


def integers(e: Emit, c: Coding, name: str, step: Value) -> Value:
    """i32[groups] of the integer sub-scales (or sub-minimums) `name` of one block."""
    field = c.fmt.fields[name]
    if field.pack == "k4":
        small = _k4(e, field, step)
    elif field.type:
        small = e.load(vector(I8, c.groups), step, field.at)
    else:
        small = _runs(e, field.runs, step, 0, c.groups)
    if field.bias and e.isa.ACROSS:  # on few lanes, where a register holds no more
        small = e.b.add(small, e.fill(I8, c.groups, field.bias))
        return e.widen(small, I32, signed=True)
    wide = e.widen(small, I32, signed=field.type == "i8")
    return e.b.add(wide, e.fill(I32, c.groups, field.bias)) if field.bias else wide


def _k4(e: Emit, field: Field, step: Value) -> Value:
    """u8[8] of the twelve bytes that Q4_K and Q5_K share: four plain 6-bit values, four split in 4
    + 2 bits. In general registers, four bytes at once: vector units have enough to do.
    """
    low = e.load(I32, step, field.at + 4 * field.part)
    tail = e.load(I32, step, field.at + 8)
    if field.part:
        tail = e.b.lshr(tail, I32(4))
    high = e.b.and_(e.b.lshr(low, I32(2)), I32(0x30303030))
    rest = e.b.or_(e.b.and_(tail, I32(0x0F0F0F0F)), high)
    plain = e.b.and_(low, I32(0x3F3F3F3F))
    both = e.b.or_(e.b.zext(plain, I64), e.b.shl(e.b.zext(rest, I64), I64(32)))
    return e.b.bitcast(both, vector(I8, 8))
