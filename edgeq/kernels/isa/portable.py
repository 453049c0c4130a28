"""Any 64-bit target: the words in plain vector IR; other instruction sets take some from here."""

from collections.abc import Sequence

from llvmlite import ir

from edgeq.kernels.llvm import F16, F32, I1, I8, I16, I32, Emit, Value, vector

NAME = "portable"
RANK = 0
NEEDS: frozenset[str] = frozenset()
CPU = {"x86_64": "x86-64", "aarch64": "generic"}  # what EDGEQ_ISA compiles for
WIDTH = 16  # bytes per vector register
TILE_COLS = 4  # columns that a register tile of the prefill kernel multiplies at once
UNIT = 4  # codes of a row or column that lie together in a panel
OFFSET = 0  # added to signed 8-bit codes before `dot`
ACROSS = False  # whether rows keep their own order, and `sums` goes across lanes


def dot(e: Emit, acc: Value, w: Value, x: Value, signed: bool) -> Value:
    """acc i32[n] + sums of four neighbours of w·x (i8[4n]). Codes w are signed, or unsigned and
    below 128.
    """
    wide = e.b.mul(e.widen(w, I16, signed), e.widen(x, I16, True))
    n = wide.type.count
    pairs = [e.widen(e.pick(wide, range(k, n, 4)), I32, True) for k in range(4)]
    sums = [e.b.add(pairs[0], pairs[1]), e.b.add(pairs[2], pairs[3])]
    return e.b.add(acc, e.b.add(*sums))


def spread(e: Emit, kind: ir.Type, pointer: Value, count: int, lanes: int) -> list[Value]:
    """Of each of `count` values of 32 bits at a pointer a vector that has it in all lanes."""
    return [e.splat(e.load(kind, pointer, 4 * k), lanes) for k in range(count)]


def starts(e: Emit, count: int, lanes: int) -> list[Value]:
    """Where `count` sums of dot products start in a tile."""
    return [e.fill(I32, lanes, 0)] * count


def counted(e: Emit, total: Value) -> Value:
    """f32 lanes of sums below 2^22 that started there."""
    return e.floats(total)


def lookup(e: Emit, table: Sequence[int], index: Value) -> Value:
    """i8 lanes table[index] for a table of 16 and indices below 16: a tree of selects."""
    n = index.type.count
    level = [e.fill(I8, n, value) for value in table]
    for bit in range(4):
        flag = e.b.icmp_unsigned("!=", e.b.and_(index, e.fill(I8, n, 1 << bit)), e.fill(I8, n, 0))
        level = [e.b.select(flag, high, low) for low, high in zip(level[::2], level[1::2])]
    return level[0]


def shifted(e: Emit, v: Value, shifts: Sequence[int], mask: int, low: int) -> Value:
    """((v >> shift) & mask) << low of i8 lanes; a shift per four of them. No byte sees bits of the
    next one through the mask.
    """
    words = e.b.bitcast(v, vector(I32, len(shifts)))
    words = e.b.lshr(words, e.const(I32, list(shifts)))
    found = e.b.and_(e.b.bitcast(words, v.type), e.fill(I8, v.type.count, mask))
    return e.b.shl(found, e.fill(I8, v.type.count, low)) if low else found


def flags(e: Emit, word: Value) -> Value:
    """i8 lanes 0 or 1 of the bits of an integer, from the low end."""
    n = word.type.width
    return e.b.zext(e.b.bitcast(word, vector(I1, n)), vector(I8, n))


def stacked(e: Emit, parts: Sequence[tuple[Value, int]], bits: Sequence[int]) -> Value:
    """i8 lanes of two numbers, the second above the first: of each part (i8 lanes, how far its
    number is shifted up), and the bits of both.
    """
    low, high = (e.bits(v, shift, (1 << n) - 1) for (v, shift), n in zip(parts, bits, strict=True))
    return e.b.or_(e.b.shl(high, e.fill(I8, high.type.count, bits[0])), low)


def from_f16(e: Emit, v: Value) -> Value:
    """f16 lanes → f32 lanes by integer arithmetic (no F16C here): exponents are moved by a
    multiplication.
    """
    n = v.type.count
    word = e.b.zext(e.b.bitcast(v, vector(I16, n)), vector(I32, n))
    sign = e.b.shl(e.b.and_(word, e.fill(I32, n, 0x8000)), e.fill(I32, n, 16))
    rest = e.b.shl(e.b.and_(word, e.fill(I32, n, 0x7FFF)), e.fill(I32, n, 13))
    scaled = e.b.fmul(e.b.bitcast(rest, vector(F32, n)), e.fill(F32, n, 2.0**112))
    special = e.b.icmp_unsigned(">=", rest, e.fill(I32, n, 0x7C00 << 13))
    infinite = e.b.or_(rest, e.fill(I32, n, 0x7F800000))
    magnitude = e.b.select(special, infinite, e.b.bitcast(scaled, vector(I32, n)))
    return e.b.bitcast(e.b.or_(magnitude, sign), vector(F32, n))


def to_f16(e: Emit, v: Value) -> Value:
    """f32 lanes → f16 lanes, rounded to nearest even, by integer arithmetic."""
    n = v.type.count
    word = e.b.bitcast(v, vector(I32, n))
    sign = e.b.lshr(e.b.and_(word, e.fill(I32, n, 0x80000000)), e.fill(I32, n, 16))
    size = e.b.and_(word, e.fill(I32, n, 0x7FFFFFFF))
    odd = e.b.and_(e.b.lshr(size, e.fill(I32, n, 13)), e.fill(I32, n, 1))
    normal = e.b.add(e.b.sub(size, e.fill(I32, n, (112 << 23) - 0xFFF)), odd)
    normal = e.b.lshr(normal, e.fill(I32, n, 13))
    # Below 2^-14 the f32 adder does the rounding: 0.5 has the last bit of a half's subnormals.
    small = e.b.fadd(e.b.bitcast(size, vector(F32, n)), e.fill(F32, n, 0.5))
    small = e.b.sub(e.b.bitcast(small, vector(I32, n)), e.fill(I32, n, 0x3F000000))
    out = e.b.select(e.b.icmp_unsigned("<", size, e.fill(I32, n, 113 << 23)), small, normal)
    over = e.b.icmp_unsigned(">=", size, e.fill(I32, n, 0x477FF000))
    out = e.b.select(over, e.fill(I32, n, 0x7C00), out)
    nan = e.b.icmp_unsigned(">", size, e.fill(I32, n, 0x7F800000))
    out = e.b.or_(e.b.select(nan, e.fill(I32, n, 0x7E00), out), sign)
    return e.b.bitcast(e.b.trunc(out, vector(I16, n)), vector(F16, n))


def pause(e: Emit) -> None:
    """Hint inside a spin loop; nothing here."""
