"""Values of the KV cache, f32 to stored and back: floats of any kind, and blocks of 32 codes with
an f16 scale.
"""

from collections.abc import Callable

from edgeq.kernels.llvm import F16, F32, I8, I16, I32, I64, Emit, Value, vector
from edgeq.kernels.rows import larger

__all__ = ["BLOCK", "each_block", "from_stored", "quantize", "rounded", "signed_max", "to_stored"]

BLOCK = 32  # values that share a scale
HALF = 16  # lanes in which a block is worked on
MAGIC, MAGIC_BITS = 12582912.0, 0x4B400000  # 1.5·2^23: adding it rounds to an integer


# -- floats ----------------------------------------------------------------------------------------
def to_stored(e: Emit, kind: str, v: Value) -> Value:
    """f32 lanes → lanes of f32, f16 or bf16 (as i16), rounded to nearest even."""
    n = v.type.count
    if kind == "f32":
        return v
    if kind == "f16":
        return e.isa.to_f16(e, v)
    word = e.b.bitcast(v, vector(I32, n))
    odd = e.b.and_(e.b.lshr(word, e.fill(I32, n, 16)), e.fill(I32, n, 1))
    up = e.b.add(word, e.b.add(odd, e.fill(I32, n, 0x7FFF)))
    # Rounding up could turn a NaN into a number.
    word = e.b.select(e.b.fcmp_unordered("uno", v, v), e.fill(I32, n, 0x7FC00000), up)
    return e.b.trunc(e.b.lshr(word, e.fill(I32, n, 16)), vector(I16, n))


def from_stored(e: Emit, kind: str, pointer: Value, lanes: int) -> Value:
    """f32 lanes of stored floats."""
    if kind == "f32":
        return e.load(vector(F32, lanes), pointer)
    if kind == "f16":
        return e.isa.from_f16(e, e.load(vector(F16, lanes), pointer))
    wide = e.widen(e.load(vector(I16, lanes), pointer), I32, signed=False)
    return e.b.bitcast(e.b.shl(wide, e.fill(I32, lanes, 16)), vector(F32, lanes))


# -- blocks ----------------------------------------------------------------------------------------
def each_block(e: Emit, row: Value, n: Value, body: Callable[[Value, list[Value]], None]) -> None:
    """body(block, two f32[16]) over f32[n]; the last block is filled up with zeros."""
    full, rest = e.b.udiv(n, e.i64(BLOCK)), e.b.urem(n, e.i64(BLOCK))

    def block(g: Value, _: list[Value]) -> list[Value]:
        source = e.at(row, e.b.mul(g, e.i64(4 * BLOCK)))
        body(g, [e.load(vector(F32, HALF), source, 4 * HALF * k) for k in (0, 1)])
        return []

    def insert(i: Value, v: list[Value]) -> list[Value]:
        at = e.b.add(e.b.mul(full, e.i64(BLOCK)), i)
        x = e.load(F32, row, e.b.mul(at, e.i64(4)))
        return [e.b.insert_element(v[0], x, e.b.trunc(i, I32))]

    def last(_: Value, v: list[Value]) -> list[Value]:
        body(full, [e.pick(v[0], range(k, k + HALF)) for k in (0, HALF)])
        return v

    e.loop(full, [], block)
    tail = e.loop(rest, [e.fill(F32, BLOCK, 0.0)], insert)
    some = e.b.zext(e.b.icmp_unsigned("!=", rest, e.i64(0)), I64)
    e.loop(some, tail, last)


def quantize(e: Emit, kind: str, parts: list[Value]) -> tuple[list[Value], Value]:
    """(two i32[16] of codes, f16[1] scale) of a block. q8_0: value = code · scale, code -127..127;
    q4_0: value = (code - 8) · scale, code 0..15, and the largest magnitude is exactly -8 · scale.
    """
    peak, extreme = signed_max(e, parts)
    scale = e.b.fdiv(extreme, e.fill(F32, 1, -8.0)) if kind == "q4_0" else peak
    scale = scale if kind == "q4_0" else e.b.fmul(peak, e.fill(F32, 1, 1 / 127))
    stored = e.isa.to_f16(e, scale)
    d = e.isa.from_f16(e, stored)
    nonzero = e.b.fcmp_ordered("one", d, e.fill(F32, 1, 0.0))
    inverse = e.b.select(nonzero, e.b.fdiv(e.fill(F32, 1, 1.0), d), e.fill(F32, 1, 0.0))
    low, high = (-8, 7) if kind == "q4_0" else (-127, 127)
    codes = rounded(e, parts, e.lane(inverse, 0), low, high)
    shift = e.fill(I32, HALF, 8)
    return [e.b.add(c, shift) for c in codes] if kind == "q4_0" else codes, stored


def rounded(e: Emit, parts: list[Value], inverse: Value, low: int, high: int) -> list[Value]:
    """i32 lanes of parts · inverse, rounded to nearest even, between low and high."""
    out = []
    for part in parts:
        n = part.type.count
        v = e.b.fadd(e.b.fmul(part, e.splat(inverse, n)), e.fill(F32, n, MAGIC))
        code = e.b.sub(e.b.bitcast(v, vector(I32, n)), e.fill(I32, n, MAGIC_BITS))
        ends = e.fill(I32, n, low), e.fill(I32, n, high)
        code = e.b.select(e.b.icmp_signed("<", code, ends[0]), ends[0], code)
        out.append(e.b.select(e.b.icmp_signed(">", code, ends[1]), ends[1], code))
    return out


def signed_max(e: Emit, parts: list[Value]) -> tuple[Value, Value]:
    """f32[1] each: the largest magnitude of all lanes, and the value that has it. A NaN wins."""
    top = larger(e, *parts)
    bottom = larger(e, *(e.b.fneg(p) for p in parts))
    while top.type.count > 1:
        halves = range(top.type.count // 2), range(top.type.count // 2, top.type.count)
        top, bottom = (larger(e, *(e.pick(v, h) for h in halves)) for v in (top, bottom))
    peak = larger(e, top, bottom)
    below = e.b.fcmp_unordered(">", bottom, top)
    return peak, e.b.select(below, e.b.fneg(bottom), top)


def bytes_of(e: Emit, codes: list[Value]) -> Value:
    """i8[32] of the two halves of a block."""
    return e.b.trunc(e.join(codes), vector(I8, BLOCK))
